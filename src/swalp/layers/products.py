"""Products inside a module's forward, between the module's sites."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from swalp.layers.sites import Site

_USES = 1 << 16  # of a site in one forward pass of its module: half of the 32-bit counter


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
        uses: so far.
        functions: that were intercepted, and how often.
    """

    operand: Site | None
    result: Site | None
    training: bool
    first: int
    uses: int = 0
    functions: dict[str, int] = field(default_factory=dict)

    @classmethod
    def begin(cls, operand: Site | None, result: Site | None, training: bool) -> Products:
        """The products of a pass that begins now."""
        site = operand or result
        run = 0 if site is None or not training else site.begin()
        return cls(operand, result, training, run * _USES)

    def off(self, function: str) -> bool:
        """Whether nothing is quantized here; notes that the module called `function`."""
        self.functions[function] = self.functions.get(function, 0) + 1
        return self.operand is None and self.result is None

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
        return self.leave(F.linear(self.enter(x), weight, bias))

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """`torch.matmul` of two operands."""
        return self.leave(torch.matmul(self.enter(x), self.enter(y, summed=-2)))

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
