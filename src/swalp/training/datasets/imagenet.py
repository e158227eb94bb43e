"""ImageNet, or other large photographs in a folder for each class: read when they are needed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from swalp.training.augmentation import ATTEMPTS, Draws, resized_crop
from swalp.training.datasets.images import Dataset, as_batch
from swalp.training.datasets.published import cache_dir
from swalp.training.mistakes import UserError

SIZE = 224  # pixels, height and width of what a network sees
RESIZED = 256  # the shorter side of a test image, of which the middle SIZE are taken
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
AHEAD = 2  # batches that are read while the network works on another
_SUFFIXES = (".jpeg", ".jpg", ".png")


@dataclass(frozen=True, slots=True, eq=False)
class FolderImages:
    """`Images` in files, decoded by threads while the network works.

    Attributes:
        files: paths of the images.
        labels: int64 (N,).
    """

    files: tuple[str, ...]
    labels: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """As of `Images`."""
        return 3, SIZE, SIZE

    def batches(
        self, rows: Iterable[Tensor], draws: Draws | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As of `Images`; `resized_crop` and a flip augment, else the middle is taken.

        Raises:
            UserError: a file is no image, or cannot be read.
        """
        # As many as PyTorch has, which wait while the network computes, and one that does not.
        pool = ThreadPoolExecutor(torch.get_num_threads() + 1)
        waiting: deque[tuple[Tensor, list[Future[Tensor]]]] = deque()
        try:
            for examples in rows:
                waiting.append((examples, self._submit(pool, examples, draws)))
                if len(waiting) > AHEAD:
                    yield self._batch(*waiting.popleft())
            while waiting:
                yield self._batch(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def between(self, first: int, last: int) -> FolderImages:
        """As of `Images`."""
        return replace(self, files=self.files[first:last], labels=self.labels[first:last])

    def _submit(
        self, pool: ThreadPoolExecutor, examples: Tensor, draws: Draws | None
    ) -> list[Future[Tensor]]:
        files = [self.files[example] for example in examples.tolist()]
        if draws is None:
            return [pool.submit(read, file) for file in files]
        tries = [draws.words(examples, attempt) for attempt in range(ATTEMPTS + 1)]
        words = torch.stack(tries).permute(2, 0, 1)  # the last of each example decides on the flip
        return [pool.submit(read, file, own) for file, own in zip(files, words, strict=True)]

    def _batch(self, examples: Tensor, images: list[Future[Tensor]]) -> tuple[Tensor, Tensor]:
        pixels = torch.stack([image.result() for image in images])
        mean, scale = 255 * torch.tensor(MEAN), 255 * torch.tensor(DEVIATION)
        return as_batch(pixels, mean, scale), self.labels[examples]


def read(file: str, words: Tensor | None = None) -> Tensor:
    """An image as the network sees it, before it is shifted and scaled.

    Args:
        file: its path.
        words: for a training image, int64 (ATTEMPTS + 1, 4): words of `Draws` for each attempt at
            `resized_crop`, and for the flip. Without them the middle is taken, 224 of 256 pixels
            of the shorter side.

    Returns:
        uint8 (SIZE, SIZE, 3).

    Raises:
        UserError: the file is no image, or cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            colour = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"{file}: cannot read the image: {reason}") from None
    width, height = colour.size
    boxes = () if words is None else (resized_crop(height, width, own) for own in words[:-1])
    box = next((found for found in boxes if found is not None), None)
    small = colour.resize(
        (SIZE, SIZE),
        Image.Resampling.BILINEAR,
        box=_middle(height, width, words is None) if box is None else box,
    )
    pixels = torch.from_numpy(np.array(small))
    flipped = words is not None and int(words[-1, 0]) >> 31 == 1
    return pixels.flip(1) if flipped else pixels


def load(data_dir: Path | None = None, *, fetch: bool = False) -> Dataset:
    """The images in ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``.

    Args:
        data_dir: the folder with ``train`` and ``val``, or the one with a folder ``imagenet`` that
            has them; default: `cache_dir`. Classes are numbered in the order of their names.
        fetch: refused: ImageNet is only given to those who accept its terms.

    Raises:
        UserError: there are no such folders, or no images in them, or another set of classes.
    """
    root = cache_dir() if data_dir is None else data_dir
    found = [place for place in (root / "imagenet", root) if (place / "train").is_dir()]
    if not found:
        option = "give --data-dir DIR; " if data_dir is None else ""
        refusal = "it cannot be downloaded from here, as" if fetch else "get it from"
        terms = " asks for its terms to be accepted" if fetch else ""
        raise UserError(
            f"no folder train of imagenet, with a folder of images for each class, in "
            f"{root / 'imagenet'} or {root}; {option}{refusal} https://image-net.org{terms}"
        )
    folder = found[0]
    classes = _folders(folder / "train")
    if not classes:
        raise UserError(f"{folder / 'train'}: it has no folders, one for each class of images")
    known = set(classes)
    others = [name for name in _folders(folder / "val") if name not in known]
    if others:
        raise UserError(
            f"{folder / 'val' / others[0]}: there is no class of that name in {folder / 'train'}"
        )
    return Dataset(
        train=_images(folder / "train", classes),
        test=_images(folder / "val", classes),
        classes=len(classes),
        origin=str(folder),
    )


def _middle(height: int, width: int, test: bool) -> tuple[float, float, float, float]:
    """The middle of an image as a box: for a test, or where no random cut fits."""
    side = min(height, width) * (SIZE / RESIZED if test else 1.0)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise UserError(f"{path}: cannot read the folder: {error.strerror}") from None


def _images(path: Path, classes: list[str]) -> FolderImages:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = path / name
        if not folder.is_dir():
            continue  # a validation set may lack a class
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name for entry in entries if entry.name.lower().endswith(_SUFFIXES)
            )
        files += [str(folder / each) for each in names]
        labels += [label] * len(names)
    if not files:
        raise UserError(
            f"{path}: no images ({', '.join(_SUFFIXES)}) in a folder for each class, such as "
            f"{path / classes[0]}"
        )
    return FolderImages(tuple(files), torch.tensor(labels))
