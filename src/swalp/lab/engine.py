"""Descent on a convex problem: the kernels where they are, the definition where they are not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import assert_never

import torch
from torch import Tensor

from swalp.formats import Format
from swalp.lab import definition
from swalp.lab.problems import NOISE_BITS, LeastSquares, Problem, Scalars, Softmax, gaussian_table
from swalp.noise import stream_seed
from swalp.quantize import dispatch, plans, storage
from swalp.rounding import Nearest, Rounding

if plans.available:
    from swalp import _kernels


@dataclass(frozen=True, slots=True)
class Method:
    """How a trajectory is computed.

    Attributes:
        rate: the learning rate.
        format: of the iterate; None for float32, which is SGD.
        rounding: of the iterate; a `Stochastic` rule has a seed, and step t its noise of step t.
        start: S, steps before averaging starts.
        every: c, steps from one iterate taken to the next.
    """

    rate: float
    format: Format | None = None
    rounding: Rounding = Nearest()  # noqa: RUF009  (a frozen value)
    start: int = 0
    every: int = 1

    def taken(self, step: int) -> int:
        """How many iterates the first `step` steps give to the average."""
        return max(step - self.start, 0) // self.every


@dataclass(slots=True, eq=False)
class Trajectory:
    """Where a descent stands.

    Attributes:
        weight: the iterate, float32, of the problem's shape.
        sum: of the iterates taken, float64; of fixed-point iterates it is exact.
        squares: of the iterates taken, element by element, float64.
        step: steps taken.
    """

    weight: Tensor
    sum: Tensor
    squares: Tensor
    step: int = 0

    def average(self, method: Method) -> Tensor:
        """The mean of the iterates taken, float64."""
        return self.sum / method.taken(self.step)

    def mean_square(self, method: Method) -> Tensor:
        """The mean of the squares of the iterates taken, float64."""
        return self.squares / method.taken(self.step)


def begin(weight: Tensor) -> Trajectory:
    """A trajectory from that iterate, which is copied."""
    zeros = torch.zeros_like(weight, dtype=torch.float64)
    return Trajectory(weight.contiguous().clone(), zeros, zeros.clone())


def descend(
    problem: Problem, method: Method, run: Trajectory, draws: Tensor | int, steps: int
) -> None:
    """Take `steps` steps.

    Equal to `definition` bit for bit, on every machine. The interpreter's lock is free meanwhile:
    Python threads run many trajectories at once.

    Args:
        problem: what is minimized.
        method: how.
        run: where it stands; moved on.
        draws: the random choices of the gradients: rows of the data, int64, (steps,) of
            `LeastSquares`, (steps, batch) of `Softmax`; the run's seed for `Scalars`.
        steps: how many.

    Raises:
        ValueError: a row that is not there, or not a row for each step.
    """
    if isinstance(draws, Tensor):
        _check_rows(problem, draws, steps)
    fast = method.format is None or plans.supports(method.format, method.rounding, torch.float32)
    if plans.available and fast:
        _kernel(problem, method, run, draws, steps)
    else:
        if not plans.available:
            dispatch.warn_once()
        _slow(problem, method, run, draws, steps)
    run.step += steps


def _slow(
    problem: Problem, method: Method, run: Trajectory, draws: Tensor | int, steps: int
) -> None:
    for index in range(steps):
        step = run.step + index + 1
        match problem:
            case LeastSquares():
                assert isinstance(draws, Tensor)
                moved = definition.least_squares_moved(
                    problem, run.weight, int(draws[index]), method.rate
                )
            case Softmax():
                assert isinstance(draws, Tensor)
                moved = definition.softmax_moved(problem, run.weight, draws[index], method.rate)
            case Scalars():
                assert isinstance(draws, int)
                seed = stream_seed(draws, "gradient noise", problem.kind)
                moved = definition.scalars_moved(problem, run.weight, seed, step, method.rate)
            case _:
                assert_never(problem)
        run.weight.copy_(definition.rounded(moved, method.format, method.rounding, step))
        if method.taken(step) > method.taken(step - 1):
            run.sum += run.weight.double()
            run.squares += run.weight.double().square()


def _kernel(
    problem: Problem, method: Method, run: Trajectory, draws: Tensor | int, steps: int
) -> None:
    kernel = None if method.format is None else plans.plan_of(method.format).kernel
    rule, bits, seed, _, _ = plans.rule_arguments(method.rounding)
    descent = (
        run.weight.numel(), run.weight.data_ptr(), run.sum.data_ptr(), run.squares.data_ptr(),
        kernel, rule, bits, seed, (run.step, method.start, method.every), method.rate,
    )  # fmt: skip
    match problem:
        case LeastSquares(x, y):
            assert isinstance(draws, Tensor)
            _kernels.least_squares(*descent, x.data_ptr(), y.data_ptr(), draws.data_ptr(), steps)
        case Softmax(x, y, classes, l2):
            assert isinstance(draws, Tensor)
            offsets, columns, values = _sparse(problem)
            _kernels.softmax(
                *descent, x.shape[1], classes, draws.shape[1], offsets.data_ptr(), y.data_ptr(),
                columns.data_ptr(), values.data_ptr(), l2, draws.data_ptr(), steps,
            )  # fmt: skip
        case Scalars(kind, sigma, _):
            assert isinstance(draws, int)
            table = gaussian_table(sigma)
            noise = stream_seed(draws, "gradient noise", kind)
            _kernels.scalars(*descent, kind == "skewed", noise, NOISE_BITS, table.data_ptr(), steps)
        case _:
            assert_never(problem)


@lru_cache(maxsize=4)
def _sparse(problem: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    """The nonzero features of all examples: where each example's begin, their columns, values."""
    x = problem.x
    counts = torch.zeros(len(x) + 1, dtype=torch.int64)
    counts[1:] = (x != 0).sum(1)
    columns = x.nonzero()[:, 1].int()
    return counts.cumsum(0), columns, x[x != 0]


def _check_rows(problem: Problem, rows: Tensor, steps: int) -> None:
    assert not isinstance(problem, Scalars)
    x, y = problem.x, problem.y
    kind = torch.float32 if isinstance(problem, LeastSquares) else torch.int64
    if not (storage.is_plain(x) and y.is_cpu and y.is_contiguous() and y.dtype == kind):
        raise ValueError(
            f"descend: x is {x.dtype}, y {y.dtype}; they must be float32 and {kind}, contiguous, "
            f"on the CPU"
        )
    if isinstance(problem, Softmax) and not 0 <= int(y.min()) <= int(y.max()) < problem.classes:
        raise ValueError(f"descend: a label is none of the {problem.classes} classes")
    if len(rows) != steps or rows.dtype != torch.int64 or not rows.is_contiguous():
        raise ValueError(
            f"descend: draws are {rows.dtype} {tuple(rows.shape)}; they must be int64, contiguous, "
            f"with a row for each of the {steps} steps"
        )
    if steps and not 0 <= int(rows.min()) <= int(rows.max()) < len(problem.x):
        raise ValueError(f"descend: a row lies outside the {len(problem.x)} of the data")
