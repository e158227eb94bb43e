"""What low precision does inside a network at the end of a run: its errors, its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from swalp.formats import BlockFloat, FixedPoint, Format, Microscaling
from swalp.layers import Quantized, QuantizedLayer, Site
from swalp.layers.native import NativeLinear
from swalp.layers.native_convolution import NativeConvolution
from swalp.optim import SGD
from swalp.optim.sgd import sgd_step
from swalp.packed import PackedTensor
from swalp.quantize import codes, quantize
from swalp.quantize.error import gaps, rounding_error
from swalp.recipes import Quantizer, Recipe, fit
from swalp.rounding import Nearest, Rounding, Stochastic

EXAMPLES = 32  # at most; float64 copies of every activation exist one after the other
_NUMBERS = 1 << 17  # at most, of the input
_BINS = 101  # of a histogram of values
_FINE_BINS = 8  # bits: from longer words on a bin of a histogram of codes holds several

Row = dict[str, Any]


def describe(
    model: nn.Module,
    optimizer: SGD,
    average: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    recipe: Recipe | None,
    seed: int,
) -> dict[str, Any]:
    """Measure the step that would come next, on a copy: nothing that is passed changes.

    Args:
        model: the iterate: converted, or float.
        optimizer: of its parameters.
        average: the averaged network, with parameters of the same names.
        x: training examples, of which the first few are taken.
        y: their labels.
        recipe: of the model; None: float.
        seed: of the noise of this measurement.

    Returns:
        "examples": how many were taken; "errors": a row for each role of each layer, with the
        fields of `swalp.quantize.error.RoundingError`; "histograms": a row for each parameter of
        two or more dimensions, see `_histogram`.
    """
    count = max(2, min(EXAMPLES, len(x), _NUMBERS // max(x[0].numel(), 1)))
    twin = copy.deepcopy(model).train()
    twin.zero_grad()
    errors: list[Row] = []
    for name, module in twin.named_modules():
        if isinstance(module, NativeLinear | NativeConvolution):
            # Integer products never call the sites; the simulation, with the same numbers, does.
            simulated = MethodType(QuantizedLayer.forward, module)
            module.forward = simulated  # type: ignore[method-assign]  # of this copy only
        if isinstance(module, Quantized):
            for place in ("input_site", "output_site"):
                site = getattr(module._swalp_layer, place)
                if site is not None:
                    setattr(module._swalp_layer, place, _Watch(site, name, errors.append))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        nn.functional.cross_entropy(twin(x[:count]), y[:count]).backward()  # type: ignore[no-untyped-call]  # PyTorch ships no type
    averaged = dict(average.named_parameters())
    if recipe is not None:
        _update(model, twin, optimizer, seed, errors.append)
        for name, value in averaged.items():
            fmt = _weight_format(optimizer, name)
            if fmt is not None:
                at_rest = Quantizer(fmt, Nearest())
                _quantized(at_rest, "average", name, seed, errors.append)(value)
    return {
        "examples": count,
        "errors": sorted(errors, key=lambda row: _ORDER.index(row["role"])),
        "histograms": [
            _histogram(
                name, parameter.detach(), averaged[name].detach(), _weight_format(optimizer, name)
            )
            for name, parameter in model.named_parameters()
            if parameter.dim() >= 2 and parameter.numel()
        ],
    }


_ORDER = ("activation", "error", "gradient", "momentum", "accumulator", "weight", "average")


@dataclass(slots=True)
class _Watch:
    """In a site's place: does what it does, and notes how far numbers moved."""

    site: Site
    name: str
    note: Callable[[Row], None]

    def begin(self) -> int:
        """As the site's."""
        return self.site.begin()

    def __call__(self, x: Tensor, training: bool, call: int | None = None) -> Tensor:
        # An alias, as what else uses x sends gradients back to it too.
        entering = x.view_as(x)
        leaving = self.site(entering, training, call)
        activation, error = self.site.activation, self.site.error
        if activation is not None:
            fmt = fit(activation.format, x.shape)
            rule = activation.rounding
            self.note(_row("activation", self.name, fmt, rule, entering, leaving))
        if error is not None and leaving.requires_grad:
            fmt, rule = fit(error.format, x.shape), error.rounding
            exact: list[Tensor] = []
            leaving.register_hook(exact.append)  # type: ignore[no-untyped-call]  # PyTorch ships no type
            entering.register_hook(  # type: ignore[no-untyped-call]  # likewise
                lambda rounded: self.note(_row("error", self.name, fmt, rule, exact.pop(), rounded))
            )
        return leaving


