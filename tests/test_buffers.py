"""Memory that is used again when the last tensor on it is gone, and not before."""

import pytest
import torch

from swalp import buffers

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


def test_no_two_tensors_share_memory():
    generator = torch.Generator().manual_seed(0)
    alive: list[tuple[torch.Tensor, float]] = []
    for number in range(400):
        size = int(torch.randint(LARGE, 5 * LARGE, (), generator=generator))
        alive.append((buffers.empty(size).fill_(number), float(number)))
        while len(alive) > 6:
            tensor, value = alive.pop(int(torch.randint(len(alive), (), generator=generator)))
            assert bool((tensor == value).all())
    assert buffers.free_bytes() < 64 * buffers.SMALLEST
    assert all(bool((tensor == value).all()) for tensor, value in alive)


def test_more_than_a_region_holds(monkeypatch):
    monkeypatch.setattr(buffers, "REGION", 2 * buffers.SMALLEST)
    small = [buffers.empty(LARGE).fill_(i) for i in range(5)]
    large = buffers.empty(4 * LARGE).fill_(9)
    assert [float(x.sum()) / LARGE for x in [*small, large]] == [0, 1, 2, 3, 4, 36]
    del small
    buffers.release()
    assert buffers.free_bytes() == 0
    assert float(large[-1]) == 9


def test_memory_that_was_of_no_use_for_long_goes_back(monkeypatch):
    kept = buffers.empty(LARGE).fill_(5)
    buffers.empty(40 * LARGE).fill_(1)
    monkeypatch.setattr(buffers, "WINDOW", 8)
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
