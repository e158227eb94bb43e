"""Whether differences between runs are more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

# The 97.5 % quantile of Student's t with 1, 2, … degrees of freedom; beyond them it is below 2.1.
_STUDENT = (
    12.71, 4.31, 3.19, 2.78, 2.58, 2.45, 2.37, 2.31, 2.27, 2.23, 2.21, 2.18, 2.17, 2.15, 2.14,
    2.12, 2.11, 2.11, 2.1,
)  # fmt: skip


def differs_from_zero(values: Sequence[float]) -> bool:
    """Whether Student's t tells the mean from 0 at the 5 % level; of one value it cannot."""
    if len(values) < 2:
        return False
    freedom = len(values) - 1
    bound = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 2.1
    return bool(abs(mean(values)) > bound * stdev(values) / len(values) ** 0.5)
