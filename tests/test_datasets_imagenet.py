import numpy as np
import pytest
import torch
from PIL import Image

from swalp.training import data, run_directory, study
from swalp.training.augmentation import ATTEMPTS, Draws, resized_crop
from swalp.training.datasets import imagenet
from swalp.training.mistakes import UserError
from tiny_runs import ARMS, settings, train

CLASSES = ("n01440764", "n02102040", "n03000684")


@pytest.fixture
def folder(tmp_path):
    """Four training and two test images of each class, of many shapes; one of them grey."""
    generator = np.random.default_rng(1)
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            where = tmp_path / "imagenet" / split / name
            where.mkdir(parents=True)
            for number in range(count):
                height, width = generator.integers(40, 320, 2)
                pixels = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((int(width), int(height)))
                if (label, number) == (1, 0):
                    image = image.convert("L")
                image.save(where / f"{name}_{number}.JPEG", quality=90)
    (tmp_path / "imagenet" / "train" / CLASSES[0] / "notes.txt").write_text("no image")
    return tmp_path / "imagenet"


def test_classes_are_numbered_by_name(folder):
    found = data.load("imagenet", folder.parent)
    assert (found.classes, found.origin) == (3, str(folder))
    assert found.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.load("imagenet", folder).test.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_middle_of_a_test_image(tmp_path):
    """A white square on black, of half the shorter side: 128 of the 256 pixels of that side."""
    image = Image.new("RGB", (600, 400))
    image.paste((255, 255, 255), (200, 100, 400, 300))
    image.save(tmp_path / "square.png")
    pixels = imagenet.read(str(tmp_path / "square.png"))
    assert (pixels.shape, pixels.dtype) == ((224, 224, 3), torch.uint8)
    bright = (pixels[..., 0] > 127).nonzero()
    assert bright.min(0).values.tolist() == [48, 48]
    assert bright.max(0).values.tolist() == [175, 175]


def test_a_training_image_is_the_cut_that_was_drawn(folder):
    images = data.load("imagenet", folder).train
    draws = Draws(seed=2, epoch=1)
    ((x, y),) = images.batches([torch.arange(12)], draws)
    assert y.tolist() == images.labels.tolist()
    flips = 0
    for example in range(12):
        words = [draws.words(torch.tensor([example]), n)[:, 0] for n in range(ATTEMPTS + 1)]
        with Image.open(images.files[example]) as file:
            image = file.convert("RGB")
        box = next(b for b in (resized_crop(image.height, image.width, w) for w in words) if b)
        expected = image.resize((224, 224), Image.Resampling.BILINEAR, box=box)
        flip = int(words[-1][0]) >= 2**31
        flips += flip
        if flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scaled = (np.asarray(expected) / 255 - imagenet.MEAN) / imagenet.DEVIATION
        assert np.allclose(x[example].permute(1, 2, 0).numpy(), scaled, atol=1e-5)
    assert 0 < flips < 12


def test_batches_do_not_depend_on_threads_or_company(folder):
    images = data.load("imagenet", folder).train
    draws = Draws(seed=0, epoch=3)
    order = torch.tensor([5, 0, 11, 7, 3])
    ((together, _),) = images.batches([order], draws)
    alone = torch.cat([x for x, _ in images.batches(order.split(1), draws)])
    assert torch.equal(together, alone)
    assert together.is_contiguous(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ((again, _),) = images.batches([order], draws)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, again)
    ((other, _),) = images.batches([order], Draws(0, 4))
    assert not torch.equal(together, other)


def test_a_shape_that_no_cut_fits_gives_its_middle(tmp_path):
    image = Image.new("RGB", (900, 1), (10, 20, 30))
    image.save(tmp_path / "line.png")
    words = torch.stack([Draws(0, 0).words(torch.tensor([0]), n)[:, 0] for n in range(11)])
    assert imagenet.read(str(tmp_path / "line.png"), words).unique().tolist() == [10, 20, 30]


def test_leaving_early_stops_the_readers(folder):
    images = data.load("imagenet", folder).train
    batches = images.batches(torch.arange(12).repeat(50).split(2))
    next(batches)
    batches.close()


def test_a_part_of_the_images(folder):
    images = data.load("imagenet", folder).train
    part = images.between(3, 5)
    ((x, y),) = part.batches([torch.tensor([1])])
    ((expected, _),) = images.batches([torch.tensor([4])])
    assert torch.equal(x, expected)
    assert y.tolist() == [1]


def test_damaged_images_are_named(folder):
    path = folder / "train" / CLASSES[1] / f"{CLASSES[1]}_2.JPEG"
    whole = path.read_bytes()
    images = data.load("imagenet", folder).train
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: cannot read the image: ") as caught:
            list(images.batches([torch.arange(12)]))
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match="cannot read the image: No such file or directory"):
        list(images.batches([torch.arange(12)]))


def test_missing_folders_say_what_to_do(tmp_path, folder, monkeypatch):
    with pytest.raises(UserError, match=r"no folder train of imagenet, .*; get it from https"):
        data.load("imagenet", tmp_path / "none")
    with pytest.raises(UserError, match="it cannot be downloaded from here, as https://image-net"):
        data.load("imagenet", tmp_path / "none", download=True)
    monkeypatch.setattr(imagenet, "cache_dir", lambda: tmp_path / "none")
    with pytest.raises(UserError, match="give --data-dir DIR; get it"):
        data.load("imagenet")
    (folder / "val" / "n09").mkdir()
    with pytest.raises(UserError, match=r"val/n09: there is no class of that name in .*train$"):
        data.load("imagenet", folder)
    (folder / "val").rename(folder / "test")
    with pytest.raises(UserError, match="val: cannot read the folder: No such file"):
        data.load("imagenet", folder)
    empty = tmp_path / "empty"
    (empty / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="train: it has no folders, one for each class"):
        data.load("imagenet", empty)
    (empty / "train" / "a").mkdir()
    (empty / "val").mkdir()
    with pytest.raises(UserError, match=r"train: no images \(\.jpeg, \.jpg, \.png\) in a folder"):
        data.load("imagenet", empty)


def test_a_run_on_a_folder_survives_a_stop(folder, tmp_path):
    changes = {
        "data": "imagenet",
        "augment": True,
        "model": "resnet18",
        "width": 2,
        "batch_size": 4,
        "epochs": 2,
        "averaging_start": 1,
        "average_every": "epoch",
        "arms": ARMS[1:],
    }
    examples = data.load("imagenet", folder)
    found = []
    for name, stop_at in (("whole", None), ("stopped", 2)):
        run = run_directory.create(tmp_path / name, settings(**changes))
        if stop_at:
            with pytest.raises(study.Stopped):
                train(run, stop_at=stop_at, examples=examples)
        train(run, examples=examples)
        average = run.model_path(ARMS[1], 0, "average").read_bytes()
        found.append((run.metrics(), run.summary(), average))
    assert found[0] == found[1]
    assert len(found[0][0]) == 2
