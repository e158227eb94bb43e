"""The public `quantize`: arguments checked once, gradients, the operator PyTorch's tools see."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from swalp.format_text import parse_format
from swalp.formats import Binary, BlockFloat, FixedPoint, Format, Microscaling, Minifloat
from swalp.quantize import dispatch, plans, reference, storage
from swalp.quantize.blocks import block_extents
from swalp.rounding import DETERMINISTIC, Nearest, Rounding, Stochastic, TowardZero

if plans.available:
    from swalp._kernels import quantize_plain
    from swalp.extension import TORCH

Gradient = Literal["straight-through", "clipped"]

_GRADIENTS = ("straight-through", "clipped")
CARRIERS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def quantize(
    x: Tensor,
    fmt: Format,
    rounding: Rounding = Nearest(),  # noqa: B008  (a frozen value)
    *,
    gradient: Gradient = "straight-through",
    out: Tensor | None = None,
) -> Tensor:
    """Round each element of `x` to a value of `fmt`.

    Args:
        x: float32, float64, bfloat16 or float16, any shape and memory layout; unchanged. NaN stays
            NaN, infinities saturate, -0 becomes +0 in integer formats.
        fmt: the set of values; block formats find their exponents in `x`.
        rounding: `Nearest()` (ties to even), a directed rule, or `Stochastic(seed)`.
        gradient: what autograd passes back through the rounding. "straight-through": the gradient
            as it is; "clipped": zero where `x` lies beyond the range of its grid.
        out: a tensor of the shape and dtype of `x` to write to, below autograd: `x` itself, or one
            that requires no gradient.

    Returns:
        `out`, or a new tensor of the shape, dtype and strides of `x`, every element a value of
        `fmt`. The values depend on those of `x`, on `fmt` and on `rounding` alone, not on device,
        memory layout or threads.

    Raises:
        TypeError: `x` is no floating-point tensor, or `fmt` or `rounding` is no such value.
        ValueError: the dtype cannot hold the values of `fmt`, an axis is out of range, a tile does
            not divide, or `out` does not fit.

    Example:
        >>> quantize(torch.tensor([0.3, -1.7, 100.0]), FixedPoint(8, 4))
        tensor([ 0.3125, -1.6875,  7.9375])

    Source: Yang et al. 2019 (arXiv:1904.11943), section 3.1; `docs/numerics.md` has the contract.
    """
    if not torch.compiler.is_dynamo_compiling():  # the operator checks, as Dynamo ignores its cache
        # The checks cost more than a thousand numbers: a format that passed them is known again,
        # and the rest is asked in C. One more function would take 3 % of such a call.
        found = plans.known.get(id(fmt))
        if (
            found is not None
            and (kernel := found[0].checked) is not None
            and gradient in _GRADIENTS
        ):
            rows = None if found[0].shapeless else found[0].rows
            if type(rounding) is Stochastic:
                done = quantize_plain(
                    TORCH, kernel, rows, x, out,
                    4, rounding.random_bits, rounding.seed, rounding.step, rounding.call,
                )  # fmt: skip
            else:
                rule = plans.RULES.get(type(rounding), -1)
                done = quantize_plain(TORCH, kernel, rows, x, out, rule, 16, 0, 0, 0)
            if done is not None:
                return done
        check(x, fmt, rounding)
    if gradient not in _GRADIENTS:
        raise ValueError(f"gradient={gradient!r} must be 'straight-through' or 'clipped'")
    if out is not None:
        _check_out(x, out)
        x = x.detach()
    if not torch.compiler.is_compiling() and _is_plain(x) and not x.is_meta:
        if x.dtype is torch.float32 and not isinstance(fmt, Binary):  # it has no rule toward zero
            plan = plans.plan_of(fmt)
            if plan.kernel is not None:
                plan.rows_of(x.shape)  # for `quantize_plain`
                plan.checked = plan.kernel
        if out is None:
            return dispatch.run(x, fmt, rounding)
        if type(out) in _PLAIN:
            dispatch.run(x, fmt, rounding, out.detach())  # nothing for autograd to record
            return out
        return out.copy_(dispatch.run(x, fmt, rounding))
    seed, step, call, key = 0, 0, 0, None
    if isinstance(rounding, Stochastic):
        step, call = rounding.step, rounding.call
        if rounding.seed is None:
            key = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")
        else:
            seed = _signed(rounding.seed)
    transformed = torch._C._are_functorch_transforms_active()
    operator: Any = _Transformable.apply if transformed else torch.ops.swalp.quantize
    result: Tensor = operator(
        x, str(fmt), str(rounding), seed, step, call, key, None, gradient == "clipped"
    )
    return result if out is None else out.copy_(result)


def quantize_at(x: Tensor, fmt: Format, rounding: Stochastic, step: Tensor, call: int) -> Tensor:
    """`quantize` with ``rounding.at(step, call)``, the step being data.

    For a graph that is compiled once and run at many steps.

    Args:
        x: as for `quantize`.
        fmt: likewise.
        rounding: with a seed.
        step: int64, of no dimension.
        call: likewise a counter, but part of the graph.
    """
    assert rounding.seed is not None
    seed = _signed(rounding.seed)
    result: Tensor = torch.ops.swalp.quantize(
        x, str(fmt), str(rounding), seed, 0, call, None, step, False
    )
    return result


def _signed(seed: int) -> int:
    """A 64-bit key as the operator takes it."""
    return seed - (seed >> 63 << 64)


@torch.no_grad()
def quantize_many(
    tensors: Sequence[Tensor],
    fmt: Format,
    rounding: Rounding | Sequence[Rounding] = Nearest(),  # noqa: B008  (a frozen value)
    *,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """`quantize` each of many tensors, without gradients, in one call of the kernels.

    For tensors so small that a call each would cost more than the work.

    Args:
        tensors: as for `quantize`.
        fmt: the format of all.
        rounding: one rule, or one for each tensor. (One `Stochastic` rule with a seed gives all
            tensors the same noise; ``rule.stream(role, name)`` gives each its own.)
        out: tensors to write to, one for each: itself, or memory that none of `tensors` uses.

    Returns:
        One tensor for each (or those of `out`).

    Raises:
        TypeError: as `quantize`.
        ValueError: as `quantize`, or there are not as many of one as of another.
    """
    rules = [rounding] if isinstance(rounding, Rounding) else rounding
    for name, given in (("tensors", tensors), ("rounding", rules), ("out", out or ())):
        if isinstance(given, str | Tensor) or not isinstance(given, Sized):
            raise TypeError(
                f"quantize_many: {name} must be a list, not {type(given).__name__}; of one tensor "
                f"quantize(x, fmt, rounding) takes care, and swalp.Nearest() is a rule"
            )
    outputs = len(tensors) if out is None else len(out)
    if len(rules) not in (1, len(tensors)) or outputs != len(tensors):
        raise ValueError(
            f"quantize_many: {len(tensors)} tensors, {len(rules)} rules and {outputs} outputs; "
            f"give as many of each"
        )
    for rule in rules:
        _check_rule(fmt, rule)
    kinds = set(map(type, tensors))
    if not kinds <= _PLAIN:
        for x in tensors:
            _tensor(x)
    # One check for all that are alike: small tensors often are.
    for dtype in {x.dtype for x in tensors}:
        check_carrier(fmt, dtype)
    shapes = [x.shape for x in tensors]
    for shape in set(shapes):
        _check_shape(fmt, shape)
    if out is not None and out is not tensors:
        for x, target in zip(tensors, out, strict=True):
            _check_out(x, target)
        kinds |= set(map(type, out))
    if kinds <= _PLAIN and not storage.is_watched():
        return list(dispatch.run_many(tensors, shapes, fmt, rules, out))
    each = rules if len(rules) == len(tensors) else list(rules) * len(tensors)
    targets = [None] * len(tensors) if out is None else out
    return [
        quantize(x, fmt, rule, out=target)
        for x, rule, target in zip(tensors, each, targets, strict=True)
    ]


def _tensor(x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"quantize: x must be a torch.Tensor, not {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(
            f"quantize: x is {layout}; quantize its values, or make it dense with x.to_dense()"
        )
    return x


def check(x: Tensor, fmt: Format, rounding: Rounding) -> None:
    """Raise unless `x` can be quantized to `fmt` with `rounding`; see `quantize`."""
    _tensor(x)
    _check_rule(fmt, rounding)
    check_carrier(fmt, x.dtype)
    _check_shape(fmt, x.shape)


def _check_shape(fmt: Format, shape: torch.Size) -> None:
    if isinstance(fmt, BlockFloat | Microscaling):
        block_extents(fmt, shape)


def _check_rule(fmt: Format, rounding: Rounding) -> None:
    if not isinstance(fmt, Format):
        raise TypeError(
            f"quantize: fmt must be a format such as swalp.BlockFloat(8), not {fmt!r}; "
            f"swalp.parse_format reads short strings"
        )
    if not isinstance(rounding, Rounding):
        raise TypeError(
            f"quantize: rounding must be a rule such as swalp.Nearest() or "
            f"swalp.Stochastic(seed), not {rounding!r}"
        )
    if isinstance(fmt, Binary) and isinstance(rounding, TowardZero):
        raise ValueError(f"quantize: {fmt} has no zero to round toward; use Nearest()")


@lru_cache(maxsize=4096)
def check_carrier(fmt: Format, dtype: torch.dtype) -> None:
    """Raise unless tensors of that dtype can hold the values of `fmt`; see `quantize`."""
    if dtype not in CARRIERS:
        raise TypeError(
            f"quantize: x is {dtype}; it must be float32, float64, bfloat16 or float16: convert it "
            f"with x.float()"
        )
    info = torch.finfo(dtype)
    significand = 2 - math.frexp(info.eps)[1]
    name = str(dtype).removeprefix("torch.")
    if fmt.significand_bits > significand:
        raise ValueError(
            f"quantize: {fmt} has {fmt.significand_bits} significant bits, but {name} carries "
            f"{significand}; convert x to a wider dtype or choose a shorter word"
        )
    finest = info.smallest_normal * info.eps
    if isinstance(fmt, FixedPoint | Minifloat | Binary):
        # Without subnormals neighbours lie closer than the smallest value.
        own = fmt.smallest
        if isinstance(fmt, Minifloat):
            own = 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)
        if fmt.largest > info.max or own < finest:
            raise ValueError(
                f"quantize: {fmt} reaches from {own:.3g} to {fmt.largest:.3g}, but "
                f"{name} from {finest:.3g} to {info.max:.3g}; convert x to a wider dtype"
            )
    if isinstance(fmt, Microscaling):
        # The finest scale is 2**-127: with it the elements must reach no further than the carrier.
        furthest, top = fmt.element_exponent - 127, math.frexp(info.max)[1] - 1
        if furthest > top:
            raise ValueError(
                f"quantize: {fmt} reaches 2**{furthest} with its finest scale, but {name} ends "
                f"below 2**{top + 1}; convert x to a wider dtype or choose elements with fewer "
                f"exponent bits"
            )


def _check_out(x: Tensor, out: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"quantize: out must be a torch.Tensor, not {type(out).__name__}")
    if out is not x and out.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "quantize: out requires a gradient, which would be that of what it held before; "
            "write to it under torch.no_grad(), or leave out away"
        )
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"quantize: out is {out.dtype} {tuple(out.shape)} on {out.device}; it must be like x, "
            f"{x.dtype} {tuple(x.shape)} on {x.device}"
        )


def _is_plain(x: Tensor) -> bool:
    """Whether nobody watches: no gradient to record, no mode, no transformation of functions.

    Of several gradients that autograd takes back at once, PyTorch tells by the storage alone.
    """
    return (
        type(x) in _PLAIN
        and not (x.requires_grad and torch.is_grad_enabled())
        and _has_storage(x)
        and not storage.is_watched()
    )


_has_storage = torch._C._has_storage
_PLAIN = {Tensor, torch.nn.Parameter}  # whose memory is what they are


@torch.library.custom_op("swalp::quantize", mutates_args=())
def _operator(
    x: Tensor,
    fmt: str,
    rounding: str,
    seed: int,
    step: int,
    call: int,
    key: Tensor | None,
    clock: Tensor | None,
    clipped: bool,
) -> Tensor:
    rule = DETERMINISTIC.get(rounding)
    if rule is None:
        seed = seed if key is None else int(key)
        step = step if clock is None else int(clock)
        bits = int(rounding.removeprefix("stochastic"))
        rule = Stochastic(seed & (2**64 - 1), random_bits=bits, step=step, call=call)
    return dispatch.run(x, parse_format(fmt), rule)


@_operator.register_fake
def _fake(x: Tensor, fmt: str, rounding: str, *_: object) -> Tensor:
    check(x, parse_format(fmt), DETERMINISTIC.get(rounding, Stochastic()))
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, fmt, *_, clipped = inputs
    ctx.inputs = len(inputs)
    if clipped:
        mask = reference.in_range(x, parse_format(fmt))
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    masks = ctx.saved_tensors
    passed = torch.where(masks[0], grad, 0.0) if masks else grad
    return passed, *(None,) * (ctx.inputs - 1)


_operator.register_autograd(_backward, setup_context=_save)


class _Transformable(torch.autograd.Function):
    """The operator for `torch.func`, whose `grad` does not know the autograd of operators."""

    generate_vmap_rule = True
    forward = staticmethod(torch.ops.swalp.quantize)
    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        passed = _backward(ctx, tangent)[0]
        assert passed is not None
        return passed.clone()


@_operator.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    if info.batch_size == 0:
        x, dim = arguments[0], in_dims[0]
        return (x.new_empty((0, *x.shape)), 0) if dim is None else (torch.empty_like(x), dim)
    # Each slice is a tensor of its own: the same key gives each the same noise, as in a loop.
    batched = [
        [argument] * info.batch_size if dim is None else argument.unbind(dim)
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]
    slices = [torch.ops.swalp.quantize(*one) for one in zip(*batched, strict=True)]
    return torch.stack(slices), 0
