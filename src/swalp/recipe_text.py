"""A recipe as TOML and back: a line for each setting, formats and roundings in short form."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from swalp.format_text import parse_format
from swalp.recipe import KEEP, ROLES, Override, Quantizer, Recipe
from swalp.rounding import DETERMINISTIC, Rounding, Stochastic

OFF = "float"
_SETTINGS = ("name", *ROLES, "quantize_input", "placement", "product")
_OVERRIDE = tuple(field.name for field in fields(Override))


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every setting on a line: what `from_toml` reads back equal."""
    lines = [f"{key} = {_written(getattr(recipe, key))}" for key in _SETTINGS]
    for override in recipe.overrides:
        lines += ["", "[[overrides]]"]
        for field in fields(Override):
            value = getattr(override, field.name)
            if value is not KEEP and (value is None or value != field.default):
                lines.append(f"{field.name} = {_written(value)}")
    return "\n".join(lines) + "\n"


def settings_of(content: bytes, source: str) -> dict[str, Any]:
    """The keys of a recipe in TOML.

    Raises:
        ValueError: malformed; `source` says in the text where it came from.
    """
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # of integers without end, and nested ones
        raise ValueError(f"{source}: malformed TOML: {error}") from None


def from_settings(settings: Mapping[str, Any], base: Recipe, source: str) -> Recipe:
    """`base` with other settings, as `settings_of` gives them.

    Raises:
        ValueError: an unknown key, or a value that it cannot have; `source` begins the text.
    """
    known = [*_SETTINGS, "overrides"]
    given = {key: _read(key, value, known, source) for key, value in settings.items()}
    overrides = given.get("overrides", ())
    if not isinstance(overrides, list | tuple) or not all(
        isinstance(entry, Mapping) for entry in overrides
    ):
        raise ValueError(f"{source}: overrides must be tables, each headed [[overrides]]")
    try:
        if overrides:
            given["overrides"] = base.overrides + tuple(
                Override(**{k: _read(k, v, _OVERRIDE, source) for k, v in entry.items()})
                for entry in overrides
            )
        return replace(base, **given)
    except (TypeError, ValueError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(source) else f"{source}: {text}") from None


def _written(value: object) -> str:
    if value is None:
        return json.dumps(OFF)
    # JSON writes text and booleans the way TOML reads them,
    text = json.dumps(value if isinstance(value, bool) else str(value), ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")  # but for this one


def _read(key: str, value: Any, known: tuple[str, ...] | list[str], source: str) -> Any:
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{source}: unknown key {key!r}; {hint}keys: {', '.join(known)}")
    if key not in ROLES:
        return value
    if value == OFF:
        return None
    words = value.split() if isinstance(value, str) else []
    if len(words) != 2:
        raise ValueError(
            f"{source}: {key} = {json.dumps(value)}: give a format and a rounding, such as "
            f'"bfp8 stochastic16", or "{OFF}"'
        )
    try:
        return Quantizer(parse_format(words[0]), _rounding(words[1]))
    except ValueError as error:
        raise ValueError(f"{source}: {key} = {json.dumps(value)}: {error}") from None


def _rounding(text: str) -> Rounding:
    if text in DETERMINISTIC:
        return DETERMINISTIC[text]
    if match := re.fullmatch(r"stochastic([0-9]{1,9})", text):
        return Stochastic(random_bits=int(match[1]))
    raise ValueError(
        f"unknown rounding {text!r}; there are {', '.join(DETERMINISTIC)} and stochastic with its "
        f"random bits, such as stochastic16"
    )
