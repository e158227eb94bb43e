"""Memory that is used again when the last tensor on it is gone, and not before."""

import os
import subprocess
import sys

import pytest
import torch

import swalp
from swalp import BlockFloat, FixedPoint, Stochastic, buffers
from swalp.quantize import plans

pytestmark = pytest.mark.skipif(not plans.available, reason="swalp was built without C++ kernels")
if plans.available:
    from swalp import _kernels

LARGE = buffers.SMALLEST // 4  # floats
PAGE = 1 << 21  # bytes
SHARES = pytest.mark.skipif(sys.platform != "linux", reason="PyTorch shares its memory on Linux")


@pytest.fixture(autouse=True)
def _anew():
    buffers.release()
    assert buffers.free_bytes() == 0
    yield
    buffers.release()


def test_memory_is_used_again():
    x = buffers.empty(2, LARGE // 2)
    assert x.shape == (2, LARGE // 2)
    assert x.is_contiguous()
    assert not x._is_view()
    address = x.data_ptr()
    part = x[1].view(-1, 4)
    del x
    assert buffers.empty(LARGE).data_ptr() != address  # `part` is on it
    del part
    y = buffers.empty(LARGE)
    assert y.data_ptr() == address
    assert buffers.empty(LARGE).data_ptr() != address
    del y
    assert buffers.free_bytes() == PAGE  # all that the system gave
    buffers.release()
    assert buffers.free_bytes() == 0


def test_small_results_are_torch_s():
    assert buffers.empty(3, 5).shape == (3, 5)
    assert buffers.empty(0, 5).numel() == 0
    assert buffers.free_bytes() == 0


def test_without_the_kernels_all_results_are_torch_s(monkeypatch):
    monkeypatch.setattr(buffers, "floats", None)
    x = buffers.empty(2, 8, LARGE, channels_last=True)
    assert x.shape == (2, 8, LARGE)
    assert x.movedim(1, -1).is_contiguous()
    assert not buffers.holds(x)
    assert buffers.free_bytes() == 0


def test_channels_last_and_other_types():
    x = buffers.empty(4, 64, 64, 64, channels_last=True, dtype=torch.int8).fill_(7)
    assert x.dtype == torch.int8
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.sum(dtype=torch.int64) == 7 * x.numel()


def test_neighbours_join_and_the_lowest_place_that_fits_is_taken():
    one, two, three, four = (buffers.empty(LARGE) for _ in range(4))
    first, third = one.data_ptr(), three.data_ptr()
    del one, three
    wide = buffers.empty(2 * LARGE)
    assert wide.data_ptr() > four.data_ptr()
    assert buffers.empty(LARGE).data_ptr() == first
    del two
    assert buffers.empty(3 * LARGE).data_ptr() == first
    assert third == first + 2 * buffers.SMALLEST


def run_alone(program):
    """In a process of its own, which must end well; returns what it prints."""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert not run.returncode, run.stderr
    return run.stdout


SHARING = """
import torch
from swalp import buffers, _kernels

assert not {shared} or buffers.share_with_torch()
LARGE = buffers.SMALLEST // 4
buffers.floats = _kernels.Buffers(buffers.SMALLEST, buffers.REGION, 64)
# Several regions.
buffers.codes = _kernels.Buffers(buffers.SMALLEST, 160 * buffers.SMALLEST, 64)
generator = torch.Generator().manual_seed(0)
alive = []
for number in range(400):
    most = 5 if number % 7 else 60  # of large pages, too
    size = int(torch.randint(LARGE, most * LARGE, (), generator=generator))
    dtype = torch.float32 if number % 3 else torch.int8  # memory moves from one to the other
    size *= 1 if number % 3 else 4
    value = number % 100
    alive.append((buffers.empty(size, dtype=dtype).fill_(value), value))
    other = torch.full((int(torch.randint(1, 1 << 22, (), generator=generator)),), value + 0.5)
    alive.append((other, value + 0.5))
    while len(alive) > 9:
        tensor, value = alive.pop(int(torch.randint(len(alive), (), generator=generator)))
        assert bool((tensor == value).all())
assert buffers.free_bytes() < 400 * buffers.SMALLEST
assert all(bool((tensor == value).all()) for tensor, value in alive)
"""


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=SHARES)])
def test_no_two_tensors_share_memory(shared):
    run_alone(SHARING.format(shared=shared))


