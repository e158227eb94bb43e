"""Memory that goes back when the last tensor on it is gone, and not before."""

import torch

from swalp import buffers

LARGE = buffers.SMALLEST // 4


def test_a_block_is_used_again():
    buffers.release()
    x = buffers.empty(2, LARGE // 2)
    assert x.shape == (2, LARGE // 2)
    assert x.is_contiguous()
    address = x.data_ptr()
    part = x[1].view(-1, 4)
    del x
    assert buffers.empty(LARGE).data_ptr() != address  # `part` is on it
    del part
    y = buffers.empty(LARGE)
    assert buffers.empty(LARGE).data_ptr() != y.data_ptr()
    del y
    assert buffers.free_bytes() == 2 * buffers.SMALLEST
    buffers.release()
    assert buffers.free_bytes() == 0


def test_small_results_are_torch_s():
    buffers.release()
    assert buffers.empty(3, 5).shape == (3, 5)
    assert buffers.empty(0, 5).numel() == 0
    assert buffers.free_bytes() == 0


def test_free_blocks_of_other_sizes_are_dropped(monkeypatch):
    buffers.release()
    monkeypatch.setattr(buffers, "MOST_FREE", buffers.SMALLEST)
    for size in (LARGE, LARGE + 1, LARGE + 2):
        buffers.empty(size)
    buffers.empty(LARGE + 2)
    assert buffers.free_bytes() <= 2 * buffers.SMALLEST + 8
    buffers.release()


def test_gradients_on_a_block_are_not_overwritten():
    x = torch.ones(LARGE, requires_grad=True)
    y = buffers.empty(LARGE).fill_(3.0)
    (x * y).sum().backward()
    del y
    other = buffers.empty(LARGE).fill_(-1.0)
    assert torch.equal(x.grad, torch.full((LARGE,), 3.0))
    assert other[0] == -1
