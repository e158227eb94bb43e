"""PyTorch's nonlinearities with sites, for recipes that quantize at their output."""

from __future__ import annotations

from torch import nn

from swalp.layers import QuantizedLayer


class ReLU(QuantizedLayer, nn.ReLU):
    """`torch.nn.ReLU` between sites."""


class ReLU6(QuantizedLayer, nn.ReLU6):
    """`torch.nn.ReLU6` between sites."""


class LeakyReLU(QuantizedLayer, nn.LeakyReLU):
    """`torch.nn.LeakyReLU` between sites."""


class PReLU(QuantizedLayer, nn.PReLU):
    """`torch.nn.PReLU` between sites."""


class ELU(QuantizedLayer, nn.ELU):
    """`torch.nn.ELU` between sites."""


class SELU(QuantizedLayer, nn.SELU):
    """`torch.nn.SELU` between sites."""


class GELU(QuantizedLayer, nn.GELU):
    """`torch.nn.GELU` between sites."""


class SiLU(QuantizedLayer, nn.SiLU):
    """`torch.nn.SiLU` between sites."""


class Mish(QuantizedLayer, nn.Mish):
    """`torch.nn.Mish` between sites."""


class Hardswish(QuantizedLayer, nn.Hardswish):
    """`torch.nn.Hardswish` between sites."""


class Hardsigmoid(QuantizedLayer, nn.Hardsigmoid):
    """`torch.nn.Hardsigmoid` between sites."""


class Hardtanh(QuantizedLayer, nn.Hardtanh):
    """`torch.nn.Hardtanh` between sites."""


class Softplus(QuantizedLayer, nn.Softplus):
    """`torch.nn.Softplus` between sites."""


class Sigmoid(QuantizedLayer, nn.Sigmoid):
    """`torch.nn.Sigmoid` between sites."""


class Tanh(QuantizedLayer, nn.Tanh):
    """`torch.nn.Tanh` between sites."""


NONLINEARITIES: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: ReLU,
    nn.ReLU6: ReLU6,
    nn.LeakyReLU: LeakyReLU,
    nn.PReLU: PReLU,
    nn.ELU: ELU,
    nn.SELU: SELU,
    nn.GELU: GELU,
    nn.SiLU: SiLU,
    nn.Mish: Mish,
    nn.Hardswish: Hardswish,
    nn.Hardsigmoid: Hardsigmoid,
    nn.Hardtanh: Hardtanh,
    nn.Softplus: Softplus,
    nn.Sigmoid: Sigmoid,
    nn.Tanh: Tanh,
}
