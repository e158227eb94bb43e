"""Recipes as tables: what ``swalp recipes`` prints."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from swalp import recipes
from swalp.recipes import ROLES, Quantizer, Recipe


def show_recipes(name: str | None, *, toml: bool) -> None:
    """Print a table of the recipes; or one, role by role; or one as TOML.

    Args:
        name: of the recipe, or a file; None: the table.
        toml: print it as TOML.

    Raises:
        ValueError: there is no such recipe, or the arguments do not go together.
    """
    console = Console()
    if name is None:
        if toml:
            raise ValueError("--toml needs a recipe: swalp recipes paper-small-block-8 --toml")
        table = _table(("recipe", "what it is"))
        for known in recipes.names():
            table.add_row(Text(known), Text(recipes.summary(known)))
        console.print(table)
        console.print(
            "A number at the end is the word length W. See one: swalp recipes NAME.",
            highlight=False,
        )
        return
    recipe = recipes.named(name, "swalp recipes")
    if toml:
        print(recipes.to_toml(recipe), end="")
        return
    console.print(Text(f"recipe {recipe.name}", style="bold"))
    console.print(role_table(recipe))
    if recipe.overrides:
        console.print(override_table(recipe))


def role_table(recipe: Recipe) -> Table:
    """A row for each role and setting: its format, rounding and bits."""
    table = _table(("role", "format", "rounding", "bits"))
    for role in ROLES:
        quantizer = getattr(recipe, role)
        if quantizer is None:
            table.add_row(role, "float", "", "")
        else:
            fmt = quantizer.format
            table.add_row(role, Text(str(fmt)), str(quantizer.rounding), str(fmt.bits))
    table.add_section()
    table.add_row("placement", recipe.placement)
    table.add_row("product", recipe.product)
    table.add_row("network's input", "quantized" if recipe.quantize_input else "float")
    return table


def override_table(recipe: Recipe) -> Table:
    """A row for each change that each override makes."""
    table = _table(("layers", "kind", "parameter", "setting", "instead"))
    for override in recipe.overrides:
        where = (override.layers, override.kind, override.parameter)
        for number, (setting, value) in enumerate(override.changes()):
            cells = where if number == 0 else ("", "", "")
            table.add_row(*map(Text, cells), setting, Text(_shown(value)))
    return table


def _shown(value: Quantizer | str | None) -> str:
    return "float" if value is None else str(value)


def _table(columns: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column != "what it is")
    return table
