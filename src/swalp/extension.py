"""The compiled module, where it was built, and PyTorch as it knows it."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from swalp.noise import fresh_seed

# Each says, when it is called, whether PyTorch must see what is done: for its transformations of
# functions, its modes, or because it traces.
WATCHERS = (
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
    torch._C._is_tracing,
)

try:  # after torch, whose OpenMP runtime the kernels share
    from swalp import _kernels
except ImportError:
    available = False
else:
    available = True
    TORCH = _kernels.Torch(torch, forward_ad, WATCHERS, fresh_seed, True)
