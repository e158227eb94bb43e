"""What stands between native products, keeping for its gradient as little as there is to know.

The numbers are those of PyTorch's layers. ReLU keeps a bit an element, max pooling a byte an
output. Batch normalization after a convolution, and GELU after a linear layer, keep nothing that
the layer before does not keep: their input is its output, computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swalp import buffers
from swalp.layers.products import integers
from swalp.layers.single import QuantizedLayer
from swalp.matmul import relu
from swalp.matmul.again import Again, again_of
from swalp.matmul.once import once
from swalp.matmul.owned import alone, place, references
from swalp.packed import PackedTensor
from swalp.quantize import plans

if plans.available:
    from swalp import _kernels

_PART = 1 << 23  # bytes of an input that are computed again at a time


class LeanReLU(QuantizedLayer):
    """Mixin over `torch.nn.ReLU`."""

    inplace: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward."""
        if not (_plain(x) and _keeps(x) and (x.is_contiguous() or _is_last(x))):
            return super().forward(x, *args, **kwargs)
        return _ReLU.apply(x, self.inplace)  # type: ignore[no-untyped-call]  # PyTorch ships no type


class LeanGELU(QuantizedLayer):
    """Mixin over `torch.nn.GELU`, of use right after a native linear layer.

    Attributes:
        inplace: whether its result may take the place of its input, as with `torch.nn.ReLU`; it
            does where the input can be computed again. PyTorch's own has no such setting: where
            nothing else uses the input, set it on the layer, before or after converting.
    """

    approximate: str
    inplace: bool = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward."""
        again = again_of(x)
        if again is None or not (_plain(x) and _keeps(x) and x.is_contiguous() and x.dim() > 1):
            return super().forward(x, *args, **kwargs)
        return _GELU.apply(x, self.approximate, again, self.inplace)  # type: ignore[no-untyped-call]  # PyTorch ships no type


class LeanMaxPool(QuantizedLayer):
    """Mixin over `torch.nn.MaxPool2d`."""

    kernel_size: int | tuple[int, int]
    stride: int | tuple[int, int]
    padding: int | tuple[int, int]
    dilation: int | tuple[int, int]
    return_indices: bool
    ceil_mode: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward."""
        kernel, stride, padding = map(_pair, (self.kernel_size, self.stride, self.padding))
        sizes = [
            (size + 2 * pad - taps) // step + 1
            for size, taps, step, pad in zip(x.shape[2:], kernel, stride, padding, strict=False)
        ]
        simple = _pair(self.dilation) == (1, 1) and not self.return_indices and not self.ceil_mode
        small = kernel[0] * kernel[1] <= 256 and all(
            2 * pad <= taps for pad, taps in zip(padding, kernel, strict=True)
        )
        if not (_plain(x) and _keeps(x) and x.dim() == 4 and simple and small) or min(sizes) < 1:
            return super().forward(x, *args, **kwargs)
        pooling = (x.shape[0], x.shape[1], *x.shape[2:], *sizes, *kernel, *stride, *padding)
        return _MaxPool.apply(x, pooling)  # type: ignore[no-untyped-call]  # PyTorch ships no type


class LeanBatchNorm(QuantizedLayer):
    """Mixin over `torch.nn.BatchNorm2d`, of use right after a native convolution."""

    num_features: int
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
    track_running_stats: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward."""
        again = again_of(x)
        allowed = x.dim() == 4 and x.shape[1] == self.num_features and x.numel() > x.shape[1]
        if not (self.training and again is not None and allowed and _plain(x) and _keeps(x)):
            return super().forward(x, *args, **kwargs)  # which refuses what is not allowed
        share = 0.0 if self.momentum is None else self.momentum
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                share = 1.0 / float(self.num_batches_tracked)
        kept = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        return _BatchNorm.apply(  # type: ignore[no-untyped-call]  # PyTorch ships no type
            x, self.weight, self.bias, *kept, share, self.eps, again
        )


def _plain(x: Tensor) -> bool:
    return integers(x) and x.numel() > 0 and not x.is_neg()


def _keeps(x: Tensor) -> bool:
    """Whether anything would be kept for a gradient."""
    return x.requires_grad and torch.is_grad_enabled()


def _is_last(x: Tensor) -> bool:
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def _pair(x: int | tuple[int, int]) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else (x[0], x[1])


def _float(x: Tensor | None) -> Tensor | None:
    return x.dequantize() if isinstance(x, PackedTensor) else x


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        last = not x.is_contiguous()
        y = x if inplace else buffers.empty(*x.shape, channels_last=last)
        passed = relu.forward(x, y)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(passed)
        ctx.last = last
        return y

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mine = references(grad) == alone()
        (passed,) = ctx.saved_tensors
        return relu.gradient(grad, passed, mine, ctx.last), None


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str, again: Again, inplace: bool) -> Tensor:
        ctx.compute, ctx.approximate = again.compute, approximate
        ctx.save_for_backward(*again.tensors)
        if inplace:
            ctx.mark_dirty(x)
        y = x if inplace else buffers.empty(*x.shape)
        return torch.ops.aten.gelu.out(x, approximate=approximate, out=y)  # type: ignore[no-any-return]  # PyTorch ships no type

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        mine = references(grad) == alone()
        result, kept = place(grad, mine), ctx.saved_tensors
        for part in _parts(grad, _PART):
            torch.ops.aten.gelu_backward.grad_input(
                grad[part], ctx.compute(*kept, part=part), approximate=ctx.approximate,
                grad_input=result[part],
            )  # fmt: skip
        return result, None, None, None


def _parts(x: Tensor, most: int) -> list[slice]:
    """Of the first dimension, of so many bytes each at most, but of one index at least."""
    many = max(1, most // x[0].nbytes)
    return [slice(i, i + many) for i in range(0, len(x), many)]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pooling: tuple[int, ...]) -> Tensor:
        batch, channels, _, _, out_height, out_width = pooling[:6]
        memory = x.movedim(1, -1).contiguous()
        y = buffers.empty(batch, channels, out_height, out_width, channels_last=True)
        taps = buffers.empty(y.numel(), dtype=torch.uint8)
        _kernels.max_pool(
            _kernels.Pooling(pooling), memory.data_ptr(), y.data_ptr(), taps.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(taps)
        ctx.pooling = pooling
        return y

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (taps,) = ctx.saved_tensors
        batch, channels, height, width = ctx.pooling[:4]
        memory = grad.resolve_neg().movedim(1, -1).contiguous()
        dx = buffers.empty(batch, channels, height, width, channels_last=True)
        _kernels.max_pool_gradient(
            _kernels.Pooling(ctx.pooling), memory.data_ptr(), taps.data_ptr(), dx.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return dx, None


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        momentum: float,
        eps: float,
        again: Again,
    ) -> Tensor:
        scale, shift = map(_float, (weight, bias))
        y, own_mean, own_scale = torch.native_batch_norm(
            x, scale, shift, mean, variance, True, momentum, eps
        )
        ctx.compute, ctx.eps = again.compute, eps
        ctx.save_for_backward(scale, own_mean, own_scale, *again.tensors)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, mean, own_scale, *tensors = ctx.saved_tensors
        x = ctx.compute(*tensors)
        mask = list(ctx.needs_input_grad[:3])
        dx, dscale, dshift = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, None, None, mean, own_scale, True, ctx.eps, mask
        )
        results = (dx, dscale, dshift)
        wanted = (one if needed else None for one, needed in zip(results, mask, strict=True))
        return *wanted, None, None, None, None, None
