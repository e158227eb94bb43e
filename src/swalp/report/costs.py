"""The costs of a training step as tables: one for each arm, and one that compares them."""

from __future__ import annotations

from collections.abc import Sequence

from swalp.training.profile import BETWEEN, ArmCost, LayerCost

_HEADS = (
    "layer",
    "kind",
    "parameters",
    "saved",
    "forward",
    "backward",
    "optimizer",
    "share",
    "quantizing",
)


def render(costs: Sequence[ArmCost], *, layers: int, about: str) -> str:
    """All tables.

    Args:
        costs: of each arm; ratios are to the first.
        layers: rows, at most, of each arm's table: the slowest layers, in the network's order.
        about: what was measured, for the last line.
    """
    parts = [_of_arm(cost, layers) for cost in costs]
    return "\n\n".join([*parts, _comparison(costs), about])


def _of_arm(cost: ArmCost, most: int) -> str:
    chosen = sorted(cost.layers, key=_seconds, reverse=True)[:most]
    rest = [layer for layer in cost.layers if layer not in chosen]
    shown = [layer for layer in cost.layers if layer in chosen]
    if rest:
        name = f"({len(rest)} more)"
        shown.append(LayerCost(name, "", *(_sum(rest, column) for column in _COLUMNS)))
    total = LayerCost("all layers", "", *(_sum(cost.layers, column) for column in _COLUMNS))
    whole = _seconds(total)
    rows = [_row(layer, whole) for layer in shown]
    return f"{cost.arm}\n{_table(_HEADS, rows, last=_row(total, whole))}"


_COLUMNS = (
    "parameter_bytes",
    "saved_bytes",
    "forward",
    "backward",
    "optimizer",
    "quantizing",
)


def _comparison(costs: Sequence[ArmCost]) -> str:
    heads = (
        "a step of",
        "loading",
        "forward",
        "backward",
        "optimizer",
        "step",
        "ratio",
        "parameters",
        "momentum",
        "saved",
    )
    rows = [
        (
            cost.arm,
            _milliseconds(cost.loading),
            _milliseconds(cost.forward),
            _milliseconds(cost.backward),
            _milliseconds(cost.optimizer),
            _milliseconds(cost.step),
            f"{cost.step / costs[0].step:.2f}",
            _bytes(cost.total("parameter_bytes")),
            _bytes(cost.state_bytes),
            _bytes(cost.total("saved_bytes")),
        )
        for cost in costs
    ]
    return _table(heads, rows)


def _row(layer: LayerCost, whole: float) -> tuple[str, ...]:
    seconds = _seconds(layer)
    return (
        layer.name or "(the network)",
        layer.kind,
        _bytes(layer.parameter_bytes) if layer.name != BETWEEN else "",
        _bytes(layer.saved_bytes),
        _milliseconds(layer.forward),
        _milliseconds(layer.backward),
        _milliseconds(layer.optimizer),
        f"{100 * seconds / whole:.1f} %",
        f"{100 * layer.quantizing / seconds:.0f} %" if layer.quantizing else "",
    )


def _seconds(layer: LayerCost) -> float:
    return layer.forward + layer.backward + layer.optimizer


def _sum(layers: Sequence[LayerCost], column: str) -> int:
    total: int = sum(getattr(layer, column) for layer in layers)
    return total


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f} ms" if seconds else ""


def _bytes(count: float) -> str:
    if not count:
        return ""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], last: Sequence[str] | None = None
) -> str:
    every = [heads, *rows, *([] if last is None else [last])]
    text = [not any(row[i][:1].isdigit() for row in rows) for i in range(len(heads))]
    text[0] = True
    widths = [max(len(row[i]) for row in every) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, text, strict=True)
        ).rstrip()
        for row in every
    ]
    rule = "  ".join("-" * width for width in widths)
    lines.insert(1, rule)
    if last is not None:
        lines.insert(-1, rule)
    return "\n".join(lines)
