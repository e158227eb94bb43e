"""Products that a module calls as functions: found while its forward runs, and quantized.

A network from outside computes some of its products without a layer: attention above all, but also
`torch.matmul`, `einsum`, a head tied to an embedding by `F.linear`. While the forward of a module
of a converted network runs, these functions go through `_Interception`, a mode of PyTorch that
`torch.compile` and `torch.export` trace like the rest. It ends with that forward: no other network,
and no code outside, ever sees it, but for what that forward calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from swalp.layers.attention import attention, attention_on_integers, multi_head_attention
from swalp.layers.base import Quantized
from swalp.layers.products import Products


class _Interception(TorchFunctionMode):
    """Quantizes around the products that are called while it is active.

    Attributes:
        products: of the module whose forward runs; None inside a layer that quantizes by itself.
    """

    def __init__(self, products: Products | None) -> None:
        super().__init__()
        self.products = products

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = None if self.products is None else _HANDLERS.get(func)
        if handler is None or (not torch.compiler.is_compiling() and _of_a_graph(sys._getframe(1))):
            return func(*args, **kwargs)
        return handler(self.products, func, *args, **kwargs)


def _of_a_graph(caller: Any) -> bool:
    """Whether compiled code calls: what `torch.compile` traced through this mode has its sites.

    Graphs of a part of a network, and those after a graph break, run while the mode is active.
    """
    name = caller.f_code.co_filename
    return name.startswith("<eval_with_key>") or "extern_kernels" in caller.f_globals


def _active() -> _Interception | None:
    for place in reversed(range(torch._C._len_torch_function_stack())):
        mode = torch._C._get_function_stack_at(place)
        if isinstance(mode, _Interception):
            return mode
    return None


@contextmanager
def intercepted(products: Products | None) -> Iterator[None]:
    """Quantize around the products that are called inside."""
    mode = _active()
    if mode is None:
        with _Interception(products):
            yield
        return
    before, mode.products = mode.products, products
    try:
        yield
    finally:
        mode.products = before


@contextmanager
def paused() -> Iterator[None]:
    """Leave the products inside alone: the layer that calls them quantizes by itself.

    Inside, what is asked of tensors does not go through the mode, which costs a call of Python
    each, if no other mode was entered after it.
    """
    mode = _active()
    if mode is None:
        yield
        return
    last = torch._C._len_torch_function_stack() - 1
    if torch._C._get_function_stack_at(last) is mode and not torch.compiler.is_compiling():
        torch._C._pop_torch_function_stack()
        try:
            yield
        finally:
            torch._C._push_on_torch_function_stack(mode)
        return
    before, mode.products = mode.products, None
    try:
        yield
    finally:
        mode.products = before


class QuantizedFunctions(Quantized):
    """Mixin over a module: sites quantize around the products that its forward calls."""

    @classmethod
    def _swalp_namespace(cls, kind: type[nn.Module]) -> dict[str, Any]:
        """With a forward that shows the signature of `kind`'s, which some libraries look at."""
        _know_other_libraries()

        @wraps(kind.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return cls.forward(self, *args, **kwargs)

        return super()._swalp_namespace(kind) | {"forward": forward}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward, its products between the sites."""
        layer = self._swalp_layer
        products = Products.begin(layer, self.training)
        products.module = self  # type: ignore[assignment]  # a mixin over one
        with intercepted(products):
            result = super().forward(*args, **kwargs)  # type: ignore[misc]  # a mixin
        if not torch.compiler.is_compiling():
            layer.functions = products.functions
        return result


Handler = Callable[..., Any]


def _attention(products: Products, func: Any, *args: Any, **kwargs: Any) -> Any:
    if products.off("scaled_dot_product_attention"):
        return func(*args, **kwargs)
    y = attention_on_integers(products, *args, **kwargs)
    return attention(products, *args, **kwargs)[0] if y is None else y


def _multi_head_attention(products: Products, func: Any, *args: Any, **kwargs: Any) -> Any:
    if products.off("multi_head_attention"):
        return func(*args, **kwargs)
    return multi_head_attention(products, *args, **kwargs)


def _product(function: str, *names: str, matrices: bool = True) -> Handler:
    """The handler of a function with two operands.

    Args:
        function: its name.
        names: of its first arguments, the last two of which are the operands.
        matrices: whether it is a product of matrices: the second has the dimension that is summed
            in the last place but one.
    """
    first = len(names) - 2

    def handler(products: Products, func: Any, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *(kwargs.pop(name) for name in names[len(args) :] if name in kwargs)]
        if len(given) < len(names):
            if products.off(function):
                return func(*given, **kwargs)
            raise TypeError(
                f"{function} in a converted network got {len(given)} of its first arguments and "
                f"{', '.join(kwargs) or 'no more'}; give {', '.join(names)} by place or name"
            )
        x, y = given[first : first + 2]
        numbers = x.is_floating_point() and y.is_floating_point()
        # Positions, say, or a sum of one product, which is none.
        other = not numbers or (matrices and x.size(-1) == 1)
        if other or products.off(function):
            return func(*given, **kwargs)
        activations = not products.is_weight(x) and not products.is_weight(y)
        if products.native and activations and func in _PLAIN and len(given) == 2 and not kwargs:
            return products.matmul(x, y)
        given[first] = _enter(products, x)
        given[first + 1] = _enter(products, y, summed=-2 if matrices else -1)
        return products.leave(func(*given, **kwargs))

    return handler


def _linear(products: Products, func: Any, *args: Any, **kwargs: Any) -> Any:
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    if products.native and named.keys() in ({"input", "weight"}, {"input", "weight", "bias"}):
        x, weight, bias = named["input"], named["weight"], named.get("bias")
        one = products.is_weight(weight) and not products.is_weight(x)
        if one and products.multiplies(x, weight, bias) and not products.off("linear"):
            return products.linear(x, weight, bias)
    return _linear_in_float(products, func, *args, **kwargs)


def _einsum(products: Products, func: Any, equation: str, *operands: Any) -> Any:
    # PyTorch has made a string of equations in lists, but leaves lists of operands.
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = inputs.replace(",", "").replace(".", "")
    left_out = set(letters) - set(output) if arrow else len(letters) > len(set(letters))
    left_out = left_out or bool(arrow and "..." in inputs and "..." not in output)
    numbers = all(x.is_floating_point() for x in operands)
    if len(operands) < 2 or not left_out or not numbers or products.off("einsum"):
        return func(equation, *operands)
    return products.leave(func(equation, *(_enter(products, x) for x in operands)))


def _chained(products: Products, func: Any, *matrices: Any, **kwargs: Any) -> Any:
    """A product of several, one after the other: each of them is one."""
    if products.off("multi_dot") or kwargs:
        return func(*matrices, **kwargs)
    if len(matrices) == 1 and not isinstance(matrices[0], Tensor):
        (matrices,) = matrices
    return reduce(lambda x, y: _matmul(products, torch.matmul, x, y), matrices)


def _recurrence(products: Products, func: Any, *args: Any, **kwargs: Any) -> Any:
    """All of a recurrent layer, as a subclass with a forward of its own calls it."""
    if products.off(func.__name__):
        return func(*args, **kwargs)
    raise TypeError(
        f"{func.__name__} in a converted network computes products that cannot be reached: a "
        f"recurrent layer has a forward of its own; let a module hold a plain one, or leave it in "
        f"float by an override"
    )


def _view(products: Products, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """As if results of native convolutions lay in the order in which they are numbered."""
    try:
        return func(x, *args, **kwargs)
    except RuntimeError:
        if x.is_contiguous() or not (x.dim() > 2 and x.movedim(1, -1).is_contiguous()):
            raise
        return func(x.contiguous(), *args, **kwargs)


def _enter(products: Products, x: Tensor, summed: int = -1) -> Tensor:
    """An operand, quantized; a weight as it is."""
    if products.is_weight(x):
        return x  # on its grid already
    return products.enter(x, summed)


_matmul = _product("matmul", "input", "other")
_mm = _product("mm", "input", "mat2")
_bmm = _product("bmm", "input", "mat2")
_mv = _product("mv", "input", "vec")
_addmm = _product("addmm", "input", "mat1", "mat2")
_addmv = _product("addmv", "input", "mat", "vec")
_baddbmm = _product("baddbmm", "input", "batch1", "batch2")
_addbmm = _product("addbmm", "input", "batch1", "batch2")
_inner = _product("inner", "input", "other", matrices=False)


def _weighted(function: str) -> Handler:
    return _product(function, "input", "weight", matrices=False)


_linear_in_float = _weighted("linear")
_RECURRENCES = (
    torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu,
    torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell,
)  # fmt: skip
_HANDLERS: dict[Any, Handler] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    torch.mv: _mv,
    Tensor.mv: _mv,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
    torch.addmv: _addmv,
    Tensor.addmv: _addmv,
    torch.addbmm: _addbmm,
    Tensor.addbmm: _addbmm,
    torch.inner: _inner,
    Tensor.inner: _inner,
    torch.dot: _product("dot", "input", "tensor", matrices=False),
    Tensor.dot: _product("dot", "input", "tensor", matrices=False),
    torch.vdot: _product("vdot", "input", "other", matrices=False),
    Tensor.vdot: _product("vdot", "input", "other", matrices=False),
    torch.linalg.vecdot: _product("vecdot", "x", "y", matrices=False),
    torch.linalg.matmul: _matmul,
    torch.linalg.multi_dot: _chained,
    torch.chain_matmul: _chained,
    Tensor.view: _view,
    torch.tensordot: _product("tensordot", "a", "b", matrices=False),
    torch.einsum: _einsum,
    **dict.fromkeys(_RECURRENCES, _recurrence),
    F.linear: _linear,
    F.conv1d: _weighted("conv1d"),
    F.conv2d: _weighted("conv2d"),
    F.conv3d: _weighted("conv3d"),
    F.conv_transpose1d: _weighted("conv_transpose1d"),
    F.conv_transpose2d: _weighted("conv_transpose2d"),
    F.conv_transpose3d: _weighted("conv_transpose3d"),
    F.bilinear: _product("bilinear", "input1", "input2", matrices=False),
}
# Of the experts in a mixture; not in every version of PyTorch.
for _owner, _name, *_operands in (
    (F, "grouped_mm", "mat_a", "mat_b"),
    (torch, "_grouped_mm", "input", "mat2"),
):
    if hasattr(_owner, _name):
        _HANDLERS[getattr(_owner, _name)] = _product("grouped_mm", *_operands)


def _know_other_libraries() -> None:
    """Handle the operators that libraries of today's modules define, where they are loaded."""
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if fallback is not None:
        _HANDLERS[fallback] = _product("grouped_mm", "input", "weight")


# Products of two matrices or stacks of them, and nothing else.
_PLAIN = (
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    Tensor.mm,
    torch.bmm,
    Tensor.bmm,
)
