"""The random bits: Philox4x32-10, a pure function of key and counter.

Layout, which every kernel reproduces. The bits of element i (its row-major index in the tensor,
whatever the memory layout) come from the Philox block with

* key     = the 64-bit stream seed, (low word, high word);
* counter = (block low word, block high word, step, call), block = i // 8;
* of the block's word (i // 2) % 4, even i take the low half, odd i the high: the element's upper 16
  bits. Its lower 16 bits are those of the block with 2**31 added to the high word;
* with n random bits, U is the top n bits of those 32.

The upper bits nearly always decide how an element is rounded, and kernels make the lower ones only
where they do not.

A stream seed is 8 bytes of BLAKE2b over run seed, role and name, so that two tensors of a run share
noise with probability 2**-64 only.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Random123).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_WORD = 0xFFFFFFFF
_LOWER = 1 << 31  # in the counter, of the lower 16 bits


def stream_seed(run_seed: int, role: str, name: str) -> int:
    """The 64-bit key for the noise of one tensor in one role.

    The first 8 bytes, little-endian, of BLAKE2b-64 over ``f"{run_seed}/{role}/{name}"`` in UTF-8.

    Raises:
        ValueError: the role has a slash, so that another role and name could spell the same text.
    """
    if "/" in role:
        raise ValueError(f"stream_seed: role={role!r} must not have a slash; a name may")
    text = f"{run_seed}/{role}/{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def fresh_seed() -> int:
    """A 64-bit key from torch's default generator."""
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")
    return int(seed.item()) & (2**64 - 1)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-10.

    Args:
        counter: four int64 tensors of one shape, each holding 32-bit words.
        seed: the 64-bit key.

    Returns:
        Four int64 tensors of that shape, each holding 32-bit words.
    """
    c0, c1, c2, c3 = counter
    key_0, key_1 = seed & _WORD, seed >> 32
    for _ in range(10):
        high_0, low_0 = _multiply(_MULTIPLIER_0, c0)
        high_1, low_1 = _multiply(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0, key_1 = (key_0 + _WEYL_0) & _WORD, (key_1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def random_bits(
    count: int, bits: int, seed: int, step: int, call: int, device: torch.device | str = "cpu"
) -> Tensor:
    """U of the elements 0 .. `count` - 1: int64, shape (count,), each in [0, 2**bits)."""
    blocks = torch.arange(-(-count // 8), dtype=torch.int64, device=device)

    def halves(added: int) -> Tensor:
        counter = (blocks & _WORD, blocks >> 32 | added)
        words = philox((*counter, blocks.new_tensor(step), blocks.new_tensor(call)), seed)
        parts = [half for word in words for half in (word & 0xFFFF, word >> 16)]
        return torch.stack(parts, dim=1).reshape(-1)[:count]

    if bits <= 16:
        return halves(0) >> (16 - bits)
    return (halves(0) << 16 | halves(_LOWER)) >> (32 - bits)


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32-bit product, in halves so that int64 holds every sum."""
    upper, lower = (constant >> 16) * word, (constant & 0xFFFF) * word
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _WORD
