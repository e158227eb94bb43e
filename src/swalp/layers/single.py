"""Layers of one tensor, between sites: products, and whatever else a recipe quantizes around."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swalp.layers.base import Quantized
from swalp.layers.functions import paused
from swalp.layers.products import Products


class QuantizedLayer(Quantized):
    """Mixin over a layer of one tensor: linear, convolution, normalization, nonlinearity, …."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward between the sites."""
        if self.input_site is not None:
            x = self.input_site(x, self.training)
        if torch._C._len_torch_function_stack() == 0:
            y = super().forward(x, *args, **kwargs)  # type: ignore[misc]  # a mixin
        else:  # perhaps inside a module that quantizes the products of its own forward
            with paused():
                y = super().forward(x, *args, **kwargs)  # type: ignore[misc]  # a mixin
        return y if self.output_site is None else self.output_site(y, self.training)


class QuantizedBilinear(Quantized):
    """Mixin over `torch.nn.Bilinear`: both inputs are operands."""

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """The parent's forward between the sites."""
        products = Products.begin(self.input_site, self.output_site, self.training)
        with paused():
            if not self.outer:
                input1, input2 = products.enter(input1), products.enter(input2)
            y: Tensor = super().forward(input1, input2)  # type: ignore[misc]  # a mixin
        return products.leave(y)
