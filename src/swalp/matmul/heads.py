"""Products of matrices of samples' heads, of parts of them, without a tensor for each part.

Attention has hundreds of parts, and once a band of scores has filled the caches, a question to
PyTorch takes as long as millions of products on integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from swalp import buffers
from swalp.matmul import kernels
from swalp.matmul.operands import Operand
from swalp.matmul.products import product
from swalp.quantize import plans

if plans.available:
    from swalp import _kernels
    from swalp.extension import TORCH

Multiply = Callable[["_kernels.Heads", "_kernels.Heads", "_kernels.Heads"], None]


def matrices(x: Operand | Tensor) -> _kernels.Heads:
    """Codes, which have one exponent, or floats: (samples, heads, rows, columns)."""
    if isinstance(x, Operand):
        return _kernels.Heads(TORCH, x.codes, x.exponents, x.gap)
    return _kernels.Heads(TORCH, x, None, 0)


def multiplication(*operands: Operand) -> Multiply:
    """What computes ``out = left @ right`` of parts of these, and of codes of their scores.

    Args:
        operands: codes of four dimensions, of which the last two may be summed over.
    """
    if not kernels.in_one_pass(max(max(x.codes.shape[2:]) for x in operands)):
        return _through_tensors
    threads = torch.get_num_threads()

    def multiply(left: _kernels.Heads, right: _kernels.Heads, out: _kernels.Heads) -> None:
        if not _kernels.multiply(left, right, out, threads):
            _through_tensors(left, right, out)

    return multiply


def _through_tensors(left: _kernels.Heads, right: _kernels.Heads, out: _kernels.Heads) -> None:
    """The same by whatever multiplies codes here."""
    a, b = (Operand(x.view().flatten(0, 1), None, x.exponent()) for x in (left, right))
    to = out.view()
    to.copy_(product(a, b).view(to.shape))


class Room:
    """Memory for scores of one band after another.

    Args:
        most: how many there are at a time.
    """

    def __init__(self, most: int) -> None:
        self._all = buffers.empty(most)
        self._parts: dict[tuple[int, ...], tuple[Tensor, _kernels.Heads]] = {}

    def of(
        self, some: slice, count: int, rows: slice, columns: slice
    ) -> tuple[Tensor, _kernels.Heads]:
        """For those of some samples of `count` heads: (samples * heads, rows, columns), and as
        matrices.
        """
        shape = (
            some.stop - some.start, count, rows.stop - rows.start, columns.stop - columns.start
        )  # fmt: skip
        found = self._parts.get(shape)
        if found is None:
            x = self._all[: math.prod(shape)].view(shape)
            found = self._parts[shape] = x.flatten(0, 1), matrices(x)
        return found
