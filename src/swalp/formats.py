"""Which numbers exist: the formats, as frozen values.

Every format is, for each element, a set of values ``sign * integer * 2**gap_exponent``.
`FixedPoint` has one gap for all; `BlockFloat` and `Microscaling` find it from the largest magnitude
of a block; `Minifloat` from the magnitude of the element itself; `Binary` has two values, no zero.

A format knows:

* `largest`, `smallest`: the extreme positive magnitudes it can hold at all;
* `gap`: the distance between neighbours in [1, 2), for a block format in a block whose largest
  magnitude lies there;
* `bits`: bits of an element's code, without its share of a shared exponent; `num_codes` = 2**bits;
* `values()`: all its finite values, ascending (of a block format: in a block whose largest
  magnitude lies in [1, 2)), for words of up to 24 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from swalp._validation import require_bool, require_int

Specials = Literal["ieee", "fn", "fnuz", "finite"]

# float64 carries 53 significant bits: the widest carrier there is.
_MAX_SIGNIFICAND = 53
_SMALLEST_EXPONENT = -1074  # of a float64: of the lowest subnormal
_MAX_LISTED_BITS = 24  # 2**24 values are 128 MiB

# Systematic spelling -> short name. (1,5,2) of "Training DNNs with 8-bit floating point" (Wang et
# al. 2018) is e5m2, and its (1,6,9) accumulator format e6m9.
_SHORT = {
    "binary.0": "binary",
    "fixed2.0s": "ternary",
    "e5m10": "fp16",
    "e8m7": "bf16",
    "e3m2finite": "e3m2",
    "e2m3finite": "e2m3",
    "e2m1finite": "e2m1",
    "e3m0finite": "e3m0",
    "ue8m0fn-nosub": "e8m0",
    "mx_e5m2": "mxfp8_e5m2",
    "mx_e4m3fn": "mxfp8_e4m3",
    "mx_e3m2": "mxfp6_e3m2",
    "mx_e2m3": "mxfp6_e2m3",
    "mx_e2m1": "mxfp4_e2m1",
    "mx_fixed8.6s": "mxint8",
}


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """Fixed point: integers of `word_length` bits, `frac_bits` of them behind the binary point.

    The gap is 2**-frac_bits. Integers reach from -2**(W-1) (two's complement) or, if `symmetric`,
    from -(2**(W-1)-1), to 2**(W-1)-1. `frac_bits` may be negative or exceed the word length.
    ``FixedPoint(2, 0, symmetric=True)`` is the ternary format {-1, 0, 1}.

    Source: Yang et al. 2019 (arXiv:1904.11943), section 3.1.
    """

    word_length: int
    frac_bits: int
    symmetric: bool = field(default=False, kw_only=True)
    _text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_int(
            "FixedPoint", "word_length", self.word_length, 2, _MAX_SIGNIFICAND,
            "values are carried in at most float64 (53 significant bits)",
        )  # fmt: skip
        require_int(
            "FixedPoint", "frac_bits", self.frac_bits, -900, 900,
            "the gap 2**-frac_bits must be an ordinary float64",
        )  # fmt: skip
        require_bool("FixedPoint", "symmetric", self.symmetric)
        _name(self, f"fixed{self.word_length}.{self.frac_bits}{'s' if self.symmetric else ''}")

    @property
    def max_integer(self) -> int:
        """Largest code: 2**(W-1) - 1."""
        return (1 << (self.word_length - 1)) - 1

    @property
    def min_integer(self) -> int:
        """Lowest code: -2**(W-1), or -(2**(W-1) - 1) if `symmetric`."""
        return -self.max_integer - (not self.symmetric)

    @property
    def gap(self) -> float:
        """2**-frac_bits, everywhere."""
        return math.ldexp(1.0, -self.frac_bits)

    @property
    def largest(self) -> float:
        """Largest magnitude; the most negative value where that reaches further."""
        return -self.min_integer * self.gap

    @property
    def smallest(self) -> float:
        """Smallest positive magnitude: the gap."""
        return self.gap

    @property
    def bits(self) -> int:
        """Bits of a code: the word length."""
        return self.word_length

    @property
    def num_codes(self) -> int:
        """2**bits; a symmetric format leaves one code unused."""
        return 1 << self.bits

    @property
    def significand_bits(self) -> int:
        """Significant bits that a carrier needs to hold every value."""
        return self.word_length - 1

    def values(self) -> Tensor:
        """All values, ascending, float64."""
        _check_listable(self)
        integers = torch.arange(
            self.min_integer, self.max_integer + 1, dtype=torch.float64, device="cpu"
        )
        return integers * self.gap

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True, slots=True)
class BlockFloat:
    """Block floating point: `word_length`-bit integers that share a power of two.

    A block has the exponent E = floor(log2(largest finite magnitude)), clipped to the
    `exponent_bits`-bit two's-complement field [-2**(F-1), 2**(F-1)-1], and the gap 2**(E-W+2).
    Integers reach to ±(2**(W-1)-1); with ``symmetric=False`` down to -2**(W-1), as in the paper.

    Blocks:

    * default: one exponent for the tensor ("big-block");
    * ``axes=(0,)``: one exponent per index of those axes ("small-block"); all other axes share;
    * ``tile=32``: one per 32 neighbours along the last axis; ``tile=(16, 16)``: one per tile of the
      last two axes. With a tile, `axes` names the axes the tile runs along instead of the last
      ones, and every index of the remaining axes has blocks of its own.

    Source: Yang et al. 2019 (arXiv:1904.11943), section 3.1; the gap as the published code has it.
    """

    word_length: int
    axes: tuple[int, ...] | None = field(default=None, kw_only=True)
    tile: int | tuple[int, ...] | None = field(default=None, kw_only=True)  # kept as a tuple
    exponent_bits: int = field(default=8, kw_only=True)
    symmetric: bool = field(default=True, kw_only=True)
    _text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_int(
            "BlockFloat", "word_length", self.word_length, 2, _MAX_SIGNIFICAND,
            "values are carried in at most float64 (53 significant bits)",
        )  # fmt: skip
        require_int(
            "BlockFloat", "exponent_bits", self.exponent_bits, 2, 11,
            "8 bits are float32's, 11 float64's",
        )  # fmt: skip
        require_bool("BlockFloat", "symmetric", self.symmetric)
        if self.axes is not None:
            object.__setattr__(self, "axes", _axes("BlockFloat", self.axes))
        if self.tile is not None:
            tile = _tile("BlockFloat", self.tile)
            object.__setattr__(self, "tile", tile)
            if self.axes is not None and len(self.axes) != len(tile):
                raise ValueError(
                    f"BlockFloat: tile={tile} runs along {len(tile)} axes, but axes={self.axes} "
                    f"names {len(self.axes)}; give one axis for each extent of the tile"
                )
        exponent = "" if self.exponent_bits == 8 else f"e{self.exponent_bits}"
        clamp = "" if self.symmetric else "t"
        _name(self, f"bfp{self.word_length}{exponent}{clamp}{_layout(self.axes, self.tile)}")

    @property
    def max_integer(self) -> int:
        """Largest code: 2**(W-1) - 1."""
        return (1 << (self.word_length - 1)) - 1

    @property
    def min_integer(self) -> int:
        """Lowest code: -(2**(W-1) - 1), or -2**(W-1) unless `symmetric`."""
        return -self.max_integer - (not self.symmetric)

    @property
    def min_exponent(self) -> int:
        """Lowest shared exponent: -2**(F-1)."""
        return -(1 << (self.exponent_bits - 1))

    @property
    def max_exponent(self) -> int:
        """Highest shared exponent: 2**(F-1) - 1."""
        return (1 << (self.exponent_bits - 1)) - 1

    def gap_exponent(self, shared_exponent: int) -> int:
        """log2 of the gap in a block with that exponent: E - W + 2."""
        return shared_exponent - self.word_length + 2

    @property
    def gap(self) -> float:
        """The gap of a block whose largest magnitude lies in [1, 2): 2**(2-W)."""
        return math.ldexp(1.0, self.gap_exponent(0))

    @property
    def largest(self) -> float:
        """Largest magnitude, at the highest exponent (inf where float64 cannot hold it)."""
        return _ldexp(-self.min_integer, self.gap_exponent(self.max_exponent))

    @property
    def smallest(self) -> float:
        """Smallest positive magnitude, at the lowest exponent (0 where float64 cannot hold it)."""
        return _ldexp(1, self.gap_exponent(self.min_exponent))

    @property
    def bits(self) -> int:
        """Bits of an element's code; the shared exponent adds `exponent_bits` per block."""
        return self.word_length

    @property
    def num_codes(self) -> int:
        """2**bits; a symmetric format leaves one code unused."""
        return 1 << self.bits

    @property
    def significand_bits(self) -> int:
        """Significant bits that a carrier needs to hold every value."""
        return self.word_length - 1

    def values(self) -> Tensor:
        """All values of a block with exponent 0, ascending, float64."""
        _check_listable(self)
        integers = torch.arange(
            self.min_integer, self.max_integer + 1, dtype=torch.float64, device="cpu"
        )
        return integers * self.gap

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True, slots=True)
class Minifloat:
    """Floating point with a few bits: sign, `exponent_bits`, `mantissa_bits` (stored ones).

    Args:
        exponent_bits: width of the exponent field.
        mantissa_bits: stored bits, without the hidden one; 0 gives the powers of two (and zero):
            the logarithmic format.
        bias: exponent of field value e is e - bias; default 2**(exponent_bits-1) - 1, for "fnuz"
            2**(exponent_bits-1).
        subnormals: False: exponent field 0 holds zero alone, so that nothing lies between zero and
            the smallest normal value; without mantissa bits it holds 2**-bias, and there is no
            zero.
        specials: which codes are no numbers. "ieee": the top exponent field holds infinity and NaN;
            "fn": only the code of all ones is NaN; "fnuz": only that of -0; "finite": none.
        saturating: True: what exceeds the largest value, infinity included, becomes the largest.
            False: it becomes infinity (ieee) or NaN (fn, fnuz); not to be had with "finite".
        signed: False: no sign bit; negative inputs become NaN.

    Source: IEEE 754-2019; OCP OFP8 1.0 (E4M3, E5M2) and OCP MX 1.0 (E2M1, E3M2, E2M3, E8M0).
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int | None = field(default=None, kw_only=True)
    subnormals: bool = field(default=True, kw_only=True)
    specials: Specials = field(default="ieee", kw_only=True)
    saturating: bool = field(default=True, kw_only=True)
    signed: bool = field(default=True, kw_only=True)
    _text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_int("Minifloat", "exponent_bits", self.exponent_bits, 1, 11, "float64 has 11")
        require_int("Minifloat", "mantissa_bits", self.mantissa_bits, 0, 52, "float64 has 52")
        if self.specials not in ("ieee", "fn", "fnuz", "finite"):
            raise ValueError(
                f"Minifloat: specials={self.specials!r} must be 'ieee', 'fn', 'fnuz' or 'finite'"
            )
        for name in ("subnormals", "saturating", "signed"):
            require_bool("Minifloat", name, getattr(self, name))
        if self.bias is None:
            object.__setattr__(self, "bias", self._standard_bias)
        require_int(
            "Minifloat", "bias", self.bias, -900, 1100, "the values must be ordinary float64"
        )
        if not self.saturating and self.specials == "finite":
            raise ValueError(
                "Minifloat: specials='finite' has neither infinity nor NaN to overflow into; "
                "use saturating=True"
            )
        if self.specials == "fnuz" and not (self.signed and self.has_zero):
            raise ValueError(
                "Minifloat: specials='fnuz' puts NaN in the place of -0; it needs a sign and a zero"
            )
        if self._top_field < (1 if self.has_zero else 0):
            raise ValueError(
                f"Minifloat: specials={self.specials!r} takes the only exponent field for normal "
                f"numbers that {self.exponent_bits} exponent bit(s) have; give it more, or use "
                f"specials='finite'"
            )
        if self.max_exponent > 1023 or self._smallest_exponent < _SMALLEST_EXPONENT:
            raise ValueError(
                f"Minifloat: with bias={self.bias} the magnitudes reach from "
                f"2**{self._smallest_exponent} to 2**{self.max_exponent}, but float64 from "
                f"2**-1074 to 2**1023: use another bias or fewer exponent bits"
            )
        kind = f"{'' if self.signed else 'u'}e{self.exponent_bits}m{self.mantissa_bits}"
        # "e3m2" alone is the short name of another one than the IEEE format of these widths.
        specials = "" if self.specials == "ieee" and kind not in _SHORT.values() else self.specials
        bias = "" if self.bias == self._standard_bias else f"b{self.bias}"
        flags = ("" if self.subnormals else "-nosub") + ("" if self.saturating else "-inf")
        _name(self, f"{kind}{specials}{bias}{flags}")

    @property
    def has_zero(self) -> bool:
        """Whether zero is a value: all but exponent-only formats without subnormals (E8M0)."""
        return self.subnormals or self.mantissa_bits > 0

    @property
    def _bias(self) -> int:
        assert self.bias is not None  # resolved at birth
        return self.bias

    @property
    def _standard_bias(self) -> int:
        # Without infinities and with one NaN, the fnuz formats shift their range down by a binade.
        return (1 << (self.exponent_bits - 1)) - (self.specials != "fnuz")

    @property
    def _top_field(self) -> int:
        """Highest exponent field that holds a number."""
        top = (1 << self.exponent_bits) - 1
        all_ones_alone = self.specials == "fn" and self.mantissa_bits == 0
        return top - (self.specials == "ieee" or all_ones_alone)

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return (1 if self.has_zero else 0) - self._bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest value."""
        return self._top_field - self._bias

    @property
    def _smallest_exponent(self) -> int:
        return self.min_exponent - (self.mantissa_bits if self.subnormals else 0)

    @property
    def gap(self) -> float:
        """Distance between normal numbers in [1, 2): 2**-mantissa_bits; in 2**k times that range,
        2**k times as much.
        """
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def largest(self) -> float:
        """Largest finite value."""
        top = (2 << self.mantissa_bits) - 1
        if self.specials == "fn" and self.mantissa_bits > 0:
            top -= 1  # all ones is NaN
        return math.ldexp(top, self.max_exponent - self.mantissa_bits)

    @property
    def smallest(self) -> float:
        """Smallest positive value: the lowest subnormal, or the lowest normal without them."""
        return math.ldexp(1.0, self._smallest_exponent)

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa bits."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def num_codes(self) -> int:
        """2**bits, NaNs, infinities and the second zero included."""
        return 1 << self.bits

    @property
    def significand_bits(self) -> int:
        """Significant bits that a carrier needs to hold every value."""
        return self.mantissa_bits + 1

    def values(self) -> Tensor:
        """All finite values, ascending, float64; zero once."""
        _check_listable(self)
        hidden = 1 << self.mantissa_bits
        positive = [
            math.ldexp(integer, exponent - self.mantissa_bits)
            for exponent in range(self.min_exponent, self.max_exponent + 1)
            for integer in range(hidden, 2 * hidden)
        ]
        if self.subnormals:
            lowest = self.min_exponent - self.mantissa_bits
            positive = [math.ldexp(integer, lowest) for integer in range(1, hidden)] + positive
        positive = [value for value in positive if value <= self.largest]
        negative = [-value for value in reversed(positive)] if self.signed else []
        zero = [0.0] if self.has_zero else []
        return torch.tensor(negative + zero + positive, dtype=torch.float64, device="cpu")

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True, slots=True)
class Microscaling:
    """OCP microscaling (MX): elements of `element` times a power of two shared by `tile` of them.

    The scale is 2**(floor(log2(largest finite magnitude)) - floor(log2(largest element))), clipped
    to the E8M0 range [2**-127, 2**127]. The tile runs along `axis`, the last one by default.

    Source: OCP Microscaling Formats (MX) 1.0, sections 5 and 6.3.
    """

    element: Minifloat | FixedPoint
    tile: int = field(default=32, kw_only=True)
    axis: int = field(default=-1, kw_only=True)
    _text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.element, Minifloat | FixedPoint):
            raise TypeError(
                f"Microscaling: element must be a Minifloat or a FixedPoint, not {self.element!r}"
            )
        if isinstance(self.element, Minifloat) and not (
            self.element.saturating and self.element.signed and self.element.has_zero
        ):
            raise ValueError(
                f"Microscaling: element {self.element} must be signed, saturating and have a zero"
            )
        require_int("Microscaling", "tile", self.tile, 1, 1 << 30, "the OCP formats use 32")
        require_int("Microscaling", "axis", self.axis, -64, 63, "the OCP formats use the last, -1")
        axis = "" if self.axis == -1 else f"[{self.axis}]"
        _name(self, f"mx_{self.element}", axis + ("" if self.tile == 32 else f"/{self.tile}"))

    @property
    def element_exponent(self) -> int:
        """floor(log2(largest positive element))."""
        if isinstance(self.element, FixedPoint):
            return self.element.word_length - 2 - self.element.frac_bits
        return self.element.max_exponent

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest scale, E8M0's."""
        return -127

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest scale, E8M0's."""
        return 127

    @property
    def gap(self) -> float:
        """Distance between neighbours in [1, 2) in a block whose largest magnitude lies there."""
        return self.element.gap * math.ldexp(
            1.0, -self.element_exponent if isinstance(self.element, FixedPoint) else 0
        )

    @property
    def largest(self) -> float:
        """Largest magnitude, at the largest scale (may exceed what float32 holds)."""
        return _ldexp(self.element.largest, self.max_exponent)

    @property
    def smallest(self) -> float:
        """Smallest positive magnitude, at the smallest scale."""
        return _ldexp(self.element.smallest, self.min_exponent)

    @property
    def bits(self) -> int:
        """Bits of an element's code; the scale adds 8 per tile."""
        return self.element.bits

    @property
    def num_codes(self) -> int:
        """Codes of an element."""
        return self.element.num_codes

    @property
    def significand_bits(self) -> int:
        """Significant bits that a carrier needs to hold every value."""
        return self.element.significand_bits

    def values(self) -> Tensor:
        """All values of a block whose largest magnitude lies in [1, 2), ascending, float64."""
        return self.element.values() * math.ldexp(1.0, -self.element_exponent)

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True, slots=True)
class Binary:
    """Two values, -2**-frac_bits and +2**-frac_bits, and no zero.

    Nearest is the sign, that of zero being positive; stochastic rounding gives the positive value
    with probability clip((x/scale + 1)/2, 0, 1).

    Source: Courbariaux et al. 2015 (BinaryConnect), hard sigmoid binarization.
    """

    frac_bits: int = 0
    _text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_int(
            "Binary", "frac_bits", self.frac_bits, -900, 900,
            "the magnitude 2**-frac_bits must be an ordinary float64",
        )  # fmt: skip
        _name(self, f"binary.{self.frac_bits}")

    @property
    def largest(self) -> float:
        """The one magnitude, 2**-frac_bits."""
        return math.ldexp(1.0, -self.frac_bits)

    @property
    def smallest(self) -> float:
        """The one magnitude, 2**-frac_bits."""
        return self.largest

    @property
    def gap(self) -> float:
        """Distance between the two values."""
        return 2 * self.largest

    @property
    def bits(self) -> int:
        """One."""
        return 1

    @property
    def num_codes(self) -> int:
        """Two."""
        return 2

    @property
    def significand_bits(self) -> int:
        """One."""
        return 1

    def values(self) -> Tensor:
        """Both values, ascending, float64."""
        return torch.tensor([-self.largest, self.largest], dtype=torch.float64, device="cpu")

    def __str__(self) -> str:
        return self._text


