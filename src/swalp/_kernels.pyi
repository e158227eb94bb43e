"""The C++ kernels on raw addresses; `csrc/kernels.h` says what each argument means."""

from collections.abc import Sequence

GRID: int
MINIFLOAT: int
BINARY: int
FLOAT32: int
CODE8: int
CODE16: int

class Format:
    kind: int
    blocked: int
    element_exponent: int
    min_exponent: int
    max_exponent: int
    gap_offset: int
    min_integer: int
    max_integer: int
    symmetric_from: int
    mantissa_bits: int
    min_normal: int
    lowest_gap: int
    bias: int
    has_zero: int
    is_signed: int
    saturating: int
    fnuz: int
    overflow_is_nan: int
    largest_code: int
    inf_code: int
    nan_code: int
    sign_code: int
    largest: float
    smallest: float
    def __init__(self) -> None: ...

class Layout:
    def __init__(
        self, sizes: Sequence[int], extents: Sequence[int], positions: int, channels: int, /
    ) -> None: ...

def quantize(
    fmt: Format, layout: Layout, x: int, out: int, output: int, exponents: int,
    rule: int, bits: int, seed: int, step: int, call: int, threads: int, /,
) -> bool: ...  # fmt: skip
def quantize_flat(
    fmt: Format, count: int, x: int, out: int,
    rule: int, bits: int, seed: int, step: int, call: int, threads: int, /,
) -> None: ...  # fmt: skip
def unpack(
    fmt: Format, layout: Layout, codes: int, code_type: int, exponents: int, table: int,
    out: int, threads: int, /,
) -> None: ...  # fmt: skip
def noise(
    out: int, start: int, count: int, bits: int, seed: int, step: int, call: int, /
) -> None: ...
def use(name: str, /) -> None: ...
def used() -> str: ...
def has_threads() -> bool: ...
