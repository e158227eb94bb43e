"""Convex problems, as frozen data: least squares, softmax regression, many one-dimensional ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

NOISE_BITS = 16  # of the number that picks one of the quantiles of `gaussian_table`


@dataclass(frozen=True, slots=True, eq=False)
class LeastSquares:
    """Minimize the mean over the rows of (x_i w - y_i)**2 / 2, one row a step.

    Attributes:
        x: float32 (n, d), contiguous.
        y: float32 (n,).
    """

    x: Tensor
    y: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the iterate."""
        return (self.x.shape[1],)


@dataclass(frozen=True, slots=True, eq=False)
class Softmax:
    """Minimize the mean cross-entropy of softmax(x_i W) plus l2 / 2 * ||W||**2, a batch a step.

    Attributes:
        x: float32 (n, features), contiguous, finite; a bias is a column of ones.
        y: int64 (n,), below `classes`.
        classes: columns of W, 2 or more.
        l2: weight of the penalty, which makes the problem strongly convex.
    """

    x: Tensor
    y: Tensor
    classes: int
    l2: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the iterate."""
        return (self.x.shape[1], self.classes)


@dataclass(frozen=True, slots=True)
class Scalars:
    """Minimize f(w) from f'(w) + sigma * u with u ~ N(0, 1), in `count` independent copies.

    * "quadratic": f'(w) = w, the paper's lower-bound example;
    * "skewed": f'(w) = w + w**2 / (1 + w**2), strongly convex (f'' >= 0.35), with a third
      derivative at the optimum, so that E w = -E[w**2 / (1 + w**2)] where the iterates settle:
      fluctuation becomes bias.

    Both have their optimum at 0. u takes the 65,536 values of `gaussian_table`.
    """

    kind: Literal["quadratic", "skewed"]
    sigma: float
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the iterate."""
        return (self.count,)


Problem = LeastSquares | Softmax | Scalars


@cache
def gaussian_table(sigma: float) -> Tensor:
    """The normal distribution's quantiles at (k + 1/2) / 2**16, scaled to variance sigma**2.

    Picked by 16 random bits they are noise that is the same on every machine; its kurtosis is 3 to
    three digits.

    Returns:
        float32 (65536,).
    """
    normal = NormalDist()
    count = 1 << NOISE_BITS
    half = [normal.inv_cdf((k + 0.5) / count) for k in range(count // 2)]
    values = torch.tensor(half + [-value for value in reversed(half)], dtype=torch.float64)
    return (values * (sigma / values.square().mean().sqrt())).float()
