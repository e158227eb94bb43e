import gzip
import lzma
from dataclasses import replace

import numpy as np
import pytest
import torch

import cifar_files
from swalp.training import data
from swalp.training.datasets import cifar
from swalp.training.datasets.published import md5
from swalp.training.mistakes import UserError

NAMES = ("cifar10", "cifar100")
LAYOUTS = ("python", "binary")


@pytest.fixture
def small(monkeypatch):
    """Both data sets with six images a file, under their names."""
    found = {name: cifar_files.Small(name) for name in NAMES}
    for name, files in found.items():
        monkeypatch.setitem(cifar.CIFAR, name, files.published)
    return found


def write(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def assert_whole(found, files):
    assert found.classes == files.published.classes
    assert found.train.shape == (3, 32, 32)
    for images, pixels, labels in (
        (found.train, files.pixels[:-1], files.labels[:-1]),
        (found.test, files.pixels[-1:], files.labels[-1:]),
    ):
        assert np.array_equal(images.pixels.numpy(), np.concatenate(pixels))
        assert images.labels.tolist() == [label for part in labels for label in part]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["", "name", "title", "folder"])
def test_folders_are_found_wherever_they_may_be(small, tmp_path, name, layout, place):
    files = small[name]
    within = {"": ".", "name": name, "title": files.published.title, "folder": "."}[place]
    folder = tmp_path / within / files.folder(layout)
    write(folder, files.files(layout))
    found = data.load(name, folder if place == "folder" else tmp_path)
    assert_whole(found, files)
    assert found.origin == str(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_each_file_may_be_compressed(small, tmp_path, name, layout, suffix, compress):
    files = small[name]
    packed = {key + suffix: compress(value) for key, value in files.files(layout).items()}
    write(tmp_path / files.folder(layout), packed)
    assert_whole(data.load(name, tmp_path), files)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_archives_need_no_unpacking(small, tmp_path, name, layout):
    files = small[name]
    path = tmp_path / files.published.archives[layout == "binary"].name
    files.write_archive(path, layout)
    found = data.load(name, tmp_path)
    assert_whole(found, files)
    assert found.origin == str(path)
    assert list(tmp_path.iterdir()) == [path]


def test_pixels_are_scaled_as_published(small, tmp_path):
    files = small["cifar10"]
    write(tmp_path / "cifar-10-batches-py", files.python)
    ((x, _),) = data.load("cifar10", tmp_path).test.batches([torch.arange(6)])
    green = (files.pixels[-1][..., 1] / 255 - 0.4822) / 0.1994
    assert np.allclose(x[:, 1].numpy(), green, atol=1e-5)


def test_missing_files_say_what_to_do(small, tmp_path, monkeypatch):
    with pytest.raises(UserError) as caught:
        data.load("cifar10", tmp_path)
    assert str(caught.value) == (
        f"no cifar-10-python.tar.gz, cifar-10-binary.tar.gz or folder cifar-10-batches-py or "
        f"cifar-10-batches-bin in {tmp_path}, {tmp_path}/cifar10 or {tmp_path}/cifar-10; give "
        f"--download to fetch it from https://www.cs.toronto.edu/~kriz/"
    )
    monkeypatch.setattr(cifar, "cache_dir", lambda: tmp_path)
    with pytest.raises(UserError, match="give --data-dir DIR or --download"):
        data.load("cifar100")


def test_a_missing_batch_is_named(small, tmp_path):
    write(tmp_path / "cifar-10-batches-py", small["cifar10"].python)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(UserError, match=r"data_batch_1 of cifar-10 is there, but no data_batch_3$"):
        data.load("cifar10", tmp_path)


def test_damaged_batches(small, tmp_path):
    files = small["cifar10"]
    folder = tmp_path / "cifar-10-batches-py"
    write(folder, files.python)
    path = folder / "data_batch_2"
    whole = path.read_bytes()
    for content in (whole[:-10], b"", b"text", whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: corrupt: unpacked, its MD5 is [0-9a-f]+, "):
            data.load("cifar10", tmp_path)
    path.write_bytes(files.python["data_batch_4"])
    with pytest.raises(UserError, match="this is data_batch_4 of cifar-10, not data_batch_2 of"):
        data.load("cifar10", tmp_path)
    path.rename(folder / "data_batch_2.xz")
    with pytest.raises(UserError, match=r"data_batch_2\.xz: truncated or no xz file"):
        data.load("cifar10", tmp_path)
    (folder / "data_batch_2.xz").write_bytes(lzma.compress(whole)[:-30])
    with pytest.raises(UserError, match=r"data_batch_2\.xz: truncated or no xz file"):
        data.load("cifar10", tmp_path)


def test_a_bomb_is_not_unpacked(small, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "_LIMIT", 2**20)
    folder = tmp_path / "cifar-10-batches-py"
    write(folder, small["cifar10"].python)
    (folder / "test_batch").unlink()
    (folder / "test_batch.xz").write_bytes(lzma.compress(bytes(2**21)))
    with pytest.raises(
        UserError, match=r"test_batch\.xz: unpacked, it has more than the 1,048,576"
    ):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\x80\x02cos\nsystem\nU\x06rm -rf\x85R.",
            r"it refers to os\.system, which no CIFAR file",
        ),
        (cifar_files.dictionary({"labels": cifar_files.numbers([1])}), "it has no 'data'"),
        (b"\x80\x02K\x01.", "not subscriptable"),
        (
            cifar_files.dictionary(
                {
                    "data": cifar_files.array(np.zeros((5, 3072), np.uint8)),
                    "labels": cifar_files.numbers([1] * 5),
                }
            ),
            "it does not hold 6 images",
        ),
        (
            cifar_files.dictionary(
                {
                    "data": cifar_files.array(np.zeros((6, 3072), np.uint8)),
                    "labels": cifar_files.numbers([1] * 5 + [12]),
                }
            ),
            r"corrupt: it has the label 12 of 0\.\.9",
        ),
    ],
)
def test_what_only_pretends_to_be_a_batch(small, tmp_path, monkeypatch, content, message):
    """Even with a right checksum nothing in a file is run."""
    files = small["cifar10"]
    write(tmp_path / "cifar-10-batches-py", files.python)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    forged = replace(files.published.test, md5=md5(content))
    monkeypatch.setitem(cifar.CIFAR, "cifar10", replace(files.published, test=forged))
    with pytest.raises(UserError, match=message) as caught:
        data.load("cifar10", tmp_path)
    assert "\n" not in str(caught.value)