Format = FixedPoint | BlockFloat | Minifloat | Microscaling | Binary


def _name(fmt: Format, spelling: str, suffix: str = "") -> None:
    """Store what `fmt` prints as, at birth: torch.compile can guard a string, not a spelling."""
    object.__setattr__(fmt, "_text", _SHORT.get(spelling, spelling) + suffix)


def _check_listable(fmt: Format) -> None:
    if fmt.bits > _MAX_LISTED_BITS:
        raise ValueError(
            f"{fmt} has 2**{fmt.bits} codes; values() lists those of up to {_MAX_LISTED_BITS} bits"
        )


def _ldexp(integer: float, exponent: int) -> float:
    try:
        return math.ldexp(integer, exponent)
    except OverflowError:
        return math.inf


def _layout(axes: tuple[int, ...] | None, tile: int | tuple[int, ...] | None) -> str:
    text = "" if axes is None else f"[{','.join(map(str, axes))}]"
    if isinstance(tile, tuple):
        text += f"/{'x'.join(map(str, tile))}"
    return text


def _axes(owner: str, axes: object) -> tuple[int, ...]:
    if not isinstance(axes, tuple | list) or not axes:
        raise TypeError(f"{owner}: axes={axes!r} must be a non-empty tuple of ints such as (0,)")
    for axis in axes:
        require_int(owner, "axes", axis, -64, 63, "name dimensions of the tensor, e.g. (0,)")
    if len(set(axes)) != len(axes):
        raise ValueError(f"{owner}: axes={tuple(axes)} names an axis twice; name each once")
    return tuple(axes)


