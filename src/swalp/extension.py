"""The compiled module, where it was built, and PyTorch as it knows it."""

from __future__ import annotations

import hashlib
from pathlib import Path

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

missing = ""  # why there are no kernels
stale = False  # they are those of other sources
try:  # after torch, whose OpenMP runtime the kernels share
    import swalp._kernels as _kernels
except ModuleNotFoundError:
    missing = "swalp was installed without a C++ compiler, or for another Python"
except ImportError as error:
    missing = f"the compiled module cannot be loaded ({error})"
else:  # an editable install takes new sources as they come, but is compiled when it is installed
    _stub = Path(__file__).with_name("_kernels.pyi")  # those who bundle programs may leave it out
    _made_of = getattr(_kernels, "STUB", "")
    stale = _stub.is_file() and hashlib.sha256(_stub.read_bytes()).hexdigest() != _made_of
    if stale:
        missing = "the compiled module is of other sources than these: it has to be built again"
available = not missing
if available:
    TORCH = _kernels.Torch(torch, forward_ad, WATCHERS, fresh_seed, True)