def test_binary_files_of_another_size(small, tmp_path):
    files = small["cifar100"]
    write(tmp_path / "cifar-100-binary", files.binary)
    path = tmp_path / "cifar-100-binary" / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"it has 18,443 bytes where train\.bin of cifar-100 has 18,444"
    ):
        data.load("cifar100", tmp_path)


def test_damaged_archives(small, tmp_path):
    files = small["cifar10"]
    path = tmp_path / "cifar-10-python.tar.gz"
    files.write_archive(path, "python")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"text", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: truncated or no .tar.gz"):
            data.load("cifar10", tmp_path)
    files.write_archive(path, "binary")
    with pytest.raises(UserError, match=r"it has no data_batch_1, data_batch_2, .*, test_batch$"):
        data.load("cifar10", tmp_path)


def test_an_archive_with_a_huge_member(small, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "_LIMIT", 10_000)
    small["cifar10"].write_archive(tmp_path / "cifar-10-python.tar.gz", "python")
    with pytest.raises(UserError, match=r"data_batch_1 has .* bytes, more than the 10,000"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_download_fetches_the_python_archive(small, tmp_path, monkeypatch, name):
    import pooch

    files = small[name]
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append((url, known_hash))
        path.mkdir(parents=True, exist_ok=True)
        files.write_archive(path / fname, "python")
        return str(path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert_whole(data.load(name, tmp_path, download=True), files)
    assert_whole(data.load(name, tmp_path, download=True), files)
    archive = files.published.archives[0]
    assert asked == [(archive.url, archive.checksum)]
    assert archive.url == f"https://www.cs.toronto.edu/~kriz/{archive.name}"


def test_published_checksums_are_distinct():
    parts = [part for files in cifar.CIFAR.values() for part in files.parts]
    archives = [archive for files in cifar.CIFAR.values() for archive in files.archives]
    sums = [part.md5 for part in parts] + [archive.checksum for archive in archives]
    assert len(set(sums)) == len(sums) == 8 + 4
    assert sum(part.images for part in parts) == 120_000
