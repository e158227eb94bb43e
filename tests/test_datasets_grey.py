import gzip
import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from swalp.training import data
from swalp.training.datasets import grey
from swalp.training.mistakes import UserError


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small data set in the format of MNIST, under its name: folder, images and labels."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    arrays, files = [], {}
    parts = (
        ("train_x", "train-images-idx3", 30),
        ("train_y", "train-labels-idx1", 30),
        ("test_x", "t10k-images-idx3", 20),
        ("test_y", "t10k-labels-idx1", 20),
    )
    for field, name, count in parts:
        images = field.endswith("x")
        shape = (count, 28, 28) if images else (count,)
        values = generator.integers(0, 256 if images else 10, shape, dtype=np.uint8)
        content = struct.pack(f">{1 + len(shape)}I", 2048 + len(shape), *shape) + values.tobytes()
        compressed = gzip.compress(content)
        (folder / f"{name}-ubyte.gz").write_bytes(compressed)
        files[field] = replace(
            getattr(grey.PUBLISHED["mnist"], field),
            compressed=hashlib.sha256(compressed).hexdigest(),
            unpacked=hashlib.sha256(content).hexdigest(),
        )
        arrays.append(torch.tensor(values))
    monkeypatch.setitem(grey.PUBLISHED, "mnist", replace(grey.PUBLISHED["mnist"], **files))
    return folder, arrays


def test_digits():
    digits = data.load("digits")
    assert digits.train.shape == (1, 8, 8)
    assert (len(digits.test.labels), digits.classes) == (797, 10)
    ((x, y),) = digits.train.batches([torch.arange(1000)])
    assert x.shape == (1000, 1, 8, 8)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert y[:10].tolist() == list(range(10))
    assert x.mean().item() == pytest.approx(0, abs=1e-6)
    assert x.std().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("direct", [False, True])
def test_idx_files_are_found_in_both_places(published, direct):
    folder, (train_x, train_y, test_x, test_y) = published
    found = data.load("mnist", folder if direct else folder.parent)
    assert found.origin == str(folder)
    assert torch.equal(found.train.labels, train_y.long())
    assert torch.equal(found.test.labels, test_y.long())
    mean, scale = train_x.double().mean(), train_x.double().std(correction=0)
    expected = ((test_x.double() - mean) / scale).unsqueeze(1)
    ((x, _),) = found.test.batches([torch.arange(20)])
    assert torch.allclose(x.double(), expected, atol=1e-5)


def test_the_cache_is_the_default(published, monkeypatch):
    folder, _ = published
    monkeypatch.setattr(grey, "cache_dir", lambda: folder.parent)
    assert len(data.load("mnist").train.labels) == 30


def test_recompressed_files_are_the_same_files(published):
    folder, _ = published
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1))
    assert len(data.load("mnist", folder).test.labels) == 20


def test_missing_files_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError) as caught:
        data.load("mnist", tmp_path)
    assert str(caught.value) == (
        f"no train-images-idx3-ubyte.gz of mnist in {tmp_path / 'mnist'} or {tmp_path}; give "
        f"--download to fetch it from https://ossci-datasets.s3.amazonaws.com/mnist/"
    )
    monkeypatch.setattr(grey, "cache_dir", lambda: tmp_path)
    with pytest.raises(UserError, match="give --data-dir DIR or --download"):
        data.load("mnist")


def test_damaged_files(published):
    folder, _ = published
    path = folder / "train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    truncated, no_gzip, garbled = whole[:-10], b"plain text", bytearray(whole)
    garbled[len(whole) // 2] ^= 255
    for content in (truncated, no_gzip, bytes(garbled), b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: (truncated|corrupt)"):
            data.load("mnist", folder)
    path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(
        UserError, match=r"corrupt: unpacked, its SHA-256 is .* not train-labels-idx"
    ):
        data.load("mnist", folder)
    path.write_bytes((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(UserError, match=r"this is t10k-labels-idx1-ubyte\.gz of mnist, not train-"):
        data.load("mnist", folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot read: Is a directory"):
        data.load("mnist", folder)


def test_download_goes_to_a_folder_of_that_name(published, tmp_path, monkeypatch):
    import pooch

    folder, _ = published
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append((url, known_hash))
        path.mkdir(parents=True, exist_ok=True)
        (path / fname).write_bytes((folder / fname).read_bytes())
        return str(path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    target = tmp_path / "elsewhere"
    assert data.load("mnist", target, download=True).origin == str(target / "mnist")
    first = grey.PUBLISHED["mnist"].train_x
    assert asked[0] == (grey.PUBLISHED["mnist"].url + first.name, f"sha256:{first.compressed}")
    assert len(asked) == 4
    data.load("mnist", target, download=True)
    assert len(asked) == 4


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("hash\ndiffers")])
def test_failed_downloads_are_one_line(tmp_path, monkeypatch, error):
    import pooch

    def retrieve(*args, **kwargs):
        raise error

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(UserError, match=r"cannot download to .*: (no route|hash differs)$"):
        data.load("fashion-mnist", tmp_path, download=True)