def test_more_than_a_region_holds(monkeypatch):
    anew = _kernels.Buffers(buffers.SMALLEST, 2 * buffers.SMALLEST, buffers.WINDOW)
    monkeypatch.setattr(buffers, "floats", anew)
    small = [buffers.empty(LARGE).fill_(i) for i in range(5)]
    large = buffers.empty(4 * LARGE).fill_(9)
    assert [float(x.sum()) / LARGE for x in [*small, large]] == [0, 1, 2, 3, 4, 36]
    del small
    buffers.release()
    assert buffers.free_bytes() == 0
    assert float(large[-1]) == 9


def test_memory_that_was_of_no_use_for_long_goes_back(monkeypatch):
    anew = _kernels.Buffers(buffers.SMALLEST, buffers.REGION, 8)
    monkeypatch.setattr(buffers, "floats", anew)
    kept = buffers.empty(LARGE).fill_(5)
    buffers.empty(40 * LARGE).fill_(1)
    assert buffers.free_bytes() > 4 * PAGE
    for _ in range(16):
        buffers.empty(LARGE)
    assert buffers.free_bytes() <= PAGE
    assert bool((kept == 5).all())


def test_gradients_on_a_block_are_not_overwritten():
    x = torch.ones(LARGE, requires_grad=True)
    y = buffers.empty(LARGE).fill_(3.0)
    (x * y).sum().backward()
    del y
    other = buffers.empty(LARGE).fill_(-1.0)
    assert torch.equal(x.grad, torch.full((LARGE,), 3.0))
    assert other[0] == -1


