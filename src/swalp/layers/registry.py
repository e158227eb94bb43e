"""How each kind of layer is converted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from swalp.layers.base import Quantized, float_class
from swalp.layers.functions import QuantizedFunctions
from swalp.layers.recurrent import QuantizedCell, QuantizedRecurrent
from swalp.layers.single import QuantizedBilinear, QuantizedLayer


class Family(Enum):
    """What a recipe's placement says about a layer depends on which of these it is.

    The value is what `swalp.summary` says of a layer of that family that has no site.
    """

    PRODUCT = "float by the recipe"
    LOOKUP = "rows of its weight, no product"
    ATTENTION = "attention in float by the recipe"
    INNER = "quantized by the attention around it"
    NONLINEARITY = "no product"
    NORM = "float statistics and scaling, no product"
    FUNCTIONS = "in float by the recipe"
    OTHER = "no product here"


@dataclass(frozen=True, slots=True)
class Kind:
    """How a kind of layer is converted.

    Attributes:
        family: which of the recipe's sites it has.
        mixin: what quantizes.
        operands: what passes its input site, where that is more than its input.
    """

    family: Family
    mixin: type[Quantized]
    operands: str | None = None


_NONLINEARITIES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink,
    nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Threshold,
)  # fmt: skip
_NORMS = (
    nn.BatchNorm2d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm2d,
    nn.LocalResponseNorm,
)  # fmt: skip
_PRODUCTS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip

# A layer is of the kind whose forward it has: a subclass that only adds names or initialisation is
# converted like its parent, one that computes something of its own is not.
_KINDS: dict[Callable[..., Any], Kind] = {
    **{kind.forward: Kind(Family.PRODUCT, QuantizedLayer) for kind in _PRODUCTS},
    **{kind.forward: Kind(Family.NONLINEARITY, QuantizedLayer) for kind in _NONLINEARITIES},
    **{kind.forward: Kind(Family.NORM, QuantizedLayer) for kind in _NORMS},
    nn.Bilinear.forward: Kind(Family.PRODUCT, QuantizedBilinear, "inputs"),
    nn.Embedding.forward: Kind(Family.LOOKUP, QuantizedLayer),
    nn.EmbeddingBag.forward: Kind(Family.LOOKUP, QuantizedLayer),
    **{
        kind.forward: Kind(Family.PRODUCT, QuantizedRecurrent, "input and hidden states")
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
    },
    **{
        kind.forward: Kind(Family.PRODUCT, QuantizedCell, "input and hidden states")
        for kind in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    },
    nn.MultiheadAttention.forward: Kind(
        Family.ATTENTION, QuantizedFunctions, "inputs, queries, keys, values and probabilities"
    ),
    # These go around their layers on a fast path, unless functions are being intercepted.
    nn.TransformerEncoder.forward: Kind(Family.FUNCTIONS, QuantizedFunctions),
    nn.TransformerEncoderLayer.forward: Kind(Family.FUNCTIONS, QuantizedFunctions),
}
# Layers of other libraries, by the names of their forwards: the libraries stay unimported.
_FOREIGN = {
    "transformers.pytorch_utils.Conv1D.forward": Kind(Family.PRODUCT, QuantizedLayer),
}
_INNER = nn.modules.linear.NonDynamicallyQuantizableLinear

CONVERTIBLE = tuple(
    kind.__name__
    for kind in (*_PRODUCTS, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNN, nn.LSTM, nn.GRU,
                 nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.MultiheadAttention)
)  # fmt: skip


def kind_of(module: nn.Module) -> Kind:
    """How `module` is converted, or was."""
    kind = float_class(module) if isinstance(module, Quantized) else type(module)
    forward = kind.forward
    if kind is _INNER:
        return Kind(Family.INNER, QuantizedLayer)
    if hasattr(module, "parametrizations") or _has_hooked_weight(module):
        # Its weight is computed anew each time, so it is an operand like its input.
        return Kind(Family.FUNCTIONS, QuantizedFunctions)
    if (known := _KINDS.get(forward)) is not None:
        return known
    if (known := _FOREIGN.get(f"{forward.__module__}.{forward.__qualname__}")) is not None:
        return known
    own = (forward.__module__ or "").startswith("torch.nn.")
    return Kind(Family.OTHER, QuantizedLayer) if own else Kind(Family.FUNCTIONS, QuantizedFunctions)


def _has_hooked_weight(module: nn.Module) -> bool:
    """Whether a hook computes its weight: `nn.utils.weight_norm` and `spectral_norm` of old."""
    norms = "weight_g" in module._parameters or "weight_u" in module._buffers
    return norms and "weight" not in module._parameters


def _weights_of(module: nn.Module) -> set[str]:
    """Names of the weights that a layer multiplies itself, parameters or not."""
    if isinstance(module, nn.RNNBase):
        return set(module._flat_weights_names)
    if isinstance(module, nn.RNNCellBase):
        return {"weight_ih", "weight_hh"}
    if isinstance(module, nn.MultiheadAttention):
        return {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
    return set()


def check_convertible(name: str, module: nn.Module) -> None:
    """Raise where converting would leave something in float, or wrong, without a word.

    Raises:
        ValueError: the layer of that name cannot be converted; the text says what to do instead.
    """
    what = (
        f"convert: {type(module).__name__} {name!r}"
        if name
        else f"convert: {type(module).__name__}"
    )
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{what} is compiled TorchScript; convert the Python module instead")
    if isinstance(module, torch.fx.GraphModule):
        raise ValueError(f"{what} is a traced graph; convert the module that it was traced from")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(f"{what} has no parameters yet; run one batch through the model first")
    if "forward" in vars(module):
        raise ValueError(
            f"{what} has its forward replaced on the instance, which converting would not see; "
            f"convert first, and replace it afterwards"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if module.sparse:
            raise ValueError(
                f"{what} has sparse gradients, which cannot be quantized; make it with sparse=False"
            )
        if module.max_norm is not None:
            raise ValueError(
                f"{what} rescales its rows in the forward pass (max_norm), which leaves the grid "
                f"of its weights; make it without max_norm"
            )
    if not _weights_of(module) <= module._parameters.keys():
        raise ValueError(
            f"{what} computes its weights anew each time, which are multiplied where they cannot "
            f"be rounded; take the parametrization off"
        )
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation not in (None, "eager", "sdpa"):
        raise ValueError(
            f"{what} computes attention by {implementation!r}, whose products cannot be reached; "
            f"load it with attn_implementation='sdpa' or 'eager'"
        )
