"""Published files: where they are looked for, fetched from, and how they are known."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from swalp.training.mistakes import UserError

_ANEW = "delete it, and fetch it anew, such as with --download"


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file to download, with its checksum as pooch writes it: ``sha256:…`` or ``md5:…``."""

    url: str
    checksum: str

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[-1]


def cache_dir() -> Path:
    """Where files are looked for and downloaded to if nothing else is said."""
    import pooch

    return Path(pooch.os_cache("swalp"))


def download(file: PublishedFile, target: Path) -> Path:
    """Fetch `file` into the folder `target`, unless it is there.

    Raises:
        UserError: no network, a full disk, or another checksum.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")
    try:
        found = pooch.retrieve(file.url, file.checksum, fname=file.name, path=target)
    except (OSError, ValueError) as error:  # no network, full disk; another checksum
        reason = " ".join(str(error).split())
        raise UserError(f"{file.url}: cannot download to {target}: {reason}") from None
    return Path(found)


def contents(path: Path, limit: int) -> bytes:
    """All bytes of a file, unpacked if its name ends in ``.gz`` or ``.xz``.

    Raises:
        UserError: it cannot be read, is truncated, damaged, or exceeds `limit` bytes unpacked.
    """
    try:
        with _opened(path) as file:
            content = file.read(limit + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        kind = "gzip" if path.suffix == ".gz" else "xz"
        raise UserError(f"{path}: truncated or no {kind} file: {error}; {_ANEW}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    if len(content) > limit:
        raise UserError(f"{path}: unpacked, it has more than the {limit:,} bytes of the right file")
    return content


def _opened(path: Path) -> BinaryIO | gzip.GzipFile | lzma.LZMAFile:
    match path.suffix:
        case ".gz":
            return gzip.open(path)
        case ".xz":
            return lzma.open(path)
    return path.open("rb")


def members(path: Path, names: Sequence[str], limit: int) -> dict[str, bytes]:
    """The bytes of some members of a ``.tar.gz``, by the last part of their names.

    Nothing is written to the disk.

    Raises:
        UserError: it cannot be read, is truncated or damaged, lacks a member, or one exceeds
            `limit` bytes.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if name not in names or name in found or not member.isfile():
                    continue
                if member.size > limit:
                    raise UserError(
                        f"{path}: {member.name} has {member.size:,} bytes, more than the "
                        f"{limit:,} of the right file"
                    )
                file = archive.extractfile(member)
                assert file is not None  # it is a file
                found[name] = file.read()
                if len(found) == len(names):
                    return found
    except (EOFError, tarfile.TarError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: truncated or no .tar.gz: {error}; {_ANEW}") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot read: {reason}") from None
    missing = ", ".join(name for name in names if name not in found)
    raise UserError(f"{path}: it has no {missing}")


def md5(content: bytes) -> str:
    """The checksum by which the authors of data sets of that time name files."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
