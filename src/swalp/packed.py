"""Real storage: integer codes and exponents, as a tensor that PyTorch accepts."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map

from swalp.format_text import parse_format
from swalp.formats import BlockFloat, Format, Microscaling, Minifloat
from swalp.packed_views import mode_of, read_only, refuse_collectives, targets, viewed, views
from swalp.quantize import dispatch
from swalp.quantize.api import check
from swalp.quantize.blocks import block_extents, permuted
from swalp.quantize.codes import (
    code_dtype,
    exponent_dtype,
    holds_nan,
    nan_code,
    no_code_for_nan,
)
from swalp.rounding import Nearest, Rounding, Stochastic

aten = torch.ops.aten


class PackedTensor(torch.Tensor):
    """A float32 tensor that is held as integer codes and shared exponents.

    value = code * 2**gap of its block (minifloats: the bits of their code). It has the shape of the
    values, acts as a float32 tensor in every operation, and stays packed in those that only move
    numbers: detach, clone, slices, transposes, devices, copies of packed tensors. Any other
    operation sees the dequantized values. Operations that write into it round what they write:
    `copy_`, `fill_`, assignment to elements and to `data` to nearest, arithmetic stochastically
    with a fresh key, so that ordinary optimizers make progress. Views of it are read-only.

    Attributes:
        codes: int8, uint8 or int16 of that shape; for words of up to 4 bits uint8 with two codes to
            a byte, the even element in the low half, in row-major order.
        exponents: int8 or int16, one per block; None for formats without blocks.
        format: of the values.
    """

    codes: Tensor
    exponents: Tensor | None
    format: Format

    # Set on results that share codes with another tensor but not its blocks' exponents.
    readonly: bool
    _found: tuple[weakref.ref[Tensor], int, bool] | None

    @staticmethod
    def __new__(
        cls, codes: Tensor, exponents: Tensor | None, fmt: Format, shape: Sequence[int]
    ) -> PackedTensor:
        """Wrap codes and exponents that `pack` made.

        Raises:
            ValueError: they are not those of a tensor of that format and shape.
        """
        _require_whole(codes, exponents, fmt, shape)
        return _wrapped(codes, exponents, fmt, shape)

    def __setitem__(self, index: Any, value: Any) -> None:
        values = self.dequantize()
        values[index] = value
        self.copy_(values)

    @property
    def data(self) -> Tensor:
        """As in PyTorch; what is assigned is rounded to nearest, unless it is so packed already."""
        data: Tensor = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]  # a descriptor
        return data

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype or value.device != self.device:
            raise ValueError(
                f"a packed tensor acts as {self.dtype} {tuple(self.shape)} on {self.device}, and "
                f"cannot become {value.dtype} {tuple(value.shape)} on {value.device}; take "
                f"swalp.to_float(model), whose parameters can"
            )
        if not isinstance(value, PackedTensor):
            self._write(value, Nearest())
        elif value.format == self.format and not (self.readonly or value.readonly):
            if value.stride() != self.stride():
                torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]  # a descriptor
            self.codes, self.exponents = value.codes, value.exponents
        else:
            self._write(value.dequantize(), Nearest())

    def share_memory_(self) -> PackedTensor:
        """Move codes and exponents to memory that processes share."""
        for part in (self.codes, self.exponents):
            if part is not None:
                part.share_memory_()  # type: ignore[no-untyped-call]  # PyTorch has no type
        return self

    def is_shared(self) -> bool:
        """Whether codes and exponents are in memory that processes share."""
        parts = [self.codes] if self.exponents is None else [self.codes, self.exponents]
        return all(part.is_shared() for part in parts)  # type: ignore[no-untyped-call]  # PyTorch has no type

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("a packed tensor has no floats in memory to share; dequantize() it first")

    def dequantize(self) -> Tensor:
        """The values: float32, a new tensor that owes nothing to autograd; `x * 1` does."""
        codes = self._element_codes()
        values = dispatch.unpack(codes, self.exponents, self.format)
        if values.is_contiguous() and not codes.is_contiguous():  # tiles may not lie as codes do
            values = torch.empty_like(codes, dtype=values.dtype).copy_(values)
        return values

    def numpy(self, *, force: bool = False) -> Any:
        """The values, in an array of their own; as in PyTorch, not of what requires a gradient."""
        return self.dequantize().requires_grad_(self.requires_grad).numpy(force=force)

    def tolist(self) -> Any:
        """The values, as lists of numbers."""
        return self.dequantize().tolist()

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # PyTorch declares it writeable
        """Bytes really held: codes and exponents."""
        return self.codes.nbytes + (0 if self.exponents is None else self.exponents.nbytes)

    def has_nan(self) -> bool:
        """Whether an element is NaN; of formats of integers, known until the codes change."""
        if not holds_nan(self.format):
            return False
        if isinstance(self.format, Minifloat | Microscaling):
            return bool(self.dequantize().isnan().any())
        # Slices have no version that tells of writes to the whole, nor has what processes share.
        shared = self.codes.untyped_storage().is_shared()
        known = not (self.readonly or shared or self.codes.is_inference())
        version = self.codes._version if known else -1
        found = self._found
        if known and found is not None and found[0]() is self.codes and found[1] == version:
            return found[2]
        codes = self._element_codes()
        # The lowest code, which stands for no number.
        nan = codes.numel() > 0 and int(codes.min()) == nan_code(self.format)
        # A weak reference stays one in a deep copy, whose codes begin at another version.
        self._found = (weakref.ref(self.codes), version, nan) if known else None
        return nan

    def note_no_nan(self) -> None:
        """Take it from who wrote the codes that no element is NaN, until they change."""
        codes = self.codes
        self._found = None if codes.is_inference() else (weakref.ref(codes), codes._version, False)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # untyped
        return f"PackedTensor({self.dequantize()!r}, format={self.format}, nbytes={self.nbytes})"

    def _element_codes(self) -> Tensor:
        if not joined(self.format):
            return self.codes
        return dispatch.split(self.codes, self.shape, code_dtype(self.format))

    def _write(self, values: Tensor, rounding: Rounding) -> None:
        if self.readonly:
            raise read_only()
        packed = pack(values.expand(self.shape), self.format, rounding)
        self._assign(packed)

    def _assign(self, other: PackedTensor) -> None:
        into, given = [self.codes], [other.codes]
        if self.exponents is not None and other.exponents is not None:
            into, given = [*into, self.exponents], [*given, other.exponents]
        torch._foreach_copy_(into, given)  # in one call: Ctrl-C comes before it or after it
        increment_version(self.codes)  # operations below `__torch_dispatch__` do not

    def _like(
        self,
        apply: Callable[[Tensor], Tensor],
        fmt: Format | None = None,
        shape: Sequence[int] | None = None,
    ) -> PackedTensor:
        """The same values with `apply` done to codes and exponents."""
        return _wrapped(
            apply(self.codes),
            None if self.exponents is None else apply(self.exponents),
            fmt or self.format,
            self.shape if shape is None else shape,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The format as its string: `torch.load` then needs no class of ours on its safe list.
        grad = self.requires_grad if isinstance(self, torch.nn.Parameter) else None
        parts = self.codes, self.exponents, str(self.format), tuple(self.shape), grad
        return _rebuild, (*parts, True) if self.readonly else parts

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Format, torch.Size, bool]]:
        names = ["codes"] if self.exponents is None else ["codes", "exponents"]
        return names, (self.format, self.shape, self.readonly)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: tuple[Format, torch.Size, bool], *_: object
    ) -> PackedTensor:
        return _wrapped(inner["codes"], inner.get("exponents"), *context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # as PyTorch's own subclasses have it
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            # As in `pack`; a backward pass or an optimizer in compiled code comes here.
            uncompiled = torch.compiler.disable(cls.__torch_dispatch__)  # type: ignore[no-untyped-call]  # PyTorch has no type
            return uncompiled(func, types, args, kwargs)
        with mode_of(func, args):
            handler = _HANDLERS.get(func)
            result = handler(*args, **kwargs) if handler else NotImplemented
            return _through_floats(func, args, kwargs) if result is NotImplemented else result


def pack(x: Tensor, fmt: Format, rounding: Rounding = Nearest()) -> PackedTensor:  # noqa: B008  (frozen)
    """Round `x` to values of `fmt` and hold them as codes: ``quantize`` with real storage.

    `torch.compile` leaves it out: the graph breaks there.

    Args:
        x: float32, any shape; itself packed in any format, or not.
        fmt: a format of at most 16 bits.
        rounding: as for `quantize`, with the same result.

    Returns:
        A `PackedTensor` whose `dequantize()` equals ``quantize(x, fmt, rounding)``.

    Raises:
        TypeError: `x` is not float32.
        ValueError: `fmt` has more than 16 bits, or does not fit `x` (see `quantize`).
    """
    if torch.compiler.is_dynamo_compiling():
        # Not a decorator, which would import all of Dynamo.
        uncompiled: PackedTensor = torch.compiler.disable(pack)(x, fmt, rounding)  # type: ignore[no-untyped-call]  # PyTorch has no type
        return uncompiled
    check(x, fmt, rounding)
    _check_packable(x, fmt)
    x = x.dequantize() if isinstance(x, PackedTensor) else x.detach()
    codes, exponents = dispatch.pack(x, fmt, rounding)
    return _wrapped(dispatch.join(codes) if joined(fmt) else codes, exponents, fmt, x.shape)


def _check_packable(x: Tensor, fmt: Format) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"pack: x is {x.dtype}; packed tensors act as float32: use x.float()")
    if fmt.bits > 16:
        raise ValueError(f"pack: {fmt} has {fmt.bits} bits; codes have at most 16")


def check_packable(x: Tensor, fmt: Format) -> None:
    """Raise, as `pack` would, unless `x`, which `quantize` takes, can be packed.

    Raises:
        TypeError: it is not float32.
        ValueError: `fmt` has more than 16 bits, or no code for a NaN that is in `x`.
    """
    _check_packable(x, fmt)
    if not (holds_nan(fmt) or x.is_meta) and bool(x.isnan().any()):
        raise no_code_for_nan(fmt)


def _wrapped(
    codes: Tensor,
    exponents: Tensor | None,
    fmt: Format,
    shape: Sequence[int],
    readonly: bool = False,
) -> PackedTensor:
    """What `PackedTensor` makes, of parts that are known to belong together."""
    strides = None if joined(fmt) else codes.stride()
    result: PackedTensor = torch.Tensor._make_wrapper_subclass(
        PackedTensor, tuple(shape), strides, dtype=torch.float32, device=codes.device
    )
    result.codes, result.exponents, result.format = codes, exponents, fmt
    result.readonly, result._found = readonly, None
    return result


def _require_whole(
    codes: Tensor, exponents: Tensor | None, fmt: Format, shape: Sequence[int]
) -> None:
    """Raise ValueError unless these are codes and exponents of a tensor: kernels rely on it."""
    size = tuple(shape)
    if fmt.bits > 16 or not all(isinstance(extent, int) and extent >= 0 for extent in size):
        raise ValueError(f"no packed tensor has the format {fmt} and the shape {size}")
    expected = parts_of(size, fmt)
    given = [(part.dtype, tuple(part.shape)) for part in (codes, exponents) if part is not None]
    if given != expected or (exponents is not None and exponents.device != codes.device):
        raise ValueError(
            f"{fmt} of shape {size} has {_described(expected)}, not {_described(given)}; give "
            f"codes and exponents as swalp.pack made them"
        )


def _described(parts: list[tuple[torch.dtype, tuple[int, ...]]]) -> str:
    texts = [f"{str(dtype).removeprefix('torch.')} {shape}" for dtype, shape in parts]
    return " and ".join(
        f"{name} {text}" for name, text in zip(("codes", "exponents"), texts, strict=False)
    )


def to_plain(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict as plain tensors and strings, which `safetensors` can save.

    Args:
        state: names to tensors, packed or not.

    Returns:
        Tensors, a packed one being split into ``name.codes`` and ``name.exponents``; and, for each
        packed one, ``name`` to its format and shape, such as ``"bfp8[0] 64,3,3,3"``.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name, value in state.items():
        if isinstance(value, PackedTensor):
            # Of a part a copy: the memory is another's.
            held = value._like(torch.clone) if value.readonly else value
            tensors[f"{name}.codes"] = held.codes.contiguous()
            if held.exponents is not None:
                tensors[f"{name}.exponents"] = held.exponents.contiguous()
            metadata[name] = f"{held.format} {','.join(map(str, held.shape))}"
        else:
            tensors[name] = value.contiguous()
    return tensors, metadata


def from_plain(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The inverse of `to_plain`.

    Raises:
        ValueError: the metadata do not describe tensors that are there.
    """
    state = dict(tensors)
    for name, text in metadata.items():
        if f"{name}.codes" not in state:
            raise ValueError(
                f"from_plain: the metadata describe {name!r}, but there is no tensor "
                f"'{name}.codes'; give both as to_plain made them"
            )
        fmt, _, shape = text.partition(" ")
        codes, exponents = state.pop(f"{name}.codes"), state.pop(f"{name}.exponents", None)
        try:
            size = [int(extent) for extent in shape.split(",") if extent]
            state[name] = PackedTensor(codes, exponents, parse_format(fmt), size)
        except ValueError as error:
            raise ValueError(f"from_plain: {name!r}: {error}") from None
    return state


