"""One line for a caller's mistake: what was given, what is allowed, how to mend it."""

from numbers import Real

import torch
from torch import Tensor, nn


def require_int(owner: str, name: str, value: object, low: int, high: int, why: str) -> None:
    """Raise unless `value` is an int in [`low`, `high`].

    Raises:
        TypeError: `value` is not an int (a bool is not an int here).
        ValueError: it lies outside; `why` ends the sentence and says how to mend it.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{owner}: {name} must be an int, not {value!r} ({type(value).__name__}); {why}"
        )
    if not low <= value <= high:
        raise ValueError(f"{owner}: {name}={value} must be {low}..{high}; {why}")


def require_not_negative(owner: str, **values: object) -> None:
    """Raise unless each value is at least 0 and finite in float32; a tensor without axes will do.

    Raises:
        TypeError: one is no number (a bool is none here).
        ValueError: one is below 0, too large, infinite or NaN.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real | Tensor):
            raise TypeError(f"{owner}: {name} must be a number, not {value!r}")
        if isinstance(value, Tensor) and value.dim() > 0:
            raise TypeError(
                f"{owner}: {name} must be a number, or a tensor without axes, not one of shape "
                f"{tuple(value.shape)}"
            )
        if not 0 <= float(value) <= torch.finfo(torch.float32).max:  # NaN is not
            raise ValueError(f"{owner}: {name}={value} must be 0 or more, and finite in float32")


def require_model(owner: str, model: object) -> None:
    """Raise TypeError unless `model` is a `torch.nn.Module`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{owner}: model must be a torch.nn.Module, not {type(model).__name__}")


def require_bool(owner: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, not {value!r}")
