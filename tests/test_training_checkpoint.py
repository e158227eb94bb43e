import errno
import json
import os
import shutil

import pytest
import torch

import swalp
from swalp.training import checkpoint
from swalp.training.mistakes import UserError


def example(number):
    weights = torch.linspace(-1, 1, 12).reshape(3, 4)
    return {
        "number": number,
        "third": 1 / 3,
        "none": None,
        "nested": {"list": [1, {"tensor": torch.arange(3) + number}], "text": "ü"},
        "optimizer": {0: {"step": 5, "momentum": -weights.t()}, 1: {}},
        "packed": swalp.pack(weights, swalp.BlockFloat(4, axes=(0,))),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 2),
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    path = checkpoint.save(tmp_path, 12, example(12))
    loaded = checkpoint.load_newest(tmp_path)
    assert (loaded.path, loaded.damaged) == (path, ())
    state, expected = loaded.state, example(12)
    assert list(state) == list(expected)
    assert (state["number"], state["third"], state["none"]) == (12, 1 / 3, None)
    assert torch.equal(state["nested"]["list"][1]["tensor"], torch.arange(3) + 12)
    assert state["nested"]["text"] == "ü"
    assert torch.equal(state["optimizer"][0]["momentum"], expected["optimizer"][0]["momentum"])
    assert (state["optimizer"][0]["step"], state["optimizer"][1]) == (5, {})
    assert isinstance(state["packed"], swalp.PackedTensor)
    assert torch.equal(state["packed"].codes, expected["packed"].codes)
    assert torch.equal(state["packed"].exponents, expected["packed"].exponents)
    assert state["scalar"].item() == 7
    assert state["empty"].shape == (0, 2)


def test_no_checkpoint(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None
    assert checkpoint.load_newest(tmp_path / "none") is None
    assert checkpoint.newest(tmp_path) is None


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 20, 300):
        checkpoint.save(tmp_path, step, example(step))
    assert names(tmp_path) == ["step-000000000020", "step-000000000300"]
    assert checkpoint.newest(tmp_path).name == "step-000000000300"
    assert checkpoint.load_newest(tmp_path).state["number"] == 300


def test_as_many_are_kept_as_asked(tmp_path):
    for step in range(1, 8):
        checkpoint.save(tmp_path, step, example(step), keep=1 if step == 3 else 3)
    assert names(tmp_path) == [f"step-{step:012d}" for step in (5, 6, 7)]


def damage_nothing_but(name, change):
    def damage(path):
        content = bytearray((path / name).read_bytes())
        (path / name).write_bytes(change(content))

    return damage


def flip(content):
    content[len(content) // 2] ^= 1
    return content


def older_version(content):
    return json.dumps(json.loads(content) | {"version": 0}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing_but("tensors.safetensors", flip),
        damage_nothing_but("state.json", flip),
        damage_nothing_but("manifest.json", lambda content: b""),
        damage_nothing_but("manifest.json", lambda content: b"[]"),
        damage_nothing_but("manifest.json", older_version),
        damage_nothing_but("tensors.safetensors", lambda content: content[:-1]),
        lambda path: (path / "tensors.safetensors").unlink(),
        lambda path: shutil.rmtree(path) or path.mkdir(),
    ],
)
def test_a_damaged_newest_one_is_passed_over_and_said(tmp_path, damage):
    older = checkpoint.save(tmp_path, 1, example(1))
    newer = checkpoint.save(tmp_path, 2, example(2))
    damage(newer)
    loaded = checkpoint.load_newest(tmp_path)
    assert (loaded.path, loaded.state["number"]) == (older, 1)
    assert len(loaded.damaged) == 1
    assert loaded.damaged[0].startswith(f"{newer}: damaged: ")
    assert "\n" not in loaded.damaged[0]


def test_the_good_one_outlives_a_damaged_newer_one(tmp_path):
    for step in (1, 20):
        checkpoint.save(tmp_path, step, example(step))
    shutil.rmtree(tmp_path / "step-000000000020")
    (tmp_path / "step-000000000020").mkdir()
    checkpoint.save(tmp_path, 5, example(5))
    assert names(tmp_path) == ["step-000000000001", "step-000000000005"]
    checkpoint.save(tmp_path, 5, example(6))
    assert checkpoint.load_newest(tmp_path).state["number"] == 6


def test_all_damaged(tmp_path):
    path = checkpoint.save(tmp_path, 1, example(1))
    (path / "state.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole: .*step-0+1: damaged: "):
        checkpoint.load_newest(tmp_path)


@pytest.mark.parametrize("failing", range(5))
def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch, failing):
    checkpoint.save(tmp_path, 1, example(1))
    calls = 0

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        if calls > failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, 2, example(2))
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded.damaged == ()
    assert loaded.state["number"] == (2 if failing == 4 else 1)
