"""The report on a converted model: what each layer quantizes, what stayed float and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from swalp.convert import conversion
from swalp.formats import Format
from swalp.layers import Family, Kind, Native, Quantized, QuantizedFunctions, Site, kind_of
from swalp.packed import storage_bytes
from swalp.recipes import ROLES, Recipe, fit

_INCOMPLETE = (
    "Which products modules call as functions in their forward, attention say, is listed once the "
    "model has run."
)
_ALWAYS = ("weight", "activation", "error", "gradient", "momentum")


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One row of `summary`: a module of the tree.

    Attributes:
        name: in the model; "" for the model itself.
        kind: the name of its class.
        parameters: how many numbers its own parameters have, those of its children excepted.
        formats: for each role, the formats that it has here; None among them: float. Empty: the
            role concerns nothing here.
        bytes: that its own parameters and buffers take now, what it shares with a layer above
            excepted.
        note: what it quantizes where, what stays float, and why.
    """

    name: str
    kind: str
    parameters: int
    formats: dict[str, tuple[Format | None, ...]]
    bytes: int
    note: str

    def format(self, role: str) -> Format | None:
        """The format of a role here; None: float, or of no concern; of several, the first."""
        return next(iter(self.formats[role]), None)


@dataclass(frozen=True, slots=True)
class Summary:
    """What `convert` did: every module, in order, as a tree; `str` is the table.

    Attributes:
        recipe: its name.
        layers: the rows.
        parameters: numbers in all, each counted once.
        bytes: that parameters and buffers take now.
        float_bytes: that the parameters take in float32.
        packed_bytes: that they take as codes and exponents (``convert(packed=True)``).
        complete: whether the model has run, so that it is known which products its modules call as
            functions.
    """

    recipe: str
    layers: tuple[LayerSummary, ...]
    parameters: int
    bytes: int
    float_bytes: int
    packed_bytes: int
    complete: bool

    def __str__(self) -> str:
        roles = [
            role
            for role in ROLES
            if role in _ALWAYS or any(any(row.formats[role]) for row in self.layers)
        ]
        table = [("layer", "kind", *(role.replace("_", " ") for role in roles), "bytes", "")]
        for row in self.layers:
            depth = row.name.count(".") + 1 if row.name else 0
            table.append(
                (
                    "  " * depth + (row.name.rpartition(".")[2] or "(model)"),
                    row.kind,
                    *(_text(row.formats[role]) for role in roles),
                    f"{row.bytes:,}" if row.bytes else "",
                    row.note,
                )
            )
        right = len(roles) + 2  # numbers stand under one another
        widths = [max(len(line[i]) for line in table) for i in range(right + 2)]
        lines = [
            "  ".join(
                cell.rjust(width) if i == right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join(
            [
                f"recipe {self.recipe}",
                *lines,
                f"{self.parameters:,} parameters: {self.float_bytes:,} bytes in float32, "
                f"{self.packed_bytes:,} packed; with buffers, {self.bytes:,} held now.",
                *([] if self.complete else [_INCOMPLETE]),
            ]
        )


def summary(model: nn.Module) -> Summary:
    """What each layer of a converted model quantizes, what it left in float and why, and bytes.

    Rows of modules that compute products by themselves say which, once the model has run.

    Raises:
        ValueError: `model` is not what `convert` returned.
    """
    recipe = conversion(model).recipe
    seen: dict[Tensor, str] = {}
    rows = []
    packed_bytes = 0
    for name, module in model.named_modules():
        own = {key: value for key, value in module._parameters.items() if value is not None}
        fresh = {key: value for key, value in own.items() if value not in seen}
        here = [recipe.at(name, parameter=key) for key in own]
        for (key, value), at in zip(own.items(), here, strict=True):
            if key in fresh:
                stored = None if at.weight is None else fit(at.weight.format, value.shape)
                packed_bytes += storage_bytes(value.shape, stored)
        formats = {role: _formats(module, here, role) for role in ROLES}
        buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
        rows.append(
            LayerSummary(
                name,
                type(module).__name__,
                sum(value.numel() for value in fresh.values()),
                formats,
                sum(value.nbytes for value in [*fresh.values(), *buffers]),
                _note(module, [f"{key} of {seen[own[key]]}" for key in own.keys() - fresh]),
            )
        )
        seen |= dict.fromkeys(fresh.values(), name)
    return Summary(
        recipe.name,
        tuple(rows),
        sum(value.numel() for value in seen),
        sum(row.bytes for row in rows),
        sum(4 * value.numel() for value in seen),
        packed_bytes,
        all(
            module._swalp_layer.functions is not None
            for module in model.modules()
            if isinstance(module, QuantizedFunctions)
        ),
    )


def _formats(module: nn.Module, here: Sequence[Recipe], role: str) -> tuple[Format | None, ...]:
    """The formats of a role at a layer, each once."""
    if role not in ("activation", "error"):
        quantizers = [getattr(at, role) for at in here]
        return tuple(dict.fromkeys(None if q is None else q.format for q in quantizers))
    if _holds(module):
        return ()
    rules = [getattr(site, role) for site in _sites(module)]
    formats = tuple(dict.fromkeys(rule.format for rule in rules if rule is not None))
    return formats or (None,)


def _holds(module: nn.Module) -> bool:
    """Whether a module only holds others: it multiplies nothing, and changes nothing by itself."""
    family = kind_of(module).family
    leaf = next(module.children(), None) is None
    if isinstance(module, QuantizedFunctions) and family is Family.FUNCTIONS:
        return not leaf and not module._swalp_layer.functions
    return family is Family.INNER or (family is Family.OTHER and not leaf)


def _sites(module: nn.Module) -> list[Site]:
    """Where a layer quantizes; a module that multiplied nothing in its last pass does nowhere."""
    if not isinstance(module, Quantized):
        return []
    if isinstance(module, QuantizedFunctions) and module._swalp_layer.functions == {}:
        return []
    layer = module._swalp_layer
    return [site for site in (layer.input_site, layer.output_site) if site is not None]


def _note(module: nn.Module, shared: Sequence[str]) -> str:
    """What a row has to say: where the layer quantizes, or why it does not."""
    parts = [f"shares {what}" for what in shared]
    kind = kind_of(module)
    if isinstance(module, QuantizedFunctions) and kind.family is Family.FUNCTIONS:
        return "; ".join([*parts, *_functions(module)])
    if isinstance(module, Quantized) and module._swalp_layer.outer:
        parts.append("takes the network's input as it is")
    places = [_place(kind, site) for site in _sites(module)]
    if isinstance(module, Native):
        places.append("products on integers")
    elif isinstance(module, QuantizedFunctions) and module._swalp_layer.native:
        own = "" if getattr(module, "in_proj_weight", None) is not None else " but projections"
        places.append(f"products{own} on integers")
    elif isinstance(module, Quantized) and module._swalp_layer.simulated:
        places.append(f"products simulated: {module._swalp_layer.simulated}")
    if (not places and not parts and not _holds(module)) or kind.family is Family.INNER:
        places = [kind.family.value]
    return "; ".join([*parts, *places])


def _place(kind: Kind, site: Site) -> str:
    """Which tensors pass a site."""
    where = kind.operands or "input"
    if site.place == "output":
        where = "output"
    if site.activation is not None and site.error is not None:
        return f"at its {where}"
    return f"{'error' if site.activation is None else 'activation'} at its {where}"


def _functions(module: nn.Module) -> list[str]:
    """What is known of the products that a module calls as functions."""
    assert isinstance(module, Quantized)
    layer = module._swalp_layer
    functions = layer.functions
    if functions is None:
        return [] if _holds(module) else ["what its forward multiplies; it has not run yet"]
    called = ", ".join(
        name if count == 1 else f"{name} x {count}" for name, count in functions.items()
    )
    if not called:
        return [] if _holds(module) else [Family.OTHER.value]
    if not _sites(module):
        return [f"{called} {Family.FUNCTIONS.value}"]
    way = ["products of matrices on integers"] if layer.native else []
    way += [f"products simulated: {layer.simulated}"] if layer.simulated else []
    return [f"operands of {called}", *way]


def _text(formats: Iterable[Format | None]) -> str:
    return ", ".join("float" if fmt is None else str(fmt) for fmt in formats)
