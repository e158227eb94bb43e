"""Bytes that training holds from step to step: weights and momentum, in 8 bits and in float32."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

import swalp
from benchmarks import optimizer, process
from benchmarks.harness import Spread
from benchmarks.plan import QUICK, Plan
from benchmarks.records import Row, at_most

Kind = Literal["packed", "plain"]
KINDS: tuple[Kind, Kind] = ("packed", "plain")  # ours, theirs


def held(plan: Plan) -> list[Row]:
    """Bytes of the tensors, and, to find what they do not show, of the whole process."""
    tensors = [tensor_bytes(_stepped(kind, plan)) for kind in KINDS]
    growths = [
        int(process.result(__name__, f"process_growth({kind!r}, {plan!r})")) for kind in KINDS
    ]
    return [
        Row(
            benchmark="memory",
            what=what,
            peer="float32",
            measure="bytes ratio",
            value=Spread.of([ours / theirs]),
            goal=at_most(0.26),
            rounds=1,
            details={"bytes": ours, "peer_bytes": theirs},
        )
        for what, (ours, theirs) in (
            ("weights and momentum: tensors", tensors),
            ("weights and momentum: growth of a process", growths),
        )
    ]


def tensor_bytes(trained: torch.optim.Optimizer) -> int:
    """Bytes of the memory blocks behind parameters and state, each counted once and whole."""
    blocks: dict[int, int] = {}
    for group in trained.param_groups:
        for parameter in group["params"]:
            for tensor in _tensors([parameter, *trained.state[parameter].values()]):
                storage = tensor.untyped_storage()
                blocks[storage.data_ptr()] = storage.nbytes()
    return sum(blocks.values())


def process_growth(kind: Kind, plan: Plan) -> int:
    """Bytes by which this process grows with the parameters and state of an optimizer."""
    _stepped(kind, QUICK)  # what is loaded or allocated only once
    before = process.resident_bytes()
    trained = _stepped(kind, plan)
    growth = process.resident_bytes() - before
    del trained
    return growth


def _stepped(kind: Kind, plan: Plan) -> torch.optim.Optimizer:
    """An optimizer after two steps, its gradients gone."""
    trained = optimizer.packed(plan) if kind == "packed" else optimizer.plain(plan)
    trained.step()
    trained.step()
    trained.zero_grad()
    return trained


def _tensors(values: list[Any]) -> list[Tensor]:
    """The plain tensors that hold the tensors among `values`."""
    plain = []
    for value in values:
        if isinstance(value, swalp.PackedTensor):
            plain += [part for part in (value.codes, value.exponents) if part is not None]
        elif isinstance(value, Tensor):
            plain.append(value)
    return plain
