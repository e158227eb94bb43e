"""A format from its short string: the inverse of ``str(fmt)``."""

from __future__ import annotations

import difflib
import re
from functools import lru_cache

from swalp.formats import (
    NAMED,
    Binary,
    BlockFloat,
    FixedPoint,
    Format,
    Microscaling,
    Minifloat,
)


def _pattern(text: str) -> re.Pattern[str]:
    """Of numbers that are written in ASCII and fit any machine's integers."""
    return re.compile(text.replace(r"\d+", "[0-9]{1,9}"))


_AXES = r"(?:\[(?P<axes>-?\d+(?:,-?\d+)*)\])?"
_FIXED = _pattern(r"fixed(?P<word>\d+)\.(?P<frac>-?\d+)(?P<symmetric>s?)")
_BLOCK = _pattern(
    r"bfp(?P<word>\d+)(?:e(?P<exponent>\d+))?(?P<twos>t?)" + _AXES + r"(?:/(?P<tile>\d+(?:x\d+)*))?"
)
_MINI = _pattern(
    r"(?P<unsigned>u?)e(?P<exponent>\d+)m(?P<mantissa>\d+)(?P<specials>ieee|fnuz|fn|finite)?"
    r"(?:b(?P<bias>-?\d+))?(?P<nosub>-nosub)?(?P<inf>-inf)?"
)
_MX = _pattern(
    r"(?:mx_(?P<element>[^\[/]+)|(?P<name>mx[a-z0-9]+(?:_e\dm\d)?))"
    r"(?:\[(?P<axis>-?\d+)\])?(?:/(?P<tile>\d+))?"
)
_BINARY = _pattern(r"binary\.(?P<frac>-?\d+)")

FORMS = "fixed8.6, bfp8, bfp8[0], bfp8/32, e4m3fn, e5m10, mxfp8_e4m3, ternary, binary"


def parse_format(text: str) -> Format:
    """The format that prints as `text`.

    Args:
        text: a name (``"e4m3fn"``, ``"mxfp8_e4m3"``, ``"ternary"`` …) or one of

            * ``fixed8.6`` word length and fractional bits; ``s`` at the end: symmetric;
            * ``bfp8`` word length; then, each optional, ``e5`` exponent bits, ``t`` two's
              complement, ``[0,1]`` axes, ``/32`` or ``/16x16`` tile;
            * ``e6m9`` exponent and mantissa bits; then ``ieee``, ``fn``, ``fnuz`` or ``finite``,
              ``b8`` bias, ``-nosub`` without subnormals, ``-inf`` overflowing; in front, ``u``
              unsigned;
            * ``mx_`` and an element format, or an MX name; then ``[axis]`` and ``/tile``.

    Raises:
        TypeError: not a string.
        ValueError: not a format; the text names the nearest ones.

    Example:
        >>> parse_format("bfp8[0]")
        BlockFloat(word_length=8, axes=(0,), tile=None, exponent_bits=8, symmetric=True)
    """
    if not isinstance(text, str):
        raise TypeError(f"parse_format: {text!r} must be a string such as 'bfp8', 'e4m3fn'")
    return _parse(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Format:
    if text in NAMED:
        return NAMED[text]
    if match := _FIXED.fullmatch(text):
        return FixedPoint(
            int(match["word"]), int(match["frac"]), symmetric=bool(match["symmetric"])
        )
    if match := _BLOCK.fullmatch(text):
        return BlockFloat(
            int(match["word"]),
            axes=_ints(match["axes"], ","),
            tile=_ints(match["tile"], "x"),
            exponent_bits=int(match["exponent"] or 8),
            symmetric=not match["twos"],
        )
    if match := _MINI.fullmatch(text):
        return Minifloat(
            int(match["exponent"]),
            int(match["mantissa"]),
            bias=None if match["bias"] is None else int(match["bias"]),
            subnormals=not match["nosub"],
            specials=match["specials"] or "ieee",  # type: ignore[arg-type]  # the pattern's choices
            saturating=not match["inf"],
            signed=not match["unsigned"],
        )
    if match := _BINARY.fullmatch(text):
        return Binary(int(match["frac"]))
    if match := _MX.fullmatch(text):
        named = NAMED.get(match["name"] or "")
        element = named.element if isinstance(named, Microscaling) else None
        if match["element"] and not match["element"].startswith("mx"):
            parsed = parse_format(match["element"])
            element = parsed if isinstance(parsed, Minifloat | FixedPoint) else None
        if element is not None:
            return Microscaling(
                element, tile=int(match["tile"] or 32), axis=int(match["axis"] or -1)
            )
    near = difflib.get_close_matches(text, [*NAMED, "bfp8", "fixed8.6"], n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"examples: {FORMS}"
    raise ValueError(f"unknown format {text!r}; {hint}")


def _ints(text: str | None, separator: str) -> tuple[int, ...] | None:
    return None if text is None else tuple(map(int, text.split(separator)))
