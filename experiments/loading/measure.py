"""How long a batch takes to load beside the float step that it feeds.

python experiments/loading/measure.py > experiments/loading/results.csv

CIFAR: random bytes in memory, cropped and flipped. ImageNet: 64 JPEG files of 500 x 375 pixels,
smooth with some noise so that they have the size of photographs, decoded, cut and flipped.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import nn

from swalp.training import config, data, loop
from swalp.training.augmentation import Draws
from swalp.training.datasets import imagenet
from swalp.training.environment import version

THREADS = 2
ROUNDS = 5
CASES = (
    ("cifar10-small", 128),
    ("cifar10-resnet20", 128),
    ("cifar10-vgg16", 128),
    ("imagenet-resnet18", 32),
)


def photographs(folder: Path) -> data.Dataset:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / split / "n0").mkdir(parents=True)
        for number in range(64 if split == "train" else 1):
            coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            smooth = np.asarray(
                Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
            )
            noisy = smooth + generator.normal(0, 12, smooth.shape)
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            image.save(folder / split / "n0" / f"{number}.JPEG", quality=90)
    return imagenet.load(folder)


def measured(preset: str, batch: int, photos: data.Dataset) -> dict[str, object]:
    """Milliseconds to load a batch and to take a step, medians."""
    settings = config.load(preset, [f"batch_size={batch}", f"threads={THREADS}"])
    made = data.synthetic(settings.data, batch)
    images = photos.train if settings.data == "imagenet" else made.train
    run = loop.begin(settings, made, "float", 0)
    run.model.train()
    loading, steps = [], []
    for number in range(1 + ROUNDS):
        rows = (
            [torch.arange(batch)] if images is made.train else list(torch.arange(64).split(batch))
        )
        began = time.perf_counter()
        *_, (x, y) = images.batches(rows, Draws(0, number))
        loading.append((time.perf_counter() - began) / len(rows))
        began = time.perf_counter()
        loss = nn.functional.cross_entropy(run.model(x), y)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        steps.append(time.perf_counter() - began)
    load, step = median(loading[1:]), median(steps[1:])
    return {
        "preset": preset,
        "batch": batch,
        "loading_ms": f"{1000 * load:.2f}",
        "step_ms": f"{1000 * step:.1f}",
        "loading_images_per_second": f"{batch / load:.0f}",
        "step_images_per_second": f"{batch / step:.0f}",
        "loading_share_of_step": f"{load / step:.3f}",
        "threads": THREADS,
        "seed": 0,
        "swalp": version("swalp"),
        "torch": torch.__version__,
        "device": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        photos = photographs(Path(folder))
        rows = [measured(preset, batch, photos) for preset, batch in CASES]
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
