"""Real storage: integer codes and exponents."""

from __future__ import annotations

import math
from collections.abc import Sequence

from swalp.formats import BlockFloat, Format, Microscaling
from swalp.quantize.blocks import block_extents


def storage_bytes(shape: Sequence[int], fmt: Format | None) -> int:
    """Bytes that a tensor of that shape needs: codes packed to whole bytes, and its exponents.

    Args:
        shape: of the tensor.
        fmt: its format; None: float32.
    """
    elements = math.prod(shape)
    if fmt is None:
        return 4 * elements
    total = -(-elements * fmt.bits // 8)
    if isinstance(fmt, BlockFloat | Microscaling) and elements:
        extents = block_extents(fmt, shape)
        blocks = math.prod(size // extent for size, extent in zip(shape, extents, strict=True))
        bits = fmt.exponent_bits if isinstance(fmt, BlockFloat) else 8
        total += -(-blocks * bits // 8)
    return total
