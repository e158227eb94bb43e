"""How a number is chosen: the rounding rules, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from swalp._validation import require_int
from swalp.noise import stream_seed


@dataclass(frozen=True, slots=True)
class Nearest:
    """To the nearest value; a tie goes to the one with the even code."""

    def __str__(self) -> str:
        return "nearest"


@dataclass(frozen=True, slots=True)
class TowardZero:
    """To the neighbour of smaller magnitude (truncation)."""

    def __str__(self) -> str:
        return "toward-zero"


@dataclass(frozen=True, slots=True)
class TowardPositive:
    """To the neighbour above (ceiling)."""

    def __str__(self) -> str:
        return "toward-positive"


@dataclass(frozen=True, slots=True)
class TowardNegative:
    """To the neighbour below (floor)."""

    def __str__(self) -> str:
        return "toward-negative"


@dataclass(frozen=True, slots=True)
class Stochastic:
    """Up in magnitude with the probability that makes the mean right.

    With s = |x| / gap and U the element's `random_bits` random bits, the magnitude becomes
    floor(s) + [U + 1/2 < 2**random_bits * frac(s)]: representable values never move, the sign plays
    no part, and the bias is at most 2**-(random_bits + 1) of a gap.

    The bits are a pure function of `seed`, `step`, `call` and the element's index in row-major
    order (`swalp.noise`). The same value rounds alike everywhere, every time.

    Args:
        seed: 64-bit key. None: every call of `quantize` draws a fresh one from torch's default
            generator, so that `torch.manual_seed` governs it.
        random_bits: 1..32. 16 do for activations, errors and gradients; weights need 22 or more,
            or small updates are lost: an update below 2**-(random_bits + 1) of a gap never happens.
            Fewer are the first ones of more.
        step, call: further counters, each 0..2**32 - 1: the training step, and the how-manieth use
            of this stream within it.
    """

    seed: int | None = None
    random_bits: int = field(default=32, kw_only=True)
    step: int = field(default=0, kw_only=True)
    call: int = field(default=0, kw_only=True)
    _text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.seed is not None:
            require_int("Stochastic", "seed", self.seed, 0, 2**64 - 1, "it is a 64-bit key")
        require_int("Stochastic", "random_bits", self.random_bits, 1, 32, "use 16 or 32")
        _require_counters(self.step, self.call)
        # Stored, as torch.compile guards a string, but may make `random_bits` symbolic.
        object.__setattr__(self, "_text", f"stochastic{self.random_bits}")

    def stream(self, role: str, name: str) -> Stochastic:
        """The same rule with the noise of one tensor in one role: see `swalp.noise.stream_seed`.

        Raises:
            ValueError: there is no seed to derive from.
        """
        if self.seed is None:
            raise ValueError(
                f"Stochastic(): no seed to derive the stream of {role} {name!r} from; "
                f"give one: Stochastic(seed)"
            )
        return replace(self, seed=stream_seed(self.seed, role, name))

    def seeded(self, seed: int) -> Stochastic:
        """The same rule with another seed."""
        return replace(self, seed=seed)

    def at(self, step: int, call: int = 0) -> Stochastic:
        """The same rule at another step."""
        # As `replace`, in a fraction of its time: every layer needs it in every pass.
        if not (type(step) is type(call) is int and 0 <= step < 1 << 32 and 0 <= call < 1 << 32):
            _require_counters(step, call)
        moved = object.__new__(Stochastic)
        set_field = object.__setattr__
        set_field(moved, "seed", self.seed)
        set_field(moved, "random_bits", self.random_bits)
        set_field(moved, "step", step)
        set_field(moved, "call", call)
        set_field(moved, "_text", self._text)
        return moved

    def __str__(self) -> str:
        return self._text


def _require_counters(step: int, call: int) -> None:
    require_int("Stochastic", "step", step, 0, 2**32 - 1, "it is a 32-bit counter")
    require_int("Stochastic", "call", call, 0, 2**32 - 1, "it is a 32-bit counter")


Rounding = Nearest | TowardZero | TowardPositive | TowardNegative | Stochastic

DETERMINISTIC: dict[str, Rounding] = {
    str(rule): rule for rule in (Nearest(), TowardZero(), TowardPositive(), TowardNegative())
}
