"""Where the elements of a tensor's blocks lie in memory, as the C++ kernels need to know it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from swalp.formats import BlockFloat, Format, Microscaling
from swalp.quantize.blocks import block_extents

MAX_AXES = 8
_SHORT = 16  # elements of a row: shorter ones are not worth gathering one by one


class Layout(NamedTuple):
    """A dense tensor and its blocks, axes merged where that changes nothing.

    `positions` = `channels` = 0: memory is in row-major order, and `sizes` and `extents` are of the
    tensor and of a block. Otherwise row-major order is (outer, channels, positions), memory order
    (outer, positions, channels) as in a channels-last tensor or a transposed matrix, and blocks are
    contiguous in memory: one axis.
    """

    sizes: tuple[int, ...]
    extents: tuple[int, ...]
    positions: int
    channels: int
    grid: tuple[int, ...]  # shape of the shared exponents; () without


def layout_of(fmt: Format, shape: Sequence[int], stride: Sequence[int]) -> Layout | None:
    """The layout, or None if the kernels cannot work on this memory as it is.

    Raises:
        ValueError: a block axis is out of range, or a tile does not divide.
    """
    blocked = isinstance(fmt, BlockFloat | Microscaling)
    extents = block_extents(fmt, shape) if isinstance(fmt, BlockFloat | Microscaling) else shape
    grid = tuple(n // b for n, b in zip(shape, extents, strict=True)) if blocked else ()
    groups = _memory_groups(shape, stride)
    if groups is None:
        return None
    logical, order = groups
    if order == sorted(order):
        sizes, parts = _merge(range(len(shape)), shape, extents)
        return None if len(sizes) > MAX_AXES else Layout(sizes, parts, 0, 0, grid)
    if order not in ([1, 0], [0, 2, 1]):
        return None
    *outer, channel_axes, position_axes = logical
    plane = [*channel_axes, *position_axes]
    if any(extents[axis] != shape[axis] for axis in plane):
        return None
    sizes, parts = _merge(outer[0] if outer else (), shape, extents)
    if len(sizes) > 1:
        return None
    channels = math.prod(shape[axis] for axis in channel_axes)
    positions = math.prod(shape[axis] for axis in position_axes)
    area = channels * positions
    return Layout((sizes[0] * area,), (parts[0] * area,), positions, channels, grid)


def rows_apart(
    shape: Sequence[int], stride: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Sizes and strides of the axes in row-major order, merged where elements follow each other.

    None if neighbours along the last axis do not lie side by side, or are few.
    """
    axes: list[tuple[int, int]] = []
    for size, step in zip(shape, stride, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * step:
            axes[-1] = (axes[-1][0] * size, step)
        else:
            axes.append((size, step))
    if not axes or len(axes) > MAX_AXES or axes[-1][1] != 1 or axes[-1][0] < _SHORT:
        return None
    sizes, strides = zip(*axes, strict=True)
    return sizes, strides


def _memory_groups(
    shape: Sequence[int], stride: Sequence[int]
) -> tuple[list[list[int]], list[int]] | None:
    """Axes that are neighbours in both orders, grouped; and the groups' order in memory.

    None if the elements are not dense in memory.
    """
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    in_memory = sorted(axes, key=lambda axis: -stride[axis])
    expected = 1
    for axis in reversed(in_memory):
        if stride[axis] != expected:
            return None
        expected *= shape[axis]
    place = {axis: index for index, axis in enumerate(in_memory)}
    groups: list[list[int]] = []
    for axis in axes:
        if groups and place[axis] == place[groups[-1][-1]] + 1:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    firsts = sorted(range(len(groups)), key=lambda group: place[groups[group][0]])
    return groups, firsts


def _merge(
    axes: Sequence[int], shape: Sequence[int], extents: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and block extents with neighbouring axes merged: at least one of each."""
    merged: list[tuple[int, int]] = [(1, 1)]
    for axis in axes:
        size, extent = shape[axis], extents[axis]
        outer_size, outer_extent = merged[-1]
        if extent == size:
            merged[-1] = (outer_size * size, outer_extent * size)
        elif outer_extent == 1:
            merged[-1] = (outer_size * size, extent)
        else:
            merged.append((size, extent))
    sizes, parts = zip(*merged, strict=True)
    return sizes, parts
