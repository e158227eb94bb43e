import math

import numpy as np
import pytest
import torch

from swalp.noise import philox, stream_seed
from swalp.training.augmentation import ATTEMPTS, Draws, crop_flip, resized_crop


def by_hand(image, words):
    """The same crop and flip with NumPy, one image at a time."""
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    down, right = (int(word) * 9 // 2**32 for word in words[:2])
    part = padded[down : down + image.shape[0], right : right + image.shape[1]]
    return part[:, ::-1] if int(words[2]) >= 2**31 else part


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 20, 1)])
def test_crop_flip_equals_the_same_by_hand(shape):
    pixels = torch.randint(1, 256, (200, *shape), dtype=torch.uint8)
    words = Draws(seed=3, epoch=7).words(torch.arange(200) * 17)
    found = crop_flip(pixels, words)
    assert (found.shape, found.dtype) == (pixels.shape, torch.uint8)
    for image, column, result in zip(pixels, words.T, found, strict=True):
        assert np.array_equal(result.numpy(), by_hand(image.numpy(), column.tolist()))


def test_words_at_the_ends_of_their_range():
    pixels = torch.arange(1, 65, dtype=torch.uint8).view(1, 8, 8, 1)
    low = torch.zeros(4, 1, dtype=torch.int64)
    high = torch.full((4, 1), 2**32 - 1)
    assert crop_flip(pixels, low)[0, 4:, 4:, 0].equal(pixels[0, :4, :4, 0])
    assert crop_flip(pixels, low)[0, :4].sum() == 0
    assert crop_flip(pixels, high)[0, :4, 4:, 0].equal(pixels[0, 4:, 4:, 0].flip(1))


def test_draws_are_philox_at_the_documented_counter():
    words = Draws(seed=11, epoch=5).words(torch.tensor([2, 40_000_000]), attempt=3)
    counter = [torch.tensor([value]) for value in (40_000_000, 0, 5, 3)]
    expected = philox(tuple(counter), stream_seed(11, "augmentation", ""))
    assert [int(word) for word in words[:, 1]] == [int(word) for word in expected]


def test_all_crops_and_flips_are_equally_frequent():
    words = Draws(seed=0, epoch=0).words(torch.arange(81_000))
    down, right, flip = words[0] * 9 >> 32, words[1] * 9 >> 32, words[2] >> 31
    counts = (down * 9 + right).bincount(minlength=81)
    # 1000 expected; 5 standard deviations of the binomial are 157.
    assert counts.sub(1000).abs().max() < 157
    assert abs(int(flip.sum()) - 40_500) < 5 * math.sqrt(81_000 / 4)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (32, 32), (1, 900)])
def test_resized_crops_have_the_published_areas_and_shapes(height, width):
    found = 0
    for example in range(300):
        words = Draws(seed=1, epoch=0).words(torch.tensor([example]))[:, 0]
        box = resized_crop(height, width, words)
        if box is None:
            continue
        found += 1
        left, top, right, bottom = box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        if min(height, width) > 100:
            area = (right - left) * (bottom - top) / (height * width)
            assert 0.075 < area < 1.005
            assert 0.73 < (right - left) / (bottom - top) < 1.37
    assert found > 150 if height > 1 else found == 0
    assert ATTEMPTS == 10


def test_resized_crops_reach_every_corner():
    boxes = [
        resized_crop(100, 100, Draws(2, 0).words(torch.tensor([example]))[:, 0])
        for example in range(2000)
    ]
    boxes = [box for box in boxes if box is not None]
    for side, end in ((0, 0), (1, 0), (2, 100), (3, 100)):
        assert any(box[side] == end for box in boxes)
