"""The noise is Philox4x32-10 with the documented layout, and looks random where it must."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from swalp.noise import fresh_seed, philox, random_bits, stream_seed

WORDS = st.integers(0, 2**32 - 1)
PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]

# Random123, examples/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (PI[:4], PI[4:], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


def run(counter: list[int], seed: int) -> list[int]:
    words = philox(tuple(torch.tensor([word]) for word in counter), seed)
    return [int(word) for word in words]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zero", "ones", "pi"])
def test_philox_gives_the_published_vectors(counter, key, expected):
    assert run(counter, key[0] + (key[1] << 32)) == expected
    assert oracle.philox(counter, key) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(WORDS, min_size=4, max_size=4), st.integers(0, 2**64 - 1))
def test_philox_equals_python_integers(counter, seed):
    assert run(counter, seed) == oracle.philox(counter, [seed % 2**32, seed // 2**32])


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 41), bits=st.integers(1, 32), seed=st.integers(0, 2**64 - 1),
    step=WORDS, call=WORDS,
)  # fmt: skip
def test_layout(count, bits, seed, step, call):
    key = [seed % 2**32, seed // 2**32]
    expected = []
    for i in range(count):
        words = [oracle.philox([i // 8, high, step, call], key)[i // 2 % 4] for high in (0, 2**31)]
        upper, lower = (word >> 16 if i % 2 else word & 0xFFFF for word in words)
        expected.append((upper << 16 | lower) >> (32 - bits))
    assert random_bits(count, bits, seed, step, call).tolist() == expected


def test_fewer_bits_are_the_top_bits_of_more():
    whole = random_bits(100, 32, 9, 1, 2)
    for bits in range(1, 32):
        assert torch.equal(random_bits(100, bits, 9, 1, 2), whole >> (32 - bits))


def test_stream_seed_is_the_documented_hash():
    text = b"17/weight/features.0.weight"
    expected = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    assert stream_seed(17, "weight", "features.0.weight") == expected
    assert stream_seed(0, "weight", "w") == 8467858095957931890


def test_a_role_with_a_slash_would_be_ambiguous():
    with pytest.raises(ValueError, match="role='a/b' must not have a slash"):
        stream_seed(0, "a/b", "c")
    assert stream_seed(0, "a", "b/c") != stream_seed(0, "a", "b")


def test_fresh_seeds_follow_manual_seed():
    torch.manual_seed(3)
    first = [fresh_seed() for _ in range(20)]
    torch.manual_seed(3)
    assert [fresh_seed() for _ in range(20)] == first
    assert len(set(first)) == 20
    assert all(0 <= seed < 2**64 for seed in first)
    assert any(seed >= 2**63 for seed in first)


COUNT = 1 << 16


def uniforms(bits=32, seed=123, step=0, call=0) -> torch.Tensor:
    """Centred draws of unit variance."""
    draws = random_bits(COUNT, bits, seed, step, call).double()
    return ((draws + 0.5) / 2**bits - 0.5) * math.sqrt(12)


def stream(run_seed, role, name) -> torch.Tensor:
    return uniforms(seed=stream_seed(run_seed, role, name))


@pytest.mark.parametrize("bits", [4, 8, 9, 16, 17, 24, 32])
def test_every_value_is_equally_likely(bits):
    cells = 1 << min(bits, 8)
    draws = random_bits(COUNT, bits, 99, 0, 0) >> max(bits - 8, 0)
    observed = torch.bincount(draws, minlength=cells).double()
    expected = COUNT / cells
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    freedom = cells - 1
    # Within five standard deviations of chi-square's mean, on either side.
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("bit", [0, 1, 7, 15, 16, 30, 31])
def test_every_bit_is_a_fair_coin(bit):
    ones = (random_bits(COUNT, 32, 7, 0, 0) >> bit & 1).sum().item()
    assert abs(ones - COUNT / 2) < 5 * math.sqrt(COUNT / 4)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        *[(uniforms(bits)[:-lag], uniforms(bits)[lag:])
          for bits in (16, 32) for lag in (1, 2, 3, 4, 8)],
        (uniforms(), uniforms(step=1)),
        (uniforms(), uniforms(call=1)),
        (uniforms(step=1), uniforms(call=1)),
        (uniforms(), uniforms(seed=124)),
        (stream(1, "weight", "a"), stream(1, "weight", "b")),
        (stream(1, "weight", "a"), stream(1, "error", "a")),
        (stream(1, "weight", "a"), stream(2, "weight", "a")),
    ],
    ids=[*[f"neighbours {bits} bits, {lag} apart" for bits in (16, 32) for lag in (1, 2, 3, 4, 8)],
         "steps", "calls", "step for call", "seeds", "names", "roles", "runs"],
)  # fmt: skip
def test_no_correlation(left, right):
    # A correlation of independent draws has the standard deviation 1/sqrt(count).
    assert abs((left * right).mean().item()) < 5 / math.sqrt(len(left))
    # Nor do they rise and fall together about the middle.
    assert abs((left.abs() * right.abs()).mean().item() - 0.75) < 5 / math.sqrt(len(left))
