import pytest
import torch

from swalp.training.augmentation import Draws
from swalp.training.data import epoch_order, evaluation_batches
from swalp.training.datasets import images as module
from swalp.training.datasets.images import MemoryImages


def images(channels):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (10, 6, 5, channels), dtype=torch.uint8, generator=generator)
    mean = torch.tensor([120.0, 100.0, 80.0])[:channels]
    return MemoryImages(pixels, torch.arange(10), mean, mean / 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_shifted_and_scaled_by_channel(channels):
    data = images(channels)
    assert data.shape == (channels, 6, 5)
    batches = list(data.batches([torch.tensor([3, 1]), torch.tensor([9])]))
    assert [y.tolist() for _, y in batches] == [[3, 1], [9]]
    x = batches[0][0]
    assert (x.shape, x.dtype) == ((2, channels, 6, 5), torch.float32)
    for channel in range(channels):
        mean = 120 - 20 * channel
        expected = (data.pixels[1, :, :, channel].double() - mean) / (mean / 2)
        assert torch.allclose(x[1, channel].double(), expected, atol=1e-6)


def test_colour_is_channels_last_and_grey_is_not():
    ((colour, _),) = images(3).batches([torch.arange(4)])
    assert colour.is_contiguous(memory_format=torch.channels_last)
    ((grey, _),) = images(1).batches([torch.arange(4)])
    assert grey.stride() == (30, 30, 5, 1)


def test_batches_leave_the_bytes_alone():
    data = images(3)
    before = data.pixels.clone()
    list(data.batches([torch.arange(10)], Draws(0, 0)))
    assert torch.equal(data.pixels, before)


def test_an_image_is_augmented_alike_in_any_batch():
    data = images(3)
    draws = Draws(seed=5, epoch=2)
    order = torch.tensor([4, 8, 0, 6, 2, 9, 1])
    ((together, _),) = data.batches([order], draws)
    alone = [x for x, _ in data.batches(order.split(1), draws)]
    assert torch.equal(together, torch.cat(alone))
    ((other_epoch, _),) = data.batches([order], Draws(5, 3))
    ((other_seed, _),) = data.batches([order], Draws(6, 2))
    ((plain, _),) = data.batches([order])
    for other in (other_epoch, other_seed, plain):
        assert not torch.equal(together, other)


def test_evaluation_takes_all_in_order_and_few_large_ones_at_once(monkeypatch):
    monkeypatch.setattr(module, "EVALUATION_BATCH", 4)
    batches = list(evaluation_batches(images(1)))
    assert [y.tolist() for _, y in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    ((plain, _),) = images(1).batches([torch.arange(10)])
    assert torch.equal(torch.cat([x for x, _ in batches]), plain)
    monkeypatch.setattr(module, "EVALUATION_PIXELS", 2 * 30 + 29)
    assert [len(y) for _, y in evaluation_batches(images(1))] == [2] * 5


def test_a_part_of_the_images():
    part = images(3).between(4, 7)
    assert part.labels.tolist() == [4, 5, 6]
    ((x, y),) = part.batches([torch.tensor([2])])
    ((expected, _),) = images(3).batches([torch.tensor([6])])
    assert torch.equal(x, expected)
    assert y.tolist() == [6]


def test_epoch_order_is_a_keyed_permutation():
    order = epoch_order(100, seed=3, epoch=2)
    assert order.sort().values.tolist() == list(range(100))
    assert torch.equal(order, epoch_order(100, seed=3, epoch=2))
    assert not torch.equal(order, epoch_order(100, seed=3, epoch=3))
    assert not torch.equal(order, epoch_order(100, seed=4, epoch=2))
