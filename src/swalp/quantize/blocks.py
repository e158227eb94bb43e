"""Which elements share an exponent: blocks as an extent along each axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from swalp.formats import BlockFloat, Format, Microscaling


def block_extents(fmt: BlockFloat | Microscaling, shape: Sequence[int]) -> tuple[int, ...]:
    """Elements of a block along each axis of a tensor of that shape.

    The whole extent where all indices share, 1 where each index has blocks of its own.

    Raises:
        ValueError: an axis of `fmt` is out of range or there twice, or a tile does not divide the
            extent.

    Example:
        >>> block_extents(BlockFloat(8, axes=(0,)), (64, 3, 3))
        (1, 3, 3)
        >>> block_extents(BlockFloat(8, tile=8), (4, 32))
        (1, 8)
    """
    shape = tuple(shape)
    if isinstance(fmt, Microscaling):
        tile: tuple[int, ...] | int | None = (fmt.tile,)
        axes: tuple[int, ...] | None = (fmt.axis,)
    else:
        tile, axes = fmt.tile, fmt.axes
    tiles = tile if isinstance(tile, tuple) else ()
    named = [_axis(axis, shape, fmt) for axis in axes or range(-len(tiles), 0)]
    if len(set(named)) != len(named):
        raise ValueError(
            f"{fmt}: two of its axes are one in a tensor of shape {shape}; name each axis once"
        )
    if not tiles:
        return tuple(1 if axis in named else extent for axis, extent in enumerate(shape))
    extents = [1] * len(shape)
    for where, extent in zip(named, tiles, strict=True):
        if shape[where] % extent:
            raise ValueError(
                f"{fmt}: a tile of {extent} does not divide axis {where} of a tensor of shape "
                f"{shape}; pad the tensor, or choose a tile that divides {shape[where]}"
            )
        extents[where] = extent
    return tuple(extents)


@lru_cache(4096)
def permuted(fmt: Format, order: tuple[int, ...]) -> Format:
    """The format of a tensor of `fmt` whose axes are put in that order: of the same blocks.

    Args:
        fmt: of the tensor before.
        order: of all its axes, each from 0 on, as for `torch.permute`.

    Example:
        >>> str(permuted(BlockFloat(8, axes=(0,)), (1, 0)))
        'bfp8[1]'
    """
    axes = len(order)
    if isinstance(fmt, Microscaling):
        return replace(fmt, axis=order.index(fmt.axis % axes))
    if not isinstance(fmt, BlockFloat) or (fmt.axes is None and fmt.tile is None):
        return fmt
    tiled = len(fmt.tile) if isinstance(fmt.tile, tuple) else 0
    named = fmt.axes or tuple(range(-tiled, 0))
    return replace(fmt, axes=tuple(order.index(axis % axes) for axis in named))


def block_max(x: Tensor, extents: Sequence[int]) -> Tensor:
    """The largest element of each block, shape `x.shape[i] // extents[i]`; `x` is not empty."""
    return x.reshape(_split(x.shape, extents)).amax(dim=tuple(range(1, 2 * x.dim(), 2)))


def spread(blocks: Tensor, extents: Sequence[int]) -> Tensor:
    """Each block's value at each of its elements: the inverse layout of `block_max`."""
    for axis, extent in enumerate(extents):
        blocks = blocks.repeat_interleave(extent, dim=axis)
    return blocks


def _split(shape: Sequence[int], extents: Sequence[int]) -> list[int]:
    return [
        part
        for size, extent in zip(shape, extents, strict=True)
        for part in (size // extent, extent)
    ]


def _axis(axis: int, shape: tuple[int, ...], fmt: BlockFloat | Microscaling) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"{fmt}: axis {axis} is out of range for a tensor of shape {shape}; "
            f"it has {len(shape)} dimension(s)"
        )
    return axis % len(shape)
