"""The others: the copy that bounds everything, and existing ways to round to block floating point.

Every quantizer here has the signature ``quantize(x, per_row) -> Tensor``: 8-bit block floating
point, stochastic, one exponent per tensor or per index of dimension 0, a new tensor returned, as
each of them offers it.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import MissingError

Quantizer = Callable[[Tensor, bool], Tensor]

EAGER = "eager quantizer"
COMPILED = "torch.compile"
QPYTORCH = "QPyTorch as shipped"
QPYTORCH_O3 = "QPyTorch -O3"
TORCHAO = "torchao int8"

_WORD_LENGTH = 8
_SMALLEST = torch.finfo(torch.float32).tiny


def eager_quantize(x: Tensor, per_row: bool) -> Tensor:
    """The quantizer of the published SWALP experiments, in ordinary tensor operations.

    The exponent is the floor of the logarithm of the largest magnitude; the scaled numbers plus
    uniform noise are floored and clamped. The published code has no `clamp_min`: a block of zeros
    becomes NaN there, which ends any training run that meets a dead unit.
    """
    magnitude = x.abs()
    largest = magnitude.flatten(1).amax(1) if per_row else magnitude.amax()
    exponent = largest.clamp_min(_SMALLEST).log2().floor().clamp(-128, 127)
    if per_row:
        exponent = exponent.view(-1, *[1] * (x.dim() - 1))
    gap = torch.exp2(exponent - (_WORD_LENGTH - 2))
    steps = torch.floor(x / gap + torch.rand_like(x))
    limit = 2 ** (_WORD_LENGTH - 1)
    return steps.clamp(-limit, limit - 1) * gap


@functools.cache
def compiled_quantize() -> Quantizer:
    """The eager quantizer through `torch.compile`, which fuses it and draws the noise in place.

    Raises:
        MissingError: there is no C++ compiler, or compiling fails.
    """
    quantize = torch.compile(eager_quantize, dynamic=False, fullgraph=True)
    try:
        quantize(torch.ones(64, 64), True)
    except Exception as error:  # the compiler's errors have no common class
        raise MissingError(f"torch.compile failed: {_first_line(error)}") from error
    return quantize


@functools.cache
def qpytorch() -> ModuleType:
    """The installed QPyTorch. Importing it compiles its C++ extension, once per machine.

    Raises:
        MissingError: it is not installed, or its extension does not compile.
    """
    try:
        importlib.import_module("qtorch.optim")
        return importlib.import_module("qtorch.quant.quant_function")
    except ImportError as error:
        raise MissingError("not installed: pip install qtorch") from error
    except (RuntimeError, OSError) as error:  # no compiler, no ninja, or a failed build
        raise MissingError(f"its extension did not compile: {_first_line(error)}") from error


@functools.cache
def _qpytorch_optimized() -> ModuleType:
    """Its extension built from the same sources with the flags that its own build forgets."""
    from torch.utils.cpp_extension import load

    shipped = qpytorch()
    assert shipped.__file__ is not None
    sources = sorted((Path(shipped.__file__).parent / "quant_cpu").glob("*.cpp"))
    module: ModuleType = load(
        name="quant_cpu_o3",
        sources=[str(path) for path in sources],
        extra_cflags=["-O3", "-march=native"],
    )
    return module


def qpytorch_quantize(optimized: bool) -> Quantizer:
    """QPyTorch's C++ quantizer.

    Args:
        optimized: False: as `pip` installs it, whose build passes no optimisation flag.

    Raises:
        MissingError: see `qpytorch`.
    """
    shipped = qpytorch()
    extension: Any = _qpytorch_optimized() if optimized else shipped.quant_cpu

    def quantize(x: Tensor, per_row: bool) -> Tensor:
        result: Tensor = extension.block_quantize_stochastic(
            x.contiguous(), _WORD_LENGTH, 0 if per_row else -1
        )
        return result

    return quantize


def qpytorch_float(exponent_bits: int, mantissa_bits: int) -> Callable[[Tensor], Tensor]:
    """QPyTorch's rounding to a minifloat, stochastic, as `pip` installs it.

    Raises:
        MissingError: see `qpytorch`.
    """
    extension: Any = qpytorch().quant_cpu
    extension.float_quantize_stochastic(torch.ones(4), mantissa_bits, exponent_bits)
    return lambda x: extension.float_quantize_stochastic(x, mantissa_bits, exponent_bits)


def qpytorch_optimizer(parameters: Sequence[Tensor], lr: float, quantize: Quantizer) -> Any:
    """QPyTorch's low-precision SGD: weights, gradients and momentum through `quantize`.

    Raises:
        MissingError: see `qpytorch`.
    """
    qpytorch()
    inner = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)
    optim: Any = importlib.import_module("qtorch.optim")

    def rule(x: Tensor) -> Tensor:
        return quantize(x, x.dim() > 1)

    return optim.OptimLP(inner, weight_quant=rule, grad_quant=rule, momentum_quant=rule)


def torchao_quantize() -> Quantizer:
    """TorchAO's row-wise int8 with stochastic rounding: codes and float scales, so per row only.

    It has no low-precision SGD; its 8-bit optimizers are Adam's.

    Raises:
        MissingError: it is not installed, or has moved the function, which it calls a prototype.
    """
    # It would list the GPU libraries that it cannot load.
    logging.getLogger("torchao").setLevel(logging.CRITICAL)
    try:
        int8: Any = importlib.import_module("torchao.prototype.quantized_training.int8")
    except ImportError as error:
        raise MissingError("not installed: pip install torchao") from error
    if not hasattr(int8, "quantize_int8_rowwise"):
        raise MissingError("this version has no quantize_int8_rowwise")

    def quantize(x: Tensor, per_row: bool) -> Tensor:
        assert per_row
        codes: Tensor = int8.quantize_int8_rowwise(x, stochastic_rounding=True)[0]
        return codes

    return quantize


def torchao_int8_training() -> tuple[Callable[..., None], Any]:
    """TorchAO's mixed int8 training: its conversion of a model in place, and the setting.

    It multiplies int8 in its linear layers, scaled by row, and keeps weights, activations,
    gradients and momentum in float.

    Raises:
        MissingError: it is not installed, or has moved these, which it calls a prototype.
    """
    logging.getLogger("torchao").setLevel(logging.CRITICAL)
    try:
        quantization: Any = importlib.import_module("torchao.quantization")
        training: Any = importlib.import_module("torchao.prototype.quantized_training")
        return quantization.quantize_, training.Int8MixedPrecisionTrainingConfig()
    except (ImportError, AttributeError) as error:
        raise MissingError(f"not installed, or without int8 training: {error}") from error


def check_runs(step: Callable[[], object]) -> None:
    """Call a peer's step once.

    Raises:
        MissingError: it does not run on this machine.
    """
    try:
        step()
    except Exception as error:
        raise MissingError(f"does not run here: {error}") from error


class LowPrecisionSGD:
    """`torch.optim.SGD` between three quantizers, as the published training loop has it.

    Q_G on every gradient, the step, Q_W on every weight and Q_M on every momentum buffer.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float, quantize: Quantizer) -> None:
        self.parameters = parameters
        self.quantize = quantize
        self.inner = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)

    @torch.no_grad()
    def step(self) -> None:
        """Quantize and update every parameter."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad = self._rounded(parameter.grad)
        self.inner.step()
        for parameter in self.parameters:
            parameter.copy_(self._rounded(parameter))
            state = self.inner.state[parameter]
            state["momentum_buffer"] = self._rounded(state["momentum_buffer"])

    def _rounded(self, x: Tensor) -> Tensor:
        return self.quantize(x, x.dim() > 1)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