@pytest.mark.parametrize("optimizer", [swalp.optim.SGD, swalp.optim.Adam])
def test_what_is_read_is_left_as_it_was(optimizer):
    # The kernels write to it: what was there, so that other threads may write there soon.
    patterns = torch.arange(LARGE, dtype=torch.int32) * 12289
    x = buffers.empty(4, LARGE // 4)
    x.view(torch.int32).copy_(patterns.view(4, -1))
    before = x.clone().view(torch.int32)
    tame = torch.nan_to_num(x).clamp(-9, 9)
    for fmt in (BlockFloat(8), BlockFloat(8, axes=(0,)), FixedPoint(8, 4)):
        swalp.quantize(x, fmt, Stochastic(0))
        assert torch.equal(x.view(torch.int32), before)
    gradient = buffers.empty(4, LARGE // 4).copy_(tame)
    swalp.pack(gradient, BlockFloat(8))
    assert torch.equal(gradient, tame)
    layer = torch.nn.Linear(LARGE // 4, 4, bias=False)
    layer.weight.grad = gradient
    optimizer(layer.named_parameters(), lr=0.1, recipe=swalp.recipes.get("native-8")).step()
    assert torch.equal(gradient, tame)


MOVING = """
from pathlib import Path
import torch
import swalp
from swalp import buffers

MB = 1 << 20

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def check():
    x, kept = buffers.empty(16 * MB).fill_(1), buffers.empty(MB).fill_(2)
    del x
    before = resident()
    codes = buffers.empty(40 * MB, dtype=torch.int8).fill_(3)
    some, most = buffers.empty(MB).fill_(4), buffers.empty(4 * MB).fill_(5)
    for tensor, value in [(kept, 2), (codes, 3), (some, 4), (most, 5)]:
        assert bool((tensor == value).all())
    assert buffers.free_bytes() <= 8 * MB, buffers.free_bytes()
    return resident() - before

check()  # what is loaded only once
grown = check()
assert grown < 16 * MB, grown  # less than the codes
"""


def _moves() -> bool:
    """Whether the system moves pages."""
    return sys.platform == "linux" and tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 7)


@pytest.mark.skipif(not _moves(), reason="Linux moves pages from 5.7 on")
def test_codes_use_what_floats_left_free():
    run_alone(MOVING)


STUCK = """
import ctypes, torch
import swalp
from swalp import buffers

MB = 1 << 20
x, kept = buffers.empty(16 * MB).fill_(1), buffers.empty(MB).fill_(2)
# Every page becomes two mappings, which older systems do not move.
for page in range(x.data_ptr(), x.data_ptr() + 64 * MB, 2 * MB):
    assert not ctypes.CDLL(None).madvise(ctypes.c_void_p(page), ctypes.c_size_t(4096), 10)
del x
codes = [buffers.empty(8 * MB, dtype=torch.int8).fill_(each) for each in range(3, 8)]
floats = buffers.empty(16 * MB).fill_(9)
for tensor, value in [(kept, 2), (floats, 9), *zip(codes, range(3, 8))]:
    assert bool((tensor == value).all())
del codes, floats
assert bool((buffers.empty(40 * MB, dtype=torch.int8).fill_(5) == 5).all())
buffers.release()
assert bool((kept == 2).all())
"""


@pytest.mark.skipif(not _moves(), reason="Linux moves pages from 5.7 on")
def test_memory_that_is_apart_moves_or_stays():
    run_alone(STUCK)


TOGETHER = """
from pathlib import Path
import torch
import swalp
from swalp import buffers

MB = 1 << 20

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

early = torch.empty(16 * MB).fill_(7)  # from the C library
assert buffers.share_with_torch()
assert buffers.share_with_torch()  # as before
del early
assert buffers.free_bytes() == 0

def check():
    x = torch.empty(16 * MB).fill_(1)
    small = torch.empty(MB // 4).fill_(6)  # from the C library
    assert not buffers.holds(x)  # no result
    del x
    assert buffers.free_bytes() >= 64 * MB
    before = resident()
    ours = buffers.empty(8 * MB).fill_(2)
    codes = buffers.empty(16 * MB, dtype=torch.int8).fill_(3)
    theirs = torch.ones(3 * MB).mul_(4)
    assert theirs.data_ptr() % 4096 == 0
    for tensor, value in [(ours, 2), (codes, 3), (theirs, 4), (small, 6)]:
        assert bool((tensor == value).all())
    theirs.resize_(4 * MB)
    assert bool((theirs[: 3 * MB] == 4).all())
    shared = theirs.clone().share_memory_()  # elsewhere
    assert bool((shared[: 3 * MB] == 4).all())
    del shared
    array = theirs.numpy()
    del theirs
    assert (array[: 3 * MB] == 4).all()
    return resident() - before

check()  # what is loaded only once
grown = check()
assert grown < 8 * MB, grown
assert buffers.free_bytes() >= 64 * MB
buffers.release()
assert buffers.free_bytes() == 0
"""


@SHARES
def test_torch_s_tensors_use_what_ours_left_and_ours_what_they_left():
    run_alone(TOGETHER)


THREADS = """
import threading, torch
import swalp
from swalp import buffers
assert buffers.share_with_torch()
torch.set_num_threads(1)
failed = []

def work(number):
    generator = torch.Generator().manual_seed(number)
    alive = []
    for turn in range(300):
        size = int(torch.randint(1, 1 << 20, (), generator=generator))
        value = float(1000 * number + turn)
        alive.append((torch.full((size,), value), value))
        alive.append((buffers.empty(size).fill_(-value), -value))
        while len(alive) > 6:
            tensor, value = alive.pop(int(torch.randint(len(alive), (), generator=generator)))
            if not bool((tensor == value).all()):
                failed.append(value)

threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
"""


@SHARES
def test_torch_s_tensors_come_and_go_in_several_threads():
    run_alone(THREADS)


IN_TIME = """
import importlib, os, resource, torch
from pathlib import Path
import swalp
from swalp import buffers, _kernels

MB = 1 << 20
WINDOW = 64
buffers._torch = _kernels.Buffers.of_torch(MB, 16 * MB, WINDOW)  # small regions
buffers.floats = _kernels.Buffers(buffers.SMALLEST, 16 * MB, WINDOW)

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

def use(count, megabytes=1):
    for _ in range(count):
        torch.empty(megabytes * MB, dtype=torch.int8).fill_(1)

# What was free for long goes back, also below what stays, and what results of ours left.
large, ours = torch.ones(32 * MB), buffers.empty(16 * MB).fill_(1)
kept = torch.ones(MB)
before = status("VmRSS")
del large, ours
assert buffers.free_bytes() >= 192 * MB
use(2 * WINDOW + 1)
assert buffers.free_bytes() <= 16 * MB, buffers.free_bytes()
assert status("VmRSS") <= before - 176 * MB
# What is used from time to time stays.
for _ in range(8):
    use(WINDOW // 4, 100)
assert 96 * MB <= buffers.free_bytes() <= 128 * MB

# A child of fork begins without.
child = os.fork()
if child == 0:
    os._exit(int(buffers.free_bytes() != 0 or kept[-1].item() != 1))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

# Growing tensors: every size has a region, which goes with it.
space = status("VmSize")
x = torch.ones(MB)
for _ in range(60):
    x = torch.cat([x, torch.ones(MB)])
assert x.min() == 1
assert status("VmSize") - space < 1200 * MB, status("VmSize") - space

# Where addresses are few, those without a tensor go.
buffers.release()
one = torch.ones(200 * MB, dtype=torch.int8)
other = buffers.empty(400 * MB, dtype=torch.int8)
del one, other
limit = status("VmSize") + 100 * MB
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
assert torch.ones(600 * MB, dtype=torch.int8)[-1] == 1
for count in (2**60, 10**13):
    try:
        torch.empty(count)
    except RuntimeError as error:
        assert "allocate" in str(error), error
    else:
        raise AssertionError("more than there is")
importlib.reload(buffers)
assert buffers.share_with_torch()
assert buffers._torch.holds(x.data_ptr())
assert bool((kept == 1).all())
"""


@SHARES
def test_what_is_of_no_use_goes_back():
    run_alone(IN_TIME)


BY_RECIPE = """
import torch
import swalp
from swalp import buffers

def shared():
    return buffers._torch is not None

swalp.convert(torch.nn.Linear(4, 4), "paper-small-block-8")
assert not shared()
swalp.convert(torch.nn.Linear(4, 4), "native-8")
assert shared() == {shared}
assert buffers.share_with_torch() == {shared}
torch.manual_seed(0)
model = swalp.convert(torch.nn.Linear(1024, 1024), "native-8")
x = torch.randn(1024, 1024, requires_grad=True)
model(x).sum().backward()
print(x.grad.double().sum().item(), model.weight.grad.double().sum().item())
"""


@SHARES
def test_native_recipes_share_memory_unless_told_otherwise(monkeypatch):
    with_it = run_alone(BY_RECIPE.format(shared=True))
    monkeypatch.setenv("SWALP_SHARE_MEMORY", "0")
    assert run_alone(BY_RECIPE.format(shared=False)) == with_it


def test_a_wrong_word_about_sharing_memory_is_refused(monkeypatch):
    monkeypatch.setenv("SWALP_SHARE_MEMORY", "no")
    with pytest.raises(ValueError, match=r"^SWALP_SHARE_MEMORY=no: it may be 0 or 1, or unset"):
        buffers.share_with_torch()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_forked_while_another_thread_takes_memory():
    program = """
import os, threading, torch
import swalp
from swalp import BlockFloat, FixedPoint, Stochastic, buffers
torch.set_num_threads(1)
buffers.share_with_torch()
kept = buffers.empty(1 << 17)
over = threading.Event()
def give_back():  # without Python's lock, but with that of the regions
    while not over.is_set():
        x = [make(1 << 22).fill_(1) for make in (buffers.empty, torch.empty) for _ in range(2)]
        del x
        buffers.release()
thread = threading.Thread(target=give_back)
thread.start()
failed = 0
for _ in range(100):
    child = os.fork()
    if child == 0:
        buffers.empty(1 << 17)
        torch.empty(1 << 20)
        os._exit(0)
    failed |= os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
over.set()
thread.join()
os._exit(failed)
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=60, check=False)
    assert run.returncode == 0
