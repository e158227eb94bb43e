"""The average of the iterates: the product of a run."""

from swalp.averaging.average import WeightAverage
from swalp.averaging.kinds import Accumulator, Equal, ExactSum, Exponential, Kind, Window
from swalp.averaging.taking import compensated_mean, moving_mean

__all__ = [
    "Accumulator",
    "Equal",
    "ExactSum",
    "Exponential",
    "Kind",
    "WeightAverage",
    "Window",
    "compensated_mean",
    "moving_mean",
]
