"""How much to measure: the sizes and rounds of a full run and of a quick one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes, rounds and threads of a run.

    Args:
        rounds: turns of each contender, at least.
        seconds: that contenders take turns for, at least: what neighbours of the machine do to it
            lasts as long as many turns.
        threads: of PyTorch and of the kernels.
        columns: elements that share an exponent where blocks are rows.
        elements: of the large tensor.
        curve_sizes: elements of the tensors of the throughput curves.
        optimizer_tensors, optimizer_width: the optimizer updates that many square matrices.
        vgg_batch: images in a batch for VGG16.
    """

    rounds: int
    seconds: float
    threads: int = 2
    columns: int = 1024
    elements: int
    curve_sizes: tuple[int, ...]
    optimizer_tensors: int
    optimizer_width: int = 512
    vgg_batch: int


FULL = Plan(
    rounds=9,
    seconds=10.0,
    elements=2**24,
    curve_sizes=(10**4, 3 * 10**4, 10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8),
    optimizer_tensors=40,
    vgg_batch=128,
)
QUICK = Plan(
    rounds=3,
    seconds=0.0,
    elements=2**20,
    curve_sizes=(10**4, 10**5, 10**6),
    optimizer_tensors=4,
    vgg_batch=8,
)
