"""The C++ kernels: most on raw addresses, as `csrc/kernels.h` describes them, some on tensors."""

from collections.abc import Callable, Sequence

from torch import Size, Tensor

STUB: str  # the SHA-256 of this file as it was when they were built
GRID: int
MINIFLOAT: int
BINARY: int
FLOAT32: int
CODE8: int
CODE16: int
BFLOAT16: int
COMPENSATED: int
MOVING32: int
MOVING64: int
SUM: int

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
    has_nan: int
    nan_code: int
    sign_code: int
    largest: float
    smallest: float
    def __init__(self) -> None: ...

class Layout:
    def __init__(
        self, sizes: Sequence[int], extents: Sequence[int], positions: int, channels: int, /
    ) -> None: ...
    @staticmethod
    def rows_apart(elements: int, sizes: Sequence[int], strides: Sequence[int], /) -> Layout: ...

class SgdParameter:
    def __init__(self, shape: Sequence[int], blocks: int, length: int, /) -> None: ...
    def set_role(
        self, role: str, fmt: Format, rule: int, bits: int, seed: int, halved: bool, table: int, /
    ) -> None: ...
    def place(self, addresses: Sequence[int], /) -> None: ...
    def bind(self, torch: Torch, step: object, gradient: Tensor, /) -> bool: ...

class AdamParameter:
    def __init__(self, shape: Sequence[int], blocks: int, length: int, /) -> None: ...
    def set_role(
        self, role: str, fmt: Format, rule: int, bits: int, seed: int, halved: bool, table: int, /
    ) -> None: ...
    def place(self, addresses: Sequence[int], /) -> None: ...
    def bind(self, torch: Torch, step: object, gradient: Tensor, /) -> bool: ...

def sgd(
    parameters: list[SgdParameter], lr: float, momentum: float, weight_decay: float,
    nesterov: bool, packed: bool, has_gradient: bool, threads: int, /,
) -> tuple[bool, bool]: ...  # fmt: skip
def adam(
    parameters: list[AdamParameter], rate: float, share1: float, beta2: float, share2: float,
    correction2: float, eps: float, weight_decay: float, decoupled: bool, packed: bool,
    has_gradient: bool, threads: int, /,
) -> tuple[bool, bool]: ...  # fmt: skip
def quantize(
    fmt: Format, layout: Layout, x: int, out: int, output: int, exponents: int,
    exponent_bytes: int, rule: int, bits: int, seed: int, step: int, call: int, threads: int, /,
) -> bool: ...  # fmt: skip
def pack_block(
    torch: Torch, buffers: Buffers, fmt: Format, x: Tensor, passed: Tensor | None,
    rule: int, bits: int, seed: int, step: int, call: int, /,
) -> tuple[Tensor, Tensor | None, bool] | None: ...  # fmt: skip
def quantize_part(
    fmt: Format, sizes: tuple[int, int, int, int, int, int], x: int, out: int, guess: int,
    rule: int, bits: int, seed: int, step: int, call: int, threads: int, /,
) -> tuple[bool, int]: ...  # fmt: skip
def causal(
    sizes: tuple[int, int, int], first: int, factor: float, x: int, threads: int, /
) -> None: ...
def relu(count: int, x: int, out: int, passed: int, threads: int, /) -> None: ...
def relu_gradient(count: int, gradient: int, passed: int, out: int, threads: int, /) -> None: ...

class Torch:
    def __init__(
        self, torch: object, forward_ad: object, watchers: tuple[Callable[[], object], ...],
        fresh_seed: Callable[[], int], look: bool, /,
    ) -> None: ...  # fmt: skip
    def addresses(self, tensors: Sequence[Tensor], /) -> list[int] | None: ...

class Layouts:
    def __init__(self, torch: Torch, packed: type[Tensor], tensors: list[Tensor], /) -> None: ...
    def hold(self, torch: Torch, tensors: list[Tensor], /) -> bool: ...