def _tile(owner: str, tile: object) -> tuple[int, ...]:
    extents = (tile,) if isinstance(tile, int) else tile
    if not isinstance(extents, tuple | list) or not extents:
        raise TypeError(f"{owner}: tile={tile!r} must be an int or a tuple of ints, e.g. 32")
    for extent in extents:
        require_int(owner, "tile", extent, 1, 1 << 30, "give the elements along each tiled axis")
    return tuple(extents)


NAMED: dict[str, Format] = {
    "binary": Binary(),
    "ternary": FixedPoint(2, 0, symmetric=True),
    "fp16": Minifloat(5, 10),
    "bf16": Minifloat(8, 7),
    "e6m9": Minifloat(6, 9),
    "e5m2": Minifloat(5, 2),
    "e4m3fn": Minifloat(4, 3, specials="fn"),
    "e3m2": Minifloat(3, 2, specials="finite"),
    "e2m3": Minifloat(2, 3, specials="finite"),
    "e2m1": Minifloat(2, 1, specials="finite"),
    "e3m0": Minifloat(3, 0, specials="finite"),
    "e8m0": Minifloat(8, 0, subnormals=False, specials="fn", signed=False),
    "mxfp8_e5m2": Microscaling(Minifloat(5, 2)),
    "mxfp8_e4m3": Microscaling(Minifloat(4, 3, specials="fn")),
    "mxfp6_e3m2": Microscaling(Minifloat(3, 2, specials="finite")),
    "mxfp6_e2m3": Microscaling(Minifloat(2, 3, specials="finite")),
    "mxfp4_e2m1": Microscaling(Minifloat(2, 1, specials="finite")),
    "mxint8": Microscaling(FixedPoint(8, 6, symmetric=True)),
}
