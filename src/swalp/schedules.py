"""Learning rates as functions of the step."""

from __future__ import annotations


def published(
    step: float, *, start: float, learning_rate: float, averaging_rate: float, floor: float = 0.01
) -> float:
    """The rate of the published CIFAR runs.

    With t = step / start: `learning_rate` until t = 0.5, linear down to `floor` times it at 0.9,
    flat until 1; from `start` on, where averaging starts, `averaging_rate` at once.

    Args:
        step: steps (or epochs) taken so far, from 0.
        start: the step (or epoch) at which averaging starts; positive.
        learning_rate: the initial rate.
        averaging_rate: the rate while averaging.
        floor: the last rate before averaging, as a share of `learning_rate`.

    Example:
        >>> rates = {"learning_rate": 0.05, "averaging_rate": 0.01}
        >>> [published(epoch, start=200, **rates) for epoch in (0, 199, 200)]
        [0.05, 0.0005, 0.01]

    Source: the code published with Yang et al. 2019.
    """
    if start <= 0:
        raise ValueError(f"published: start={start} must be positive")
    t = step / start
    if t >= 1:
        return averaging_rate
    progress = min(max((t - 0.5) / 0.4, 0.0), 1.0)
    return learning_rate * (1 - (1 - floor) * progress)