def bind_again(
    torch: Torch, kernels: list[SgdParameter] | list[AdamParameter], layouts: list[Layouts],
    parameters: list[Tensor], gradients: list[Tensor], states: list[dict[str, object]],
    keys: tuple[str, ...], /,
) -> bool: ...  # fmt: skip
def quantize_plain(
    torch: Torch, fmt: Format, rows: dict[Size, Layout] | None, x: Tensor, out: Tensor | None,
    rule: int, bits: int, seed: int | None, step: int, call: int, /,
) -> Tensor | None: ...  # fmt: skip
def quantize_many(
    fmt: Format, layouts: Sequence[Layout], x: Sequence[int], out: Sequence[int],
    rule: int, bits: int, seed_step_call: Sequence[tuple[int, int, int]], threads: int, /,
) -> None: ...  # fmt: skip
def unpack(
    fmt: Format, layout: Layout, codes: int, code_type: int, exponents: int, exponent_bytes: int,
    table: int, out: int, threads: int, /,
) -> None: ...  # fmt: skip
def average(
    kind: int, weight: float, into: int, residual: int, x: int, dtype: int, count: int,
    fmt: Format | None, layout: Layout | None, exponents: int, table: int, threads: int, /,
) -> None: ...  # fmt: skip
def average_rounded(
    weight: float, blocks: tuple[int, int], x: int, x_exponents: int, x_format: Format | None,
    x_halved: bool, into: int, exponents: int, fmt: Format, halved: bool,
    rounding: tuple[int, int, int, int, int], threads: int, /,
) -> None: ...  # fmt: skip
def least_squares(
    size: int, weight: int, sum: int, squares: int, fmt: Format | None,
    rule: int, bits: int, seed: int, step_start_every: tuple[int, int, int], rate: float,
    x: int, y: int, rows: int, steps: int, /,
) -> None: ...  # fmt: skip
def softmax(
    size: int, weight: int, sum: int, squares: int, fmt: Format | None,
    rule: int, bits: int, seed: int, step_start_every: tuple[int, int, int], rate: float,
    features: int, classes: int, batch: int, offsets: int, labels: int, columns: int,
    values: int, l2: float, rows: int, steps: int, /,
) -> None: ...  # fmt: skip
def scalars(
    size: int, weight: int, sum: int, squares: int, fmt: Format | None,
    rule: int, bits: int, seed: int, step_start_every: tuple[int, int, int], rate: float,
    skewed: bool, draws_seed: int, draws_bits: int, table: int, steps: int, /,
) -> None: ...  # fmt: skip
def split(halves: int, count: int, is_signed: bool, codes: int, threads: int, /) -> None: ...
def join(codes: int, count: int, halves: int, threads: int, /) -> None: ...
def noise(
    out: int, start: int, count: int, bits: int, seed: int, step: int, call: int, /
) -> None: ...
def matmul(
    torch: Torch, left: Tensor, right: Tensor, out: Tensor, exponent: int,
    left_exponents: Tensor | None, right_exponents: Tensor | None, bias: Tensor | None,
    bias_codes: Tensor | None, bias_exponents: Tensor | None, bias_gap: int,
    passed: Tensor | None, threads: int, /,
) -> bool: ...  # fmt: skip
def product(
    torch: Torch, buffers: Buffers, left: Tensor, right: Tensor, exponent: int,
    left_exponents: Tensor | None, right_exponents: Tensor | None, bias: Tensor | None,
    bias_codes: Tensor | None, bias_exponents: Tensor | None, bias_gap: int,
    passed: Tensor | None, /,
) -> Tensor | None: ...  # fmt: skip

class Heads:
    def __init__(self, torch: Torch, x: Tensor, exponents: Tensor | None, gap: int, /) -> None: ...
    def part(
        self, samples: slice | None, rows: slice | None = ..., columns: slice | None = ..., /
    ) -> Heads: ...
    def transposed(self) -> Heads: ...
    def view(self) -> Tensor: ...
    def exponent(self) -> int: ...

def multiply(left: Heads, right: Heads, out: Heads, threads: int, /) -> bool: ...
def matmul_used() -> str: ...
def linear(
    torch: Torch, floats: Buffers, codes: Buffers, fmt: Format, gap: int,
    rule: tuple[int, int, int, int, int], x: Tensor, weight: tuple[Tensor, Tensor | None, int],
    transposed: bool, bias: Tensor | tuple[Tensor, Tensor | None, int] | None, rectified: bool, /,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None: ...  # fmt: skip
def linear_gradients(
    torch: Torch, floats: Buffers, codes: Buffers, fmt: Format, gap: int,
    rule: tuple[int, int, int, int, int], grad: Tensor, mine: bool, passed: Tensor | None,
    input: tuple[Tensor, Tensor | None, int], weight: tuple[Tensor, Tensor | None, int] | None,
    transposed: bool, of_weight: bool, of_bias: bool, /,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None: ...  # fmt: skip

class Buffers:
    def __init__(self, smallest: int, region: int, window: int, /) -> None: ...
    def empty(
        self, torch: Torch, shape: Sequence[int], strides: Sequence[int],
        kind: int, itemsize: int, /,
    ) -> object | None: ...  # fmt: skip
    def holds(self, address: int, /) -> bool: ...
    def free_bytes(self) -> int: ...
    def release(self) -> None: ...
    @staticmethod
    def of_torch(smallest: int, region: int, window: int, /) -> Buffers | None: ...

class Convolution:
    def __init__(self, sizes: Sequence[int], /) -> None: ...

def convolution_bytes(c: Convolution, backward: bool, /) -> int: ...
def convolution_pack(
    c: Convolution, backward: bool, channels_last: bool, weight: int, packed: int, threads: int, /
) -> None: ...
def convolution_forward(
    c: Convolution, x: int, packed: int, exponent: int, bias: int, y: int, threads: int, /
) -> None: ...
def convolution_input_gradient(
    c: Convolution, dy: int, packed: int, exponent: int, dx: int, threads: int, /
) -> None: ...
def convolution_weight_gradient(
    c: Convolution, x: int, dy: int, exponent: int, channels_last: bool, dw: int, threads: int, /
) -> None: ...
def channel_sums(
    codes: int, rows: int, channels: int, exponent: int, gap: int, out: int, threads: int, /
) -> None: ...

class Pooling:
    def __init__(self, sizes: Sequence[int], /) -> None: ...

def max_pool(p: Pooling, x: int, y: int, taps: int, threads: int, /) -> None: ...
def max_pool_gradient(p: Pooling, dy: int, taps: int, dx: int, threads: int, /) -> None: ...
def has_fast_convolution() -> bool: ...
def use(name: str, /) -> None: ...
def used() -> str: ...
def has_threads() -> bool: ...
