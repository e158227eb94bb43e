"""The settings of a run: a frozen value, checked at birth, from presets, files and words."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from swalp import Nearest, parse_format, recipes
from swalp.quantize.api import check_carrier
from swalp.recipe import ROLES
from swalp.recipe_text import settings_of
from swalp.recipes import Quantizer, Recipe
from swalp.training import averages, kept_recipes
from swalp.training.mistakes import UserError

FLOAT = "float"  # the arm without a recipe
FLOAT32_MAX = 3.4028234663852886e38


class RunConfig(BaseModel):
    """One run: every arm trained from every seed, with the same settings.

    Recipe files are read once, when the value is made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    data: Literal["digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imagenet"] = Field(
        description="the data set"
    )
    model: Literal[
        "cnn",
        "strided-cnn",
        "mlp",
        "small-vgg",
        "vgg16",
        "vgg16-bn",
        "preresnet164",
        "resnet20",
        "resnet18",
    ] = Field(
        description="small: two convolutions with pooling, two of stride 2, three linear layers, "
        "or three convolutions; or a published network, of which resnet18 is for large images"
    )
    width: int = Field(
        ge=1, le=4096, description="channels of the first convolution, or hidden units"
    )
    augment: bool = Field(
        default=False,
        description="crop training images at random, up to 4 pixels off (ImageNet: to 8 to 100 % "
        "of the area), and flip half of them",
    )
    arms: tuple[str, ...] = Field(
        strict=False,
        min_length=1,
        description='precisions to train in, side by side: "float", or a recipe, by name or as a '
        "file ending in .toml",
    )
    seeds: int = Field(ge=1, le=1000, description="how many seeds each arm is trained from")
    first_seed: int = Field(ge=0, lt=2**32, description="the first seed; the others follow it")
    batch_size: int = Field(ge=2, le=2**20, description="examples in a step")
    epochs: int = Field(ge=2, le=10**6, description="passes over the training data")
    averaging_start: int = Field(
        ge=1, description="epochs before averaging starts; less than epochs"
    )
    average_every: Annotated[int, Field(ge=1)] | Literal["epoch"] = Field(
        description='steps between two iterates that are averaged, or "epoch": one an epoch'
    )
    averages: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="further averages of the same training, each a row of the table: "
        + averages.FORM,
    )
    export_format: str = Field(
        default="bfp8[0]",
        description="format of the quantized average in the table, and of the exported model",
    )
    validation_examples: int = Field(
        default=0,
        ge=0,
        description="last training examples held out to choose the best average; 0: none is chosen",
    )
    learning_rate: float = Field(
        gt=0,
        le=FLOAT32_MAX,
        description="at first: constant for half of averaging_start, then falling to a hundredth",
    )
    averaging_rate: float = Field(
        gt=0, le=FLOAT32_MAX, description="the learning rate while averaging"
    )
    momentum: float = Field(ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(ge=0, le=FLOAT32_MAX, description="L2 penalty")
    threads: int = Field(
        ge=1, le=1024, description="of PyTorch; the last bits of a result may depend on them"
    )
    checkpoint_seconds: float = Field(
        ge=0, description="seconds between two checkpoints; no result depends on it"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="how many of the last checkpoints stay; two survive a bad disk"
    )

    _file_recipes: dict[str, Recipe] = PrivateAttr(default_factory=dict)

    @property
    def file_recipes(self) -> dict[str, Recipe]:
        """The recipes of those arms that are files, by arm."""
        return dict(self._file_recipes)

    def recipe(self, arm: str) -> Recipe | None:
        """The recipe of an arm; None: it trains in float."""
        if arm == FLOAT:
            return None
        return self._file_recipes.get(arm) or recipes.named(arm, "arms")

    def average_steps(self, per_epoch: int) -> int:
        """`average_every` in steps, of which an epoch has `per_epoch`."""
        return per_epoch if self.average_every == "epoch" else self.average_every

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, arms: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for arm in arms:
            if arm != FLOAT and arm not in (info.context or {}):
                try:
                    recipes.named(arm, "arms")
                except OSError as error:
                    raise ValueError(f"{arm}: cannot read the recipe: {error.strerror}") from None
        if len(set(arms)) < len(arms):
            raise ValueError("each arm may be named once")
        return arms

    @field_validator("averages")
    @classmethod
    def _readable_averages(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        found = tuple(averages.parse(text).text for text in texts)
        if len(set(found)) < len(found):
            raise ValueError("each average may be named once")
        return found

    @field_validator("export_format")
    @classmethod
    def _short_format(cls, text: str) -> str:
        return weight_format(text)

    @model_validator(mode="after")
    def _reads_recipes(self, info: ValidationInfo) -> RunConfig:
        kept: Mapping[str, Recipe] = info.context or {}
        self._file_recipes = {
            arm: kept[arm] if arm in kept else recipes.load(arm)
            for arm in self.arms
            if arm.endswith(".toml")
        }
        return self

    @model_validator(mode="after")
    def _rounds_float32(self) -> RunConfig:
        for arm in self.arms:
            recipe = self.recipe(arm)
            if recipe is None:
                continue
            settings = [(role, getattr(recipe, role)) for role in ROLES]
            settings += [each for override in recipe.overrides for each in override.changes()]
            for role, quantizer in settings:
                if not isinstance(quantizer, Quantizer):
                    continue
                try:
                    check_carrier(quantizer.format, torch.float32)
                except ValueError as error:
                    raise ValueError(f"{arm}: {role}: {error}") from None
        return self

    @model_validator(mode="after")
    def _augments_what_may_be_flipped(self) -> RunConfig:
        if self.augment and self.data in ("digits", "mnist"):
            raise ValueError(
                f"augment = true flips images, and the digits of data = {self.data!r} are others "
                f"or none when flipped; set augment = false"
            )
        return self

    @model_validator(mode="after")
    def _averages_something(self) -> RunConfig:
        if self.averaging_start >= self.epochs:
            raise ValueError(
                f"averaging_start = {self.averaging_start} must be less than "
                f"epochs = {self.epochs}, or nothing is averaged"
            )
        for text in self.averages:
            averages.parse(text).check({arm: self.recipe(arm) for arm in self.arms}, self.epochs)
        return self


def weight_format(text: str) -> str:
    """A format in its usual spelling.

    Raises:
        ValueError: there is none of that name, or float32 weights cannot be exported in it.
    """
    fmt = parse_format(text)
    if fmt.bits > 16:
        raise ValueError(f"{fmt} has {fmt.bits} bits; an exported weight has at most 16")
    check_carrier(fmt, torch.float32)
    Recipe(name="export", weight=Quantizer(fmt, Nearest()))
    return str(fmt)


def preset_names() -> list[str]:
    """The names of the presets."""
    names = (entry.name for entry in _presets().iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load(source: str, changes: Sequence[str] = ()) -> RunConfig:
    """The settings that a preset or a file describes, after some changes.

    Args:
        source: a preset's name, or the path of a TOML file. A file has all keys of `RunConfig`, or
            those that differ from a preset that it names: ``preset = "digits"``. Beside the
            config.toml of a run, the recipes that the run keeps stand for the files of its arms.
        changes: each ``key=value``, the value as in TOML; text needs no quotes.

    Whoever changes `epochs` of a preset or file, and not `averaging_start`, moves that in
    proportion, and with it the whole schedule of the learning rate.

    Raises:
        UserError: no such preset, file or key, malformed TOML, or a value out of range.
    """
    kept: Mapping[str, Recipe] = {}
    if source.endswith(".toml") or "/" in source or "\\" in source:
        path = Path(source)
        try:
            settings = parse(path.read_bytes(), source)
        except OSError as error:
            raise UserError(f"{source}: cannot read the settings: {error.strerror}") from None
        if path.name == "config.toml":
            kept = kept_recipes.load(path.parent)
        base = settings.pop("preset", None)
        if base is not None:
            settings = _changed(_preset(str(base), source), settings)
    else:
        settings = _preset(source, None)
    return validated(_changed(settings, dict(map(_split, changes))), source, kept)


def parse(content: bytes, source: str) -> dict[str, Any]:
    """The TOML in `content`; `source` says in errors where it came from."""
    try:
        return settings_of(content, source)
    except ValueError as error:
        raise UserError(_one_line(str(error))) from None


def validated(
    settings: Mapping[str, Any], source: str, kept: Mapping[str, Recipe] | None = None
) -> RunConfig:
    """`settings` as a `RunConfig`.

    Args:
        settings: by key.
        source: says in errors where they came from.
        kept: recipes by arm; the files of other arms are read.

    Raises:
        UserError: a value is out of range, or a key unknown or missing.
    """
    try:
        return RunConfig.model_validate(dict(settings), context=kept)
    except ValidationError as error:
        first, *others = error.errors()
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(f"{source}: {_explained(first)}{more}") from None


def to_toml(config: RunConfig) -> str:
    """The settings as TOML, each with its description: what `load` reads back equal."""
    lines = []
    for key, field in RunConfig.model_fields.items():
        # JSON writes text, lists, integers and finite floats the way TOML reads them.
        value = json.dumps(getattr(config, key), ensure_ascii=False)
        lines += [f"# {field.description}", f"{key} = {value}"]
    return "\n".join(lines) + "\n"


def decisive(config: RunConfig) -> dict[str, Any]:
    """The settings that results depend on, by key, as JSON reads them."""
    return config.model_dump(mode="json", exclude={"checkpoint_seconds", "keep_checkpoints"})


def _presets() -> Any:
    return files("swalp.training") / "presets"


def _preset(name: str, source: str | None) -> dict[str, Any]:
    names = preset_names()
    if name not in names:
        where = f"{source}: " if source else ""
        raise UserError(
            f"{where}unknown preset {name!r}; {_nearest(name, names)}presets: {', '.join(names)}; "
            f"the path of a file ends in .toml"
        )
    return parse((_presets() / f"{name}.toml").read_bytes(), f"preset {name}")


def _changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `changes`; if these give epochs alone, averaging starts in proportion."""
    result = settings | changes
    if "epochs" in changes and "averaging_start" not in changes:
        old, new = settings.get("epochs"), changes["epochs"]
        start = settings.get("averaging_start")
        # What is no number, or missing, gets its message when the settings are validated.
        if type(old) is int and type(new) is int and type(start) is int and old > 0:
            result["averaging_start"] = max(1, min(round(start * new / old), new - 1))
    return result


def _split(change: str) -> tuple[str, Any]:
    key, equals, text = change.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key:
        raise UserError(f"--set {change!r}: give key=value, such as --set epochs=20")
    _require_key(key, "--set")
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return key, text
    except (ValueError, RecursionError) as error:
        raise UserError(f"--set {key}: {_one_line(str(error))}") from None
    if len(found) > 1:
        raise UserError(f"--set {change!r}: more than one setting; give each its own --set")
    return key, found["value"]


def _require_key(key: str, source: str) -> None:
    keys = list(RunConfig.model_fields)
    if key not in keys:
        raise UserError(
            f"{source}: unknown key {key!r}; {_nearest(key, keys)}keys: {', '.join(keys)}"
        )


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""


def _explained(error: Any) -> str:
    """One line for one of pydantic's errors: the key, what was given, what is allowed."""
    key = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        keys = list(RunConfig.model_fields)
        return f"unknown key {key!r}; {_nearest(key, keys)}keys: {', '.join(keys)}"
    if error["type"] == "missing":
        return (
            f"the key {key!r} is missing; name a preset to take it from, preset = "
            f'"{preset_names()[0]}", or copy the config.toml of a run'
        )
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    message = re.sub("[Tt]uple", "list", message)  # TOML's word for it
    if not key:
        return message
    description = RunConfig.model_fields[key].description
    return f"{key} = {_shown(error['input'])}: {_one_line(message)} ({description})"


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(text: str) -> str:
    return " ".join(text.split())
