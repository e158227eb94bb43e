"""Small files in the layouts of CIFAR, written opcode by opcode as Python 2 wrote them."""

import io
import struct
import tarfile
from dataclasses import replace

import numpy as np

from swalp.training.datasets import cifar
from swalp.training.datasets.published import md5

ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07"
)
DTYPE = (
    b"cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87Rq\x09"
    b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)


def text(value):
    return b"U" + bytes([len(value)]) + value.encode("latin-1")


def number(value):
    return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)


def array(rows):
    """A uint8 array of two dimensions."""
    shape = number(rows.shape[0]) + number(rows.shape[1]) + b"\x86"
    content = rows.tobytes()
    binary = b"T" + struct.pack("<i", len(content)) + content
    return ARRAY + b"(K\x01" + shape + DTYPE + b"\x89" + binary + b"tb"


def numbers(values):
    return b"]q\x10(" + b"".join(map(number, values)) + b"e"


def dictionary(entries):
    """A whole pickle: a dict from text to what is already encoded."""
    items = b"".join(text(key) + value for key, value in entries.items())
    return b"\x80\x02}q\x01(" + items + b"u."


class Small:
    """A data set in the form of CIFAR-10 or CIFAR-100, with a few images in each file."""

    def __init__(self, name, images=6):
        published = cifar.CIFAR[name]
        generator = np.random.default_rng(len(name))
        self.pixels, self.labels, self.python, self.binary, parts = [], [], {}, {}, []
        for part in published.parts:
            rows = generator.integers(0, 256, (images, cifar.PIXELS), dtype=np.uint8)
            labels = generator.integers(0, published.classes, images).tolist()
            extra = {"coarse_labels": numbers([0] * images)} if name == "cifar100" else {}
            content = dictionary({"data": array(rows), published.labels: numbers(labels)} | extra)
            before = [b"\x00"] if name == "cifar100" else []
            records = [
                b"".join([*before, bytes([label]), row.tobytes()])
                for label, row in zip(labels, rows, strict=True)
            ]
            parts.append(replace(part, md5=md5(content), images=images))
            self.python[part.name] = content
            self.binary[f"{part.name}.bin"] = b"".join(records)
            self.pixels.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            self.labels.append(labels)
        self.published = replace(published, train=tuple(parts[:-1]), test=parts[-1])

    def files(self, layout):
        return self.binary if layout == "binary" else self.python

    def folder(self, layout):
        return self.published.folders[layout == "binary"]

    def write_archive(self, path, layout):
        with tarfile.open(path, "w:gz") as archive:
            for name, content in {"batches.meta": b"(", **self.files(layout)}.items():
                member = tarfile.TarInfo(f"{self.folder(layout)}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
