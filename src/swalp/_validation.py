"""One line for a caller's mistake: what was given, what is allowed, how to mend it."""


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


def require_bool(owner: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, not {value!r}")
