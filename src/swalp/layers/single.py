"""Layers of one tensor, between sites: products, and whatever else a recipe quantizes around."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from swalp.layers.base import Quantized
from swalp.layers.functions import paused
from swalp.layers.products import Products


class QuantizedLayer(Quantized):
    """Mixin over a layer of one tensor: linear, convolution, normalization, nonlinearity, …."""

    @classmethod
    def _swalp_namespace(cls, kind: type[nn.Module]) -> dict[str, Any]:
        """With a forward that takes the tensor by the name, too, that `kind`'s gives it."""
        _, *names = inspect.signature(kind.forward).parameters

        @wraps(kind.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not args and names and names[0] in kwargs:
                args = (kwargs.pop(names[0]),)
            if torch._C._len_torch_function_stack() == 0:
                return cls.forward(self, *args, **kwargs)
            with paused():  # perhaps inside a module that quantizes what its own forward calls
                return cls.forward(self, *args, **kwargs)

        return super()._swalp_namespace(kind) | {"forward": forward}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward between the sites."""
        before, after = self._swalp_layer.input_site, self._swalp_layer.output_site
        if before is not None:
            x = before(x, self.training)
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]  # a mixin
        return y if after is None else after(y, self.training)


class QuantizedBilinear(Quantized):
    """Mixin over `torch.nn.Bilinear`: both inputs are operands."""

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """The parent's forward between the sites."""
        products = Products.begin(self._swalp_layer, self.training)
        with paused():
            if not self._swalp_layer.outer:
                input1, input2 = products.enter(input1), products.enter(input2)
            y: Tensor = super().forward(input1, input2)  # type: ignore[misc]  # a mixin
        return products.leave(y)
