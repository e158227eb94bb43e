"""Products inside a module's forward, between the module's sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _is_tracing
from torch.compiler import is_compiling

from swalp.layers.base import Lowered
from swalp.layers.sites import Site
from swalp.matmul import batched
from swalp.matmul.attention import Guesses, attend
from swalp.matmul.linear import linear
from swalp.matmul.operands import Quantization, quantized
from swalp.matmul.projections import projections
from swalp.packed import PackedTensor
from swalp.quantize.storage import has_memory, is_faked

_USES = 1 << 16  # of a site in one forward pass of its module: half of the 32-bit counter


def integers(x: Tensor) -> bool:
    """Whether integer products can take this operand now; if not, they are simulated."""
    return (
        not is_compiling()
        and not _is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not _are_functorch_transforms_active()
        and not is_faked()
        and x.dtype == torch.float32
        and has_memory(x)
    )


def runs(x: Tensor, weight: Tensor, bias: Tensor | None, features: int) -> bool:
    """Whether the integer products can take this input now, and give so many features."""
    return (
        integers(x)
        and x.dim() > 1
        and x.numel() > 0
        and _is_float(weight)
        and (bias is None or (bias.shape == (features,) and _is_float(bias)))
    )


def _is_float(parameter: Tensor) -> bool:
    """Whether it is packed, or float32 in memory."""
    return isinstance(parameter, PackedTensor) or (
        parameter.dtype == torch.float32 and has_memory(parameter)
    )


@dataclass(slots=True)
class Products:
    """The products of one forward pass of a module.

    What enters each of them passes the operand site, what leaves it the result site; each use has
    noise of its own, and the same again when the pass is repeated.

    Attributes:
        operand: the site that operands pass, weights excepted; None: they stay float.
        result: the site that products pass.
        training: whether noise may be random.
        first: the number of the pass's first use.
        native: whether products of two operands run on integers.
        uses: so far.
        functions: that were intercepted, and how often.
        module: whose pass it is; None: a layer's that gives its operands itself.
        swapped: the identities of what stands in the place of its parameters.
    """

    operand: Site | None
    result: Site | None
    training: bool
    first: int
    native: bool = False
    uses: int = 0
    functions: dict[str, int] = field(default_factory=dict)
    module: nn.Module | None = None
    swapped: frozenset[int] | None = None

    @classmethod
    def begin(cls, layer: Lowered, training: bool) -> Products:
        """The products of a pass of `layer` that begins now."""
        operand, result = layer.input_site, layer.output_site
        site = operand or result
        run = 0 if site is None or not training else site.begin()
        if site is not None and run >= _USES:
            raise RuntimeError(
                f"layer {site.name!r} ran {run} times in one pass of the model, more than "
                f"its noise can tell apart; call the model that convert returned, or "
                f"swalp.noise_clock(model).tick() before each step"
            )
        return cls(operand, result, training, run * _USES, layer.native)

    def off(self, function: str) -> bool:
        """Whether nothing is quantized here; notes that the module called `function`."""
        self.functions[function] = self.functions.get(function, 0) + 1
        return self.operand is None and self.result is None

    def is_weight(self, x: Tensor) -> bool:
        """Whether it is a parameter, or what `torch.func.functional_call` has for one."""
        if isinstance(x, nn.Parameter):
            return True
        if self.module is None or is_compiling():
            return False
        if self.swapped is None:
            found = (p for part in self.module.modules() for p in part._parameters.values())
            self.swapped = frozenset(
                id(p) for p in found if p is not None and not isinstance(p, nn.Parameter)
            )
        return id(x) in self.swapped

    def enter(self, x: Tensor, summed: int = -1) -> Tensor:
        """An operand, quantized.

        Args:
            x: the operand.
            summed: its dimension that the product sums over, -1 or, of the second of two matrices,
                -2. It is the last one to the format, so that tiles run along it and exponents
                differ between the others.
        """
        if self.operand is None:
            return x
        if summed == -1 or x.dim() < 2:
            return self.operand(x, self.training, self._use())
        # In row-major order the kernels are three times as fast.
        return self.operand(x.mT.contiguous(), self.training, self._use()).mT

    def leave(self, y: Tensor) -> Tensor:
        """A result, quantized."""
        return y if self.result is None else self.result(y, self.training, self._use())

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`torch.nn.functional.linear` with a weight that is on its grid already."""
        if not self.multiplies(x, weight, bias):
            return self.leave(F.linear(self.enter(x), weight, bias))
        entering = self._entering(x.shape)
        leaving = self._leaving((*x.shape[:-1], weight.shape[0]))
        return linear(x, weight, bias, entering[0], entering, leaving)

    def project(
        self, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None
    ) -> list[Tensor] | None:
        """`linear` of each input, with its share of the rows of one weight; what enters several in
        a row is quantized once. None, and nothing has been done: not on integers.
        """
        if not all(self.multiplies(x, weight, bias) for x in inputs):
            return None
        width = len(weight) // len(inputs)
        shared: list[tuple[Tensor, list[int]]] = []
        for i, x in enumerate(inputs):
            if shared and shared[-1][0] is x:
                shared[-1][1].append(i)
            else:
                shared.append((x, [i]))
        entering = [self._entering(x.shape) for x, _ in shared]
        leaving = [self._leaving((*x.shape[:-1], width)) for x in inputs]
        results: list[Tensor] = []
        for (x, own), activation in zip(shared, entering, strict=True):
            parts = [slice(i * width, (i + 1) * width) for i in own]
            errors = [leaving[i] for i in own]
            results += projections(x, weight, bias, activation[0], activation, parts, errors)
        return results

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """`torch.matmul` of two operands."""
        if self.native and integers(x) and integers(y) and batched.multiplies(x, y):
            return batched.matmul(x, y, *self._moments(x.shape, y.shape))
        return self.leave(torch.matmul(self.enter(x), self.enter(y, summed=-2)))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        factor: float,
    ) -> Tensor | None:
        """The two `matmul` of attention and what lies between, by `swalp.matmul.attention`.

        Args:
            query: (batch, heads, L, E).
            key: (batch, heads, S, E).
            value: (batch, heads, S, Ev).
            mask: of the scores, up to (batch, heads, L, S): boolean (True takes part) or added.
            causal: whether row l sees columns up to l; then there is no `mask`.
            factor: of the scores.

        Returns:
            (batch, heads, L, Ev); None, and nothing has been done, if an operand or a probability
            is NaN.
        """
        uses = self.uses
        first = self._moments(query.shape, key.mT.shape)
        second = self._moments((*query.shape[:-1], key.shape[-2]), value.shape)
        found = (
            quantized(query, *first[0]),
            quantized(key, *first[1]),
            quantized(value.mT, *second[1]),
        )
        q, k, v = found
        if q is None or k is None or v is None:
            self.uses = uses
            return None
        assert self.operand is not None
        hints = self.operand.clock.hints
        guesses = hints.setdefault(f"{self.operand.name}, {uses}", Guesses())
        errors = first[2], second[2]
        operands = (q, k, v)
        try:
            return attend(
                query, key, value, operands, second[0], errors, mask, causal, factor, guesses
            )
        except FloatingPointError:
            self.uses = uses
            return None

    def _moments(
        self, x: Sequence[int], y: Sequence[int]
    ) -> tuple[Quantization, Quantization, Quantization]:
        """How a product of operands of those shapes rounds them, and its result's gradient."""
        left = self._entering(x)
        right = self._entering((*y[:-2], y[-1], y[-2]))
        return left, right, self._leaving((*x[:-1], y[-1]))

    def multiplies(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether integers multiply an input and a weight."""
        if not self.native or weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
            return False
        return runs(x, weight, bias, weight.shape[0])

    def _entering(self, shape: Sequence[int]) -> Quantization:
        """How the next operand, of that shape, is rounded."""
        assert self.operand is not None
        assert self.operand.activation is not None
        return self.operand.activation.at(shape, *self._moment(self.operand))

    def _leaving(self, shape: Sequence[int]) -> Quantization:
        """How the gradient of the next result is."""
        assert self.result is not None
        assert self.result.error is not None
        return self.result.error.at(shape, *self._moment(self.result))

    def _moment(self, site: Site) -> tuple[int | None, int]:
        return (site.clock.step, self._use()) if self.training else (None, 0)

    def _use(self) -> int:
        use = self.uses
        if use == _USES:
            site = self.operand or self.result
            assert site is not None
            raise RuntimeError(
                f"layer {site.name!r} quantizes more than {_USES} tensors in one pass, more than "
                f"its noise can tell apart; split the sequence"
            )
        self.uses = use + 1
        return self.first + use
