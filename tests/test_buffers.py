"""Memory that is used again when the last tensor on it is gone, and not before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import swalp
from swalp import BlockFloat, FixedPoint, Stochastic, buffers
from swalp.quantize import plans

pytestmark = pytest.mark.skipif(not plans.available, reason="swalp was built without C++ kernels")
if plans.available:
    from swalp import _kernels

LARGE = buffers.SMALLEST // 4  # floats


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
    assert buffers.free_bytes() == 2 * buffers.SMALLEST
    buffers.release()
    assert buffers.free_bytes() == 0


def test_small_results_are_torch_s():
    assert buffers.empty(3, 5).shape == (3, 5)
    assert buffers.empty(0, 5).numel() == 0
    assert buffers.free_bytes() == 0


def test_without_the_kernels_all_results_are_torch_s(monkeypatch):
    monkeypatch.setattr(buffers, "_floats", None)
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


@pytest.mark.parametrize("keep", [None, 0, 1 << 22])
def test_no_two_tensors_share_memory(monkeypatch, keep):
    anew = _kernels.Buffers(buffers.SMALLEST, buffers.REGION, 64)
    monkeypatch.setattr(buffers, "_floats", anew)
    if keep is not None:
        anew.save(keep)
    generator = torch.Generator().manual_seed(0)
    alive: list[tuple[torch.Tensor, float]] = []
    for number in range(400):
        most = 5 if number % 7 else 60  # of large pages, too
        size = int(torch.randint(LARGE, most * LARGE, (), generator=generator))
        alive.append((buffers.empty(size).fill_(number), float(number)))
        while len(alive) > 6:
            tensor, value = alive.pop(int(torch.randint(len(alive), (), generator=generator)))
            assert bool((tensor == value).all())
    if keep is None:
        assert buffers.free_bytes() < 240 * buffers.SMALLEST
    assert all(bool((tensor == value).all()) for tensor, value in alive)


def test_more_than_a_region_holds(monkeypatch):
    anew = _kernels.Buffers(buffers.SMALLEST, 2 * buffers.SMALLEST, buffers.WINDOW)
    monkeypatch.setattr(buffers, "_floats", anew)
    small = [buffers.empty(LARGE).fill_(i) for i in range(5)]
    large = buffers.empty(4 * LARGE).fill_(9)
    assert [float(x.sum()) / LARGE for x in [*small, large]] == [0, 1, 2, 3, 4, 36]
    del small
    buffers.release()
    assert buffers.free_bytes() == 0
    assert float(large[-1]) == 9


def test_memory_that_was_of_no_use_for_long_goes_back(monkeypatch):
    anew = _kernels.Buffers(buffers.SMALLEST, buffers.REGION, 8)
    monkeypatch.setattr(buffers, "_floats", anew)
    kept = buffers.empty(LARGE).fill_(5)
    buffers.empty(40 * LARGE).fill_(1)
    for _ in range(16):
        buffers.empty(LARGE)
    assert buffers.free_bytes() <= buffers.SMALLEST
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


SAVING = """
from pathlib import Path
import torch
import swalp
from swalp import BlockFloat, FixedPoint, Stochastic, buffers

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

for name, empty in (("ours", buffers.empty), ("torch", torch.empty)):
    empty(8 << 20).fill_(1)  # now the C library has seen that such a size comes and goes
    if name == "ours":
        kept = buffers.empty(1 << 20).fill_(3)
        buffers.save_memory(keep=1 << 22)
        print(buffers.free_bytes() == 1 << 22)
        print(bool((kept == 3).all()))
    before = resident()
    for _ in range(2):
        x = empty(8 << 20).fill_(2)
        print(resident() - before > 27 << 20, bool((x == 2).all()))
        del x
        print(resident() - before < 8 << 20)
del kept
print(buffers.free_bytes() == 1 << 22)
print(buffers.empty(1 << 22).data_ptr() % (1 << 21) == 0)
buffers.release()
print(buffers.free_bytes() == 0)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for what is resident")
def test_save_memory_gives_it_back_at_once():
    run = subprocess.run(
        [sys.executable, "-c", SAVING], capture_output=True, text=True, timeout=120, check=True
    )
    assert set(run.stdout.split()) == {"True"}, run.stdout


def test_save_memory_keeps_no_negative_number_of_bytes():
    with pytest.raises(ValueError, match="keep=-1 must be a number of bytes, at least 0"):
        buffers.save_memory(-1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_forked_while_another_thread_takes_memory():
    program = """
import os, threading, torch
import swalp
from swalp import BlockFloat, FixedPoint, Stochastic, buffers
torch.set_num_threads(1)
kept = buffers.empty(1 << 17)
over = threading.Event()
def give_back():  # without Python's lock, but with that of the regions
    while not over.is_set():
        x = [buffers.empty(1 << 22).fill_(1) for _ in range(4)]
        del x
        buffers.release()
thread = threading.Thread(target=give_back)
thread.start()
failed = 0
for _ in range(100):
    child = os.fork()
    if child == 0:
        buffers.empty(1 << 17)
        os._exit(0)
    failed |= os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
over.set()
thread.join()
os._exit(failed)
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=60, check=False)
    assert run.returncode == 0