@torch.no_grad()
def _update(
    model: nn.Module,
    twin: nn.Module,
    optimizer: SGD,
    seed: int,
    note: Callable[[Row], None],
) -> None:
    """The optimizer's step with the twin's gradients, and how far it rounds."""
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    settings = {
        parameter: group for group in optimizer.param_groups for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        gradient, group = gradients[name], settings.get(parameter)
        if gradient is None or group is None:
            continue

        recipe = optimizer.recipe_of(name)

        def quantized(
            role: str, value: Tensor, name: str = name, recipe: Recipe | None = recipe
        ) -> Tensor:
            quantizer = None if recipe is None else getattr(recipe, role)
            if quantizer is None:
                return value
            return _quantized(quantizer, role, name, seed, note)(value)

        state = optimizer.state[parameter]
        sgd_step(
            _plain(parameter),
            gradient,
            _plain(state.get("momentum_buffer")),
            _plain(state.get("accumulator")),
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            quantized=quantized,
        )


def _weight_format(optimizer: SGD, name: str) -> Format | None:
    recipe = optimizer.recipe_of(name)
    return None if recipe is None or recipe.weight is None else recipe.weight.format


def _quantized(
    quantizer: Quantizer, role: str, name: str, seed: int, note: Callable[[Row], None]
) -> Callable[[Tensor], Tensor]:
    rounding = quantizer.rounding
    if isinstance(rounding, Stochastic):
        rounding = rounding.seeded(seed).stream("diagnostics", f"{role} {name}")

    def apply(value: Tensor) -> Tensor:
        fmt = fit(quantizer.format, value.shape)
        rounded = quantize(value.detach(), fmt, rounding)
        note(_row(role, name, fmt, rounding, value, rounded))
        return rounded

    return apply


def _row(
    role: str, name: str, fmt: Format, rounding: Rounding, exact: Tensor, rounded: Tensor
) -> Row:
    return {
        "role": role,
        "name": name,
        "format": str(fmt),
        "rounding": str(rounding),
        **asdict(rounding_error(exact, rounded, fmt)),
    }


def _histogram(name: str, iterate: Tensor, average: Tensor, fmt: Format | None) -> Row:
    """Counts of the iterate on its grid, and of the average between the grid's values.

    Where all gaps of a block are equal, "unit" is "gap": each number is divided by the gap of its
    block in the iterate, so that the iterate lies on the integers, and bins are centred there, the
    average's being an odd fraction of the iterate's. Elsewhere "unit" is "value".

    Returns:
        "name", "shape", "format" (None: float), "unit", and for "iterate" and "average" the "width"
        of a bin, "low", the left edge of the first, and "counts"; "left_out" counts numbers of the
        average that are more than a bin beyond the grid, or in a block of zeros.
    """
    values, mean = _plain(iterate).to(torch.float64), average.to(torch.float64)
    row: Row = {"name": name, "shape": list(iterate.shape), "format": None, "unit": "value"}
    fmt = None if fmt is None else fit(fmt, iterate.shape)
    row["format"] = None if fmt is None else str(fmt)
    grid = fmt.element if isinstance(fmt, Microscaling) else fmt
    if fmt is not None and isinstance(grid, FixedPoint | BlockFloat):
        row["unit"] = "gap"
        if isinstance(iterate, PackedTensor):
            ones = torch.ones(iterate.shape, dtype=torch.int8)
            gap = codes.unpack(ones, iterate.exponents, fmt).to(torch.float64)
        else:
            gap = gaps(iterate, fmt)
        lowest, highest = grid.min_integer, grid.max_integer
        width = float(1 << max(grid.word_length - _FINE_BINS, 0))
        parts = 9 if grid.word_length <= 4 else 5 if grid.word_length <= 6 else 3
        low, high = lowest - width / 2, highest + width / 2
        values, mean = values / gap, mean / gap
    else:
        largest = max(values.abs().max().item(), mean.abs().max().item()) or 1.0
        low, high, parts = -largest, largest, 1
        width = (high - low) / _BINS
    row["iterate"] = _counts(values, low, high, width)
    row["average"] = _counts(mean, low - width, high + width, width / parts)
    row["left_out"] = mean.numel() - sum(row["average"]["counts"])
    return row


def _counts(values: Tensor, low: float, high: float, width: float) -> dict[str, Any]:
    """How many lie in each bin, from the first to the last that has any."""
    bins = round((high - low) / width)
    inside = values[(values >= low) & (values <= high)]
    where = ((inside - low) / width).to(torch.int64).clamp(0, bins - 1)
    counts = torch.bincount(where, minlength=bins)
    used = counts.nonzero()
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
    return {
        "width": width,
        "low": low + first * width,
        "counts": counts[first : last + 1].tolist(),
    }


def _plain(value: Any) -> Any:
    """A tensor (or None) without its packing."""
    return value.dequantize() if isinstance(value, PackedTensor) else value
