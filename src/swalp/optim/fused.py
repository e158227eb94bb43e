"""The optimizers' steps compiled: one pass a parameter, equal to the pure functions bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from swalp.formats import BlockFloat, FixedPoint, Format, Microscaling, Minifloat
from swalp.packed import PackedTensor, joined, parts_of
from swalp.quantize import plans, storage
from swalp.quantize.blocks import block_extents
from swalp.quantize.codes import holds_nan
from swalp.recipes import Quantizer, Recipe, fit
from swalp.rounding import Stochastic

if plans.available:
    from swalp import _kernels
    from swalp.extension import TORCH


def available() -> bool:
    """Whether the compiled steps compute as PyTorch does on this machine.

    PyTorch's vector units fuse x + alpha * y into one rounding where the processor can, and the
    steps do the same; without such units its results are others.
    """
    return plans.available and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def blocks(fmt: Format, shape: Sequence[int]) -> tuple[int, int] | None:
    """(number, length) of the blocks of a contiguous tensor, each a stretch of memory.

    (1, number of elements) for a format without blocks; None where blocks are no stretches.
    """
    elements = math.prod(shape)
    if not isinstance(fmt, BlockFloat | Microscaling):
        return 1, elements
    extents = block_extents(fmt, shape)
    leading = True
    for size, extent in zip(shape, extents, strict=True):
        if extent != size and not leading:
            return None
        leading = leading and extent == 1
    length = math.prod(extents)
    return elements // length, length


class Outcome(NamedTuple):
    """What happened in a compiled step.

    Attributes:
        lost: whether a NaN had no code.
        finite: whether all weights were finite, before they were rounded.
    """

    lost: bool
    finite: bool


def resident(tensor: Tensor) -> Tensor:
    """The memory a step works on: codes of a packed tensor, or the tensor itself."""
    return tensor.codes if isinstance(tensor, PackedTensor) else tensor


class Prepared:
    """The compiled step's view of one parameter, made for the memory that it and its state have.

    Args:
        kind: "SgdParameter" or "AdamParameter", of `_kernels`.
        blocks: what `takes` found.
        roles: "gradient", then that of each tensor kept.
        recipe: of the parameter.
        kept: the parameter, then its state as far as there is any.
        name: of the parameter.
        seed: of the run.

    Attributes:
        parameter: which it is.
        state: its state in the optimizer, of now.
        kernel: of that kind, with its roles.
        layouts: how the parameter and its state lie in memory.
        kind: whether the parameter is packed, and whether gradients are rounded.
        written: the tensors whose memory a step writes to, each once.
        noted: the parameter, if it is packed and has a code for NaN.
        spans: the addresses that a step writes to, from and to.
    """

    def __init__(
        self,
        kind: str,
        blocks: tuple[int, int],
        roles: tuple[str, ...],
        recipe: Recipe,
        kept: list[Tensor],
        name: str,
        seed: int,
    ) -> None:
        self.parameter = parameter = kept[0]
        self.state: dict[str, Any] = {}
        self.kind = isinstance(parameter, PackedTensor), recipe.gradient is not None
        self.noted: PackedTensor | None = None
        if isinstance(parameter, PackedTensor) and holds_nan(parameter.format):
            self.noted = parameter
        self._for = recipe, roles, name, seed
        memories = [
            (resident(x), x.exponents if isinstance(x, PackedTensor) else None) for x in kept
        ]
        self._held = kept, memories  # so that no other tensor takes the place of one of them
        self.spans = [
            (x.data_ptr(), x.data_ptr() + x.nbytes)
            for both in memories
            for x in both
            if x is not None
        ]
        # Of a packed tensor autograd keeps the whole, others look at its codes.
        written = (*kept, *(memory for memory, _ in memories))
        self.written = list({id(x): x for x in written}.values())
        self.layouts = _kernels.Layouts(TORCH, PackedTensor, kept)
        self.kernel: Any = getattr(_kernels, kind)(parameter.shape, *blocks)
        self._plans = []  # as their tables lie in memory that the kernel reads
        for role in roles:
            quantizer = getattr(recipe, role)
            if quantizer is None:
                continue
            rounding = quantizer.rounding
            if isinstance(rounding, Stochastic):
                rounding = rounding.seeded(seed).stream(role, name)
            plan = plans.plan_of(fit(quantizer.format, parameter.shape))
            self._plans.append(plan)
            packed = self.kind[0]
            self.kernel.set_role(
                role, plan.kernel, *plans.rule_arguments(rounding)[:3], packed and joined(plan.fmt),
                plan.value_table().data_ptr() if packed else 0,
            )  # fmt: skip
        self.kernel.place([0 if x is None else x.data_ptr() for both in memories for x in both])

    def serves(
        self, recipe: Recipe, roles: tuple[str, ...], kept: list[Tensor], name: str, seed: int
    ) -> bool:
        """Whether it was made for these tensors, and they still have the memory of then."""
        made = self._for
        if made[0] is not recipe or made[1:] != (roles, name, seed):
            return False
        return self.layouts.hold(TORCH, kept)

    def begins(self, state: dict[str, Any], gradient: Tensor) -> bool:
        """Whether it can take the next step, which is of this state and gradient."""
        self.state = state
        begins: bool = self.kernel.bind(TORCH, state.get("step", 0), gradient)
        return begins


def overlapping(ready: Mapping[Any, dict[int, Prepared]]) -> list[int]:
    """Take out, and return, those that share memory: threads work at all at a time."""
    spans = sorted(
        (begin, end, place)
        for each in ready.values()
        for place, one in each.items()
        for begin, end in one.spans
    )
    found: set[int] = set()
    furthest, of = 0, -1
    for begin, end, place in spans:
        if begin < furthest and place != of:
            found |= {place, of}
        if end > furthest:
            furthest, of = end, place
    for each in ready.values():
        for place in found & each.keys():
            del each[place]
    return sorted(found)


class Batch:
    """Parameters that one compiled call steps, and can step again while they are as they were.

    Args:
        prepared: of each parameter; all of one kind.
        places: theirs among the parameters that the optimizer steps.

    Attributes:
        kind: of `prepared`.
        kernels: of each parameter.
        states: likewise.
    """

    def __init__(self, prepared: Sequence[Prepared], places: Sequence[int]) -> None:
        self.kind = prepared[0].kind
        self.kernels = [one.kernel for one in prepared]
        self.states = [one.state for one in prepared]
        self._held = prepared  # and what these hold, as layouts know tensors by their addresses
        self._places = places
        self._layouts = [one.layouts for one in prepared]
        self._written = [tensor for one in prepared for tensor in one.written]
        self._noted = [one.noted for one in prepared if one.noted is not None]

    def begins(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        keys: tuple[str, ...],
    ) -> bool:
        """Whether it can take the next step: its parameters still have the memory of then.

        Args:
            parameters: all that the optimizer steps.
            gradients: of each.
            states: likewise.
            keys: what is kept of a parameter's state.
        """
        self.states = [states[place] for place in self._places]
        return _kernels.bind_again(
            TORCH,
            self.kernels,
            self._layouts,
            [parameters[place] for place in self._places],
            [gradients[place] for place in self._places],
            self.states,
            keys,
        )

    def took_step(self, finite: bool) -> None:
        """Count the step, and tell PyTorch of the memory that was written to, as its own do.

        `finite`: of its `Outcome`.
        """
        for state in self.states:
            state["step"] += 1
        increment_version(self._written)
        if finite:
            for parameter in self._noted:
                parameter.note_no_nan()


def empty_state(recipe: Recipe, role: str, parameter: Tensor) -> Tensor:
    """Zeros, held as that role is kept beside `parameter`: packed or as floats."""
    shape = parameter.shape
    if not isinstance(parameter, PackedTensor):
        return torch.zeros(shape, dtype=torch.float32, device="cpu")
    fmt = fit(getattr(recipe, role).format, shape)
    codes, *exponents = (
        torch.zeros(size, dtype=dtype, device="cpu") for dtype, size in parts_of(shape, fmt)
    )
    if isinstance(fmt, BlockFloat | Microscaling):
        exponents[0].fill_(fmt.min_exponent)
    return PackedTensor(codes, exponents[0] if exponents else None, fmt, shape)


def takes(recipe: Recipe, roles: Sequence[str], kept: list[Tensor]) -> tuple[int, int] | None:
    """What `fits` finds, if memory holds the parameter and all or none of its state as steps do."""
    if len(kept) not in (1, len(roles) - 1):
        return None
    blocks = fits(recipe, roles, kept[0])
    if blocks is None:
        return None
    each = zip(kept, roles[1:], strict=False)
    return blocks if all(held(x, role, recipe, kept[0]) for x, role in each) else None


def fits(recipe: Recipe, roles: Sequence[str], parameter: Tensor) -> tuple[int, int] | None:
    """(number, length) of the blocks that all roles share, if the compiled step can do the job.

    It can where what is kept is rounded, to codes of at most 8 bits if the parameter is packed, and
    blocks are stretches of a contiguous float32 parameter on the CPU.
    """
    memory = resident(parameter)
    if not (available() and storage.in_order(memory) and parameter.numel()):
        return None
    if storage.is_faked():
        return None
    if parameter.dtype != torch.float32:
        return None
    found: tuple[int, int] | None = None
    halved = False
    for role in roles:
        quantizer: Quantizer | None = getattr(recipe, role)
        if quantizer is None:
            if role == "gradient":
                continue
            return None
        fmt = fit(quantizer.format, parameter.shape)
        if not plans.supports(fmt, quantizer.rounding, torch.float32):
            return None
        kept = role != "gradient"
        if kept and isinstance(parameter, PackedTensor):
            if not _byte(fmt):
                return None
            halved = halved or joined(fmt)
        if isinstance(fmt, BlockFloat | Microscaling):
            own = blocks(fmt, parameter.shape)
            # The step rounds roots before it knows the largest of a block.
            if role == "second_moment" or own is None or (found is not None and own != found):
                return None
            found = own
    found = found or (1, parameter.numel())
    # Two codes share a byte, but no two blocks do.
    return None if halved and found[0] > 1 and found[1] % 2 else found


def _byte(fmt: Format) -> bool:
    """Whether codes lie one or two to a byte, exponents one, as the step reads them."""
    if fmt.bits > 8:
        return False
    if isinstance(fmt, BlockFloat):
        return fmt.exponent_bits <= 8
    return isinstance(fmt, FixedPoint | Minifloat | Microscaling)


def held(tensor: Tensor, role: str, recipe: Recipe, parameter: Tensor) -> bool:
    """Whether memory holds `tensor` as the step keeps that role beside `parameter`.

    The step works on addresses. A parameter packed in another format than the recipe's, or a state
    from another kind of run, is left to the pure function, which takes anything, and refuses to
    write to a part of another tensor.
    """
    memory = resident(tensor)
    if tensor.shape != parameter.shape or not storage.in_order(memory):
        return False
    if not isinstance(parameter, PackedTensor):
        return type(tensor) is not PackedTensor and tensor.dtype == torch.float32
    return (
        isinstance(tensor, PackedTensor)
        and not tensor.readonly
        and tensor.format == fit(getattr(recipe, role).format, parameter.shape)
        and (tensor.exponents is None or tensor.exponents.is_contiguous())
    )


def sgd(
    kernels: list[Any],
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    packed: bool,
    has_gradient: bool,
) -> Outcome:
    """`sgd_step` of bound parameters, in place."""
    return Outcome(*_kernels.sgd(
        kernels, lr, momentum, weight_decay, nesterov, packed, has_gradient,
        torch.get_num_threads(),
    ))  # fmt: skip


def adam(
    kernels: list[Any],
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    packed: bool,
    has_gradient: bool,
) -> Outcome:
    """`adam_step` of bound parameters, in place."""
    decoupled = decoupled and weight_decay != 0
    lost, finite = _kernels.adam(
        kernels,
        lr / (1 - betas[0] ** step),
        1 - betas[0],
        betas[1],
        1 - betas[1],
        (1 - betas[1] ** step) ** 0.5,
        eps,
        1 - lr * weight_decay if decoupled else weight_decay,
        decoupled,
        packed,
        has_gradient,
        torch.get_num_threads(),
    )
    return Outcome(lost, finite)
