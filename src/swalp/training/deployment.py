"""The averaged network as it will be used: quantized to nearest, batch norm fitted to that."""

from __future__ import annotations

from torch import nn

import swalp
from swalp import Nearest, parse_format, recipes
from swalp.packed import storage_bytes
from swalp.recipes import Quantizer, Recipe, fit
from swalp.training.augmentation import Draws
from swalp.training.config import RunConfig
from swalp.training.data import Dataset, evaluation_batches

# What is tried beside the float average, with its row in the table.
MODELS = ("quantized", "quantized-activations")


def recipe(config: RunConfig, arm: str, model: str) -> Recipe:
    """The formats of a deployed network, all rounded to nearest.

    Weights are in `RunConfig.export_format`; "quantized-activations" also quantizes activations as
    the arm did in training, or, if that was in float, to 8 bits for each sample and channel.
    """
    weight = Quantizer(parse_format(config.export_format), Nearest())
    if model == "quantized":
        return Recipe(name="quantized average", weight=weight)
    trained = config.recipe(arm) or recipes.get("paper-small-block-8")
    activation = trained.activation
    return Recipe(
        name="quantized average and activations",
        weight=weight,
        activation=None if activation is None else Quantizer(activation.format, Nearest()),
        quantize_input=trained.quantize_input,
        placement=trained.placement,
    )


def recompute_batchnorm(network: nn.Module, config: RunConfig, data: Dataset, seed: int) -> None:
    """Give `network` the batch-norm statistics of the training images as training sees them.

    If they are augmented in training they are here too, once each, with the noise of the epoch
    after the last. The statistics of the images as they are fit the weights less: on CIFAR-10 the
    average of a small network errs in 2 % of all images more (experiments/cifar10-small).
    """
    draws = Draws(seed, config.epochs) if config.augment else None
    swalp.recompute_batchnorm(network, evaluation_batches(data.train, draws))


def deployed(
    average: nn.Module, config: RunConfig, arm: str, data: Dataset, model: str, seed: int
) -> nn.Module:
    """A copy of the float `average`, quantized, its batch-norm statistics recomputed."""
    result = swalp.convert(swalp.to_float(average), recipe(config, arm, model))
    recompute_batchnorm(result, config, data, seed)
    return result


def stored_bytes(network: nn.Module, config: RunConfig) -> int:
    """Bytes of a network's parameters in the export format, and of its buffers."""
    fmt = parse_format(config.export_format)
    weights = sum(
        storage_bytes(parameter.shape, fit(fmt, parameter.shape))
        for parameter in network.parameters()
    )
    return weights + sum(buffer.nbytes for buffer in network.buffers())
