import errno
import os

import pytest

from swalp import durable


def no_space(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path, folder = tmp_path / "file", tmp_path / "folder"
    durable.write_file(path, b"old")
    durable.write_directory(folder, {"a": b"old"})
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left") as caught:
            durable.write_file(path, b"new")
        assert caught.value.filename == str(path)
        with pytest.raises(OSError, match="No space left") as caught:
            durable.write_directory(folder, {"a": b"new"})
        assert caught.value.filename == str(folder / "a")
    assert path.read_bytes() == (folder / "a").read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_an_error_without_a_number_keeps_its_words(tmp_path):
    with pytest.raises(OSError, match="torn") as caught, durable.naming(tmp_path):
        raise OSError("torn")
    assert (caught.value.strerror, caught.value.filename) == ("torn", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught, durable.naming(tmp_path):
        (tmp_path / "absent").read_bytes()
    assert caught.value.filename == str(tmp_path / "absent")


def test_content_is_replaced(tmp_path):
    path, folder = tmp_path / "file", tmp_path / "folder"
    (tmp_path / ".folder.unfinished").mkdir()  # of a killed process
    (tmp_path / ".folder.unfinished" / "b").touch()
    for content in (b"old", b"new"):
        durable.write_file(path, content)
        durable.write_directory(folder, {"a": content})
        assert path.read_bytes() == (folder / "a").read_bytes() == content
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]
    assert [entry.name for entry in folder.iterdir()] == ["a"]