def storage_bytes(shape: Sequence[int], fmt: Format | None) -> int:
    """Bytes that a packed tensor of that shape holds: codes and exponents.

    Args:
        shape: of the tensor.
        fmt: its format; None: float32.
    """
    parts = [(torch.float32, tuple(shape))] if fmt is None else parts_of(shape, fmt)
    return sum(dtype.itemsize * math.prod(size) for dtype, size in parts)


def parts_of(shape: Sequence[int], fmt: Format) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """(dtype, shape) of the codes of a packed tensor, and of its exponents if it has any.

    Args:
        shape: of the tensor.
        fmt: its format.
    """
    parts = [(code_dtype(fmt), tuple(shape))]
    if joined(fmt):
        parts = [(torch.uint8, (-(-math.prod(shape) // 2),))]
    if isinstance(fmt, BlockFloat | Microscaling):
        each = zip(shape, block_extents(fmt, shape), strict=True)
        parts.append((exponent_dtype(fmt), tuple(n // extent if n else 0 for n, extent in each)))
    return parts


def joined(fmt: Format) -> bool:
    """Whether two codes share a byte."""
    return fmt.bits <= 4


def _detach(x: PackedTensor) -> PackedTensor:
    return _wrapped(x.codes, x.exponents, x.format, x.shape, x.readonly)


def _clone(
    x: PackedTensor,
    *,
    memory_format: torch.memory_format | None = None,
    device: torch.device | None = None,
) -> PackedTensor:
    order = torch.preserve_format if memory_format is None or joined(x.format) else memory_format
    device = device or x.device
    return x._like(lambda part: part.to(device, copy=True, memory_format=order))


def _to_copy(x: PackedTensor, **options: Any) -> Tensor:
    dtype = options.pop("dtype", None)
    if dtype not in (None, torch.float32):
        return x.dequantize().to(dtype, **options)
    return _clone(x, memory_format=options.get("memory_format"), device=options.get("device"))


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, PackedTensor):
        assert isinstance(source, PackedTensor)
        return target.copy_(source.dequantize(), non_blocking)
    same = isinstance(source, PackedTensor) and source.format == target.format
    if same and source.shape == target.shape and not target.readonly:
        target._assign(source)  # type: ignore[arg-type]  # `same` says it is packed
    else:
        values = source.dequantize() if isinstance(source, PackedTensor) else source
        target._write(values.to(torch.float32), Nearest())
    return target


def _permute(x: PackedTensor, order: Sequence[int]) -> Any:
    """Codes and exponents in another order of axes; the axes of the format follow."""
    if joined(x.format):
        return NotImplemented
    order = tuple(axis % x.dim() for axis in order)
    fmt = permuted(x.format, order)
    result = x._like(lambda part: part.permute(order), fmt, [x.shape[axis] for axis in order])
    result.readonly = True
    return result


def _empty_like(x: PackedTensor, **options: Any) -> Any:
    """From the meta device, which holds no values, to one that does: what `to_empty` asks for."""
    device = options.get("device")
    if not x.is_meta or device is None or torch.device(device).type == "meta":
        return NotImplemented
    return x._like(lambda part: torch.zeros_like(part, device=device))


def _t(x: PackedTensor) -> Any:
    return _permute(x, (1, 0)) if x.dim() == 2 else NotImplemented


def _transpose(x: PackedTensor, first: int, second: int) -> Any:
    order = list(range(x.dim()))
    order[first], order[second] = order[second], order[first]
    return _permute(x, order)


def _slice(
    x: PackedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    dim = dim % x.dim()
    first, last, _ = slice(start, end).indices(x.shape[dim])
    if joined(x.format) or step != 1 or last <= first:
        return NotImplemented
    shape = (*x.shape[:dim], last - first, *x.shape[dim + 1 :])

    def cut(part: Tensor, extent: int) -> Tensor:
        return part.narrow(dim, first // extent, (last - first) // extent)

    exponents = x.exponents
    if exponents is not None:
        assert isinstance(x.format, BlockFloat | Microscaling)
        extent = block_extents(x.format, x.shape)[dim]
        if isinstance(x.format, Microscaling) or x.format.tile is not None:
            if first % extent or last % extent:
                return NotImplemented  # it would cut through a tile
            exponents = cut(exponents, extent)
        elif exponents.shape[dim] > 1:
            exponents = cut(exponents, extent)
    return _wrapped(cut(x.codes, 1), exponents, x.format, shape, readonly=True)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy,
    aten.t.default: _t,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
}


# One number everywhere: no small update, which rounding to nearest would lose.
_CONSTANTS = {aten.fill_.Scalar, aten.fill_.Tensor}


def _through_floats(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the dequantized values, and round what it wrote into packed tensors."""
    refuse_collectives(func)
    values: dict[int, Tensor] = {}

    def widen(argument: Any) -> Any:
        if not isinstance(argument, PackedTensor):
            return argument
        return values.setdefault(id(argument), argument.dequantize())

    result = func(*tree_map(widen, args), **tree_map(widen, kwargs))
    written = [x for x in targets(func, args, kwargs) if isinstance(x, PackedTensor)]
    for target in written:
        target._write(values[id(target)], Nearest() if func in _CONSTANTS else Stochastic())
    if views(func):
        return tree_map(viewed, result)
    packed = {id(values[id(target)]): target for target in written}
    return tree_map(lambda value: packed.get(id(value), value), result)


def _rebuild(
    codes: Tensor,
    exponents: Tensor | None,
    fmt: str,
    shape: tuple[int, ...],
    requires_grad: bool | None,
    readonly: bool = False,
) -> Tensor:
    result = PackedTensor(codes, exponents, parse_format(fmt), shape)
    result.readonly = readonly
    return result if requires_grad is None else torch.nn.Parameter(result, requires_grad)


torch.serialization.add_safe_globals([_rebuild])
