"""What stands between native products, keeping for its gradient as little as there is to know.

The numbers are those of PyTorch's layers. ReLU keeps a bit an element, max pooling a byte an
output, and batch normalization nothing that the convolution before it does not keep: its input is
that convolution's output, computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swalp import buffers
from swalp.layers.single import QuantizedLayer
from swalp.matmul.convolve import Again, again_of
from swalp.packed import PackedTensor
from swalp.quantize import cpu

if cpu.available:
    from swalp import _kernels


class LeanReLU(QuantizedLayer):
    """Mixin over `torch.nn.ReLU`."""

    inplace: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward."""
        if not (_plain(x) and _keeps(x) and (x.is_contiguous() or _is_last(x))):
            return super().forward(x, *args, **kwargs)
        return _ReLU.apply(x, self.inplace)  # type: ignore[no-untyped-call]  # PyTorch ships no type


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
        if not (self.training and again is not None and _plain(x) and _keeps(x)):
            return super().forward(x, *args, **kwargs)
        share = 0.0 if self.momentum is None else self.momentum
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                share = 1.0 / float(self.num_batches_tracked)
        return _BatchNorm.apply(  # type: ignore[no-untyped-call]  # PyTorch ships no type
            x, self.weight, self.bias, self.running_mean, self.running_var, share, self.eps, again
        )


_LEAN: dict[Any, type[QuantizedLayer]] = {
    nn.ReLU.forward: LeanReLU,
    nn.MaxPool2d.forward: LeanMaxPool,
    nn.BatchNorm2d.forward: LeanBatchNorm,
}


def lean_mixin(module: nn.Module) -> type[QuantizedLayer] | None:
    """What computes this kind of layer, keeping little; None: nothing does."""
    return _LEAN.get(type(module).forward) if cpu.available else None


def _plain(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and x.dtype == torch.float32
        and x.numel() > 0
        and not x.is_neg()
        and not isinstance(x, PackedTensor)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def _keeps(x: Tensor) -> bool:
    """Whether anything would be kept for a gradient."""
    return x.requires_grad and torch.is_grad_enabled()


def _is_last(x: Tensor) -> bool:
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def _pair(x: int | tuple[int, int]) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else (x[0], x[1])


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        last = not x.is_contiguous()
        passed = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
        y = x if inplace else buffers.empty(*x.shape, channels_last=last)
        _kernels.relu(
            x.numel(), x.data_ptr(), y.data_ptr(), passed.data_ptr(), torch.get_num_threads()
        )
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(passed)
        ctx.last = last
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (passed,) = ctx.saved_tensors
        gradient = (grad.movedim(1, -1) if ctx.last else grad).contiguous()
        result = buffers.empty(*grad.shape, channels_last=ctx.last)
        _kernels.relu_gradient(
            grad.numel(), gradient.data_ptr(), passed.data_ptr(), result.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return result, None


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pooling: tuple[int, ...]) -> Tensor:
        batch, channels, _, _, out_height, out_width = pooling[:6]
        memory = x.movedim(1, -1).contiguous()
        y = buffers.empty(batch, channels, out_height, out_width, channels_last=True)
        taps = torch.empty(y.numel(), dtype=torch.uint8)
        _kernels.max_pool(
            _kernels.Pooling(pooling), memory.data_ptr(), y.data_ptr(), taps.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(taps)
        ctx.pooling = pooling
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (taps,) = ctx.saved_tensors
        batch, channels, height, width = ctx.pooling[:4]
        memory = grad.movedim(1, -1).contiguous()
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
        scale, shift = (
            value.dequantize() if isinstance(value, PackedTensor) else value
            for value in (weight, bias)
        )
        y, own_mean, own_scale = torch.native_batch_norm(
            x, scale, shift, mean, variance, True, momentum, eps
        )
        ctx.again, ctx.eps = again.settings, eps
        ctx.save_for_backward(scale, own_mean, own_scale, *again.tensors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, mean, own_scale, *tensors = ctx.saved_tensors
        x = Again(tuple(tensors), ctx.again).compute()
        mask = list(ctx.needs_input_grad[:3])
        dx, dscale, dshift = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, None, None, mean, own_scale, True, ctx.eps, mask
        )
        results = (dx, dscale, dshift)
        wanted = (one if needed else None for one, needed in zip(results, mask, strict=True))
        return *wanted, None, None, None, None, None
