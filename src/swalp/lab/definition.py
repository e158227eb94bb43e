"""The definition of a step on each convex problem: plain, slow, with `swalp.quantize` in it.

Algorithm 1 of the paper: w <- Q(w - rate * gradient). Only the iterate is rounded; everything else
is float32, in an order of operations that is fixed here and that the kernels follow, so that they
agree bit for bit. No product is fused with a sum.

Source: Yang et al. 2019 (arXiv:1904.11943), Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swalp.formats import Format
from swalp.lab.problems import NOISE_BITS, LeastSquares, Scalars, Softmax, gaussian_table
from swalp.noise import random_bits
from swalp.quantize import quantize
from swalp.rounding import Rounding, Stochastic

PARTIAL_SUMS = 16  # of an inner product


def rounded(moved: Tensor, fmt: Format | None, rounding: Rounding, step: int) -> Tensor:
    """Q, with the noise of that step; as it is without a format."""
    if fmt is None:
        return moved
    return quantize(moved, fmt, rounding.at(step) if isinstance(rounding, Stochastic) else rounding)


def least_squares_moved(problem: LeastSquares, w: Tensor, row: int, rate: float) -> Tensor:
    """W less rate times the gradient at one row, not rounded yet.

    Args:
        problem: the data.
        w: float32 (d,).
        row: of the data.
        rate: the learning rate; a float32 in the kernel, and here.
    """
    x = problem.x[row]
    residual = inner(x, w) - problem.y[row]
    return w - (torch.tensor(rate) * residual) * x


def softmax_moved(problem: Softmax, w: Tensor, rows: Tensor, rate: float) -> Tensor:
    """W less rate times the gradient of a batch, not rounded yet.

    Args:
        problem: the data.
        w: float32 (features, classes).
        rows: int64 (batch,).
        rate: the learning rate.
    """
    x, y = problem.x[rows], problem.y[rows]
    logits = torch.zeros(len(rows), problem.classes)
    for feature in range(x.shape[1]):
        logits = logits + x[:, feature, None] * w[feature]
    weights = exp(logits - logits.amax(1, keepdim=True))
    total = torch.zeros(len(rows))
    for label in range(problem.classes):
        total = total + weights[:, label]
    error = weights / total[:, None]
    error[torch.arange(len(rows)), y] -= 1.0
    gradient = torch.zeros_like(w)
    for example in range(len(rows)):
        gradient = gradient + x[example, :, None] * error[example]
    gradient = gradient * (1 / torch.tensor(float(len(rows))))
    return w - torch.tensor(rate) * (gradient + torch.tensor(problem.l2) * w)


def scalars_moved(problem: Scalars, w: Tensor, seed: int, step: int, rate: float) -> Tensor:
    """W less rate times the noisy gradient, not rounded yet.

    Args:
        problem: which function, and how much noise.
        w: float32 (count,).
        seed: of the gradients' noise.
        step: t, from 1.
        rate: the learning rate.
    """
    noise = gaussian_table(problem.sigma)[random_bits(len(w), NOISE_BITS, seed, step, 0)]
    gradient = w
    if problem.kind == "skewed":
        square = w * w
        gradient = w + square / (1.0 + square)
    return w - torch.tensor(rate) * (gradient + noise)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product, in float32.

    Element k goes to partial sum k % 16, in order; then the upper half of the partial sums is added
    to the lower half, four times.
    """
    products = torch.nn.functional.pad(a * b, (0, -len(a) % PARTIAL_SUMS))
    sums = torch.zeros(PARTIAL_SUMS)
    for part in products.reshape(-1, PARTIAL_SUMS):
        sums = sums + part
    while len(sums) > 1:
        low, high = sums.chunk(2)
        sums = low + high
    return sums[0]


# exp(x) = 2**n * exp(r) with |r| <= ln(2) / 2; ln(2) in two parts, the first with few bits, so that
# n times it is exact. The polynomial is Taylor's: the next term is below 2**-27.
_LOG2_E = 1.4426950408889634
_LN_2_HIGH, _LN_2_LOW = 0.693359375, -2.12194440e-4
_TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
LOWEST = -87.0  # below, exp counts as exp(-87), which no sum with a 1 in it can tell from 0


def exp(x: Tensor) -> Tensor:
    """The exponential of numbers that are not positive, from operations that all machines agree on.

    Args:
        x: float32, any shape.

    Returns:
        exp(x) to about 2 units in the last place.
    """
    x = x.clamp(min=LOWEST)
    n = torch.round(x * _LOG2_E)
    r = (x - n * _LN_2_HIGH) - n * _LN_2_LOW
    value = torch.full_like(x, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        value = value * r + coefficient
    return value * ((n.int() + 127) << 23).view(torch.float32)
