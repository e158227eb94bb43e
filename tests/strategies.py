"""What the tests draw: formats, rules, tensors of ugly numbers; and the lists they run over."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from swalp import (
    Binary,
    BlockFloat,
    FixedPoint,
    Microscaling,
    Minifloat,
    Nearest,
    Stochastic,
    TowardNegative,
    TowardPositive,
    TowardZero,
)
from swalp.formats import NAMED
from swalp.quantize.api import CARRIERS, check

# One list of formats, which every property runs over: the named ones and each option once.
FORMATS = (
    *NAMED.values(),
    Binary(3),
    FixedPoint(2, 0),
    FixedPoint(8, 6),
    FixedPoint(8, 6, symmetric=True),
    FixedPoint(4, 9),
    FixedPoint(12, -3, symmetric=True),
    FixedPoint(12, 14),
    BlockFloat(2),
    BlockFloat(8),
    BlockFloat(8, symmetric=False),
    BlockFloat(8, exponent_bits=4),
    BlockFloat(5, exponent_bits=10),
    BlockFloat(6, axes=(0,)),
    BlockFloat(8, axes=(0, -1), symmetric=False),
    BlockFloat(4, tile=4),
    BlockFloat(8, axes=(1,), tile=2, symmetric=False),
    BlockFloat(8, tile=(2, 4)),
    BlockFloat(10, axes=(0, 2), tile=(2, 4)),
    Minifloat(4, 3),
    Minifloat(4, 3, specials="fn", saturating=False),
    Minifloat(4, 3, specials="fnuz"),
    Minifloat(5, 2, specials="fnuz", saturating=False),
    Minifloat(4, 3, bias=11, specials="fnuz"),
    Minifloat(5, 2, saturating=False),
    Minifloat(5, 2, subnormals=False),
    Minifloat(4, 0),
    Minifloat(4, 0, specials="fn", saturating=False),
    Minifloat(3, 2, bias=-5, specials="finite", signed=False),
    Minifloat(3, 0, subnormals=False),
    Minifloat(1, 2, specials="finite"),
    Microscaling(Minifloat(2, 1, specials="finite"), tile=8),
    Microscaling(Minifloat(4, 0, specials="fn"), tile=2, axis=0),
    Microscaling(Minifloat(3, 1, subnormals=False), tile=4),
    Microscaling(FixedPoint(8, 6), tile=4),
    Microscaling(FixedPoint(4, 0, symmetric=True), tile=2, axis=1),
)

SHAPE = (4, 6, 32)  # every layout of FORMATS fits

DETERMINISTIC = (Nearest(), TowardZero(), TowardPositive(), TowardNegative())
ROUNDINGS = (*DETERMINISTIC, Stochastic(5), Stochastic(2**64 - 1, random_bits=8, step=7, call=3))


def is_binary(fmt) -> bool:
    return isinstance(fmt, Binary)


def rules(fmt, among=ROUNDINGS) -> list:
    """Those of the rules that `fmt` has: a binary format has no zero to round toward."""
    return [rule for rule in among if not (is_binary(fmt) and rule == TowardZero())]


def carriers(fmt) -> list[torch.dtype]:
    """The dtypes that hold the values of `fmt`."""
    fitting = []
    for dtype in CARRIERS:
        try:
            check(torch.zeros((64,) * 3, dtype=dtype, device="meta"), fmt, Nearest())
        except ValueError as error:
            if "axis" in str(error) or "tile" in str(error):
                raise
            continue
        fitting.append(dtype)
    return fitting


def reaches_zero(fmt) -> bool:
    """Whether zero is a value."""
    return not is_binary(fmt) and getattr(fmt, "has_zero", True)


def is_symmetric(fmt) -> bool:
    """Whether -v is a value of every block in which v is one."""
    element = fmt.element if isinstance(fmt, Microscaling) else fmt
    return getattr(element, "symmetric", True) and getattr(element, "signed", True)


def ugly_tensor(shape=SHAPE, dtype=torch.float32, seed=0) -> Tensor:
    """All magnitudes a dtype has, from all bit patterns alike, the ugly ones spread among them."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[torch.finfo(dtype).bits // 8]
    info = torch.iinfo(width)
    patterns = torch.randint(info.min, info.max, (count,), generator=generator, dtype=width)
    values = patterns.view(dtype).clone()
    near_one = torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)
    values = torch.where(torch.rand(count, generator=generator) < 0.6, near_one, values)
    special = torch.tensor(special_numbers(dtype), dtype=torch.float64).to(dtype)
    places = torch.randperm(count, generator=generator)[: len(special)]
    values[places] = special[: len(places)]
    return values.reshape(shape)


def special_numbers(dtype: torch.dtype) -> list[float]:
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    ulp = info.eps
    positive = [
        0.0, smallest, 3 * smallest, info.smallest_normal, info.smallest_normal - smallest,
        info.max, info.max / 2, info.max * (1 - ulp), 1.0, 1.0 + ulp, 1.0 - ulp / 2,
        2.0 - ulp, 2.0, 0.5, 1.5, 2.5, 3.5, 448.0, 464.0, 6.0, 5.0, 65504.0 if ulp < 1e-2 else 6e4,
        2.0**126 if info.max > 1e30 else 2.0**14, math.inf,
    ]  # fmt: skip
    return [*positive, *(-value for value in positive), math.nan]


@st.composite
def roundings(draw):
    """Any rule; stochastic ones with any seed, number of bits, step and call."""
    kind = draw(st.integers(0, 6))
    if kind < 4:
        return DETERMINISTIC[kind]
    return Stochastic(
        draw(st.integers(0, 2**64 - 1)),
        random_bits=draw(st.one_of(st.integers(1, 5), st.integers(1, 32))),
        step=draw(st.integers(0, 2**32 - 1)),
        call=draw(st.integers(0, 2**32 - 1)),
    )


def fixed_points():
    return st.builds(FixedPoint, st.integers(2, 26), st.integers(-20, 30), symmetric=st.booleans())


@st.composite
def minifloats(draw, max_bits=11, *, element=False):
    """Any minifloat of few enough bits to list; `element`: one that MX takes."""
    exponent_bits = draw(st.integers(1, 8))
    mantissa_bits = draw(st.integers(0, max(0, max_bits - exponent_bits - 1)))
    specials = draw(st.sampled_from(["ieee", "fn", "fnuz", "finite"]))
    subnormals = draw(st.booleans()) or (element and mantissa_bits == 0)
    has_zero = subnormals or mantissa_bits > 0
    if exponent_bits == 1 and (specials == "ieee" or (specials == "fn" and mantissa_bits == 0)):
        specials = "finite"
    if specials == "fnuz" and not has_zero:
        specials = "finite"
    signed = element or specials == "fnuz" or draw(st.booleans())
    standard = 2 ** (exponent_bits - 1) - 1
    return Minifloat(
        exponent_bits,
        mantissa_bits,
        bias=draw(st.sampled_from([None, standard + draw(st.integers(-3, 3))])),
        subnormals=subnormals,
        specials=specials,
        saturating=element or specials == "finite" or draw(st.booleans()),
        signed=signed,
    )


def shapes():
    """Few elements, up to four dimensions; with many twos and fours, so that tiles divide."""
    extents = st.sampled_from([1, 2, 2, 3, 4, 4, 6])
    return st.lists(extents, max_size=4).map(tuple).filter(lambda shape: math.prod(shape) <= 32)


@st.composite
def block_floats(draw, shape):
    """Any block layout that fits the shape."""
    axes, tile = None, None
    layout = draw(st.sampled_from(["tensor", "axes", "tile", "tile along axes"])) if shape else ""
    if layout == "axes":
        axes = draw(axes_of(shape))
    elif layout == "tile":
        rank = draw(st.integers(1, min(2, len(shape))))
        tile = tuple(draw(divisors(extent)) for extent in shape[len(shape) - rank :])
    elif layout == "tile along axes":
        axes = draw(axes_of(shape))
        tile = tuple(draw(divisors(shape[axis])) for axis in axes)
    return BlockFloat(
        draw(st.integers(2, 26)),
        axes=axes,
        tile=tile,
        exponent_bits=draw(st.sampled_from([8, 8, 8, 2, 4, 5, 9, 11])),
        symmetric=draw(st.booleans()),
    )


@st.composite
def microscalings(draw, shape):
    """Any MX format that fits the shape, of one dimension or more."""
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    fixed = st.builds(FixedPoint, st.integers(2, 12), st.integers(-4, 12), symmetric=st.booleans())
    return Microscaling(
        draw(st.one_of(minifloats(element=True), fixed)),
        tile=draw(divisors(shape[axis])),
        axis=axis,
    )


def axes_of(shape):
    """A tuple of distinct axes, some counted from the end."""
    rank = len(shape)
    distinct = st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True)
    signs = st.lists(st.booleans(), min_size=rank, max_size=rank)
    return st.tuples(distinct, signs).map(
        lambda pair: tuple(a - rank if s else a for a, s in zip(pair[0], pair[1], strict=False))
    )


def divisors(extent: int):
    return st.sampled_from([part for part in range(1, extent + 1) if extent % part == 0])


def numbers(dtype: torch.dtype, low: int, high: int, bits: int):
    """Floats of a dtype, aimed at a grid whose gaps lie between 2**low and 2**high.

    Half-integer multiples of such gaps (ties, and values), one ulp beside them; powers of two and
    their neighbours; the specials; any bit pattern.
    """
    info = torch.finfo(dtype)
    smallest = math.frexp(info.smallest_normal * info.eps)[1] - 1
    largest = math.frexp(info.max)[1] - 1
    ulps = st.sampled_from([0, 0, 0, 1, -1])
    span = 2 ** min(bits + 2, 54)
    low, high = (min(max(exponent, smallest), largest) for exponent in (low, high))
    gaps = st.integers(low - 2, high + 2)
    on_grid = st.builds(
        lambda k, gap, ulp: nudged(_ldexp(k, gap - 1), dtype, ulp),
        st.one_of(st.integers(-span, span), st.integers(-9, 9)), gaps, ulps,
    )  # fmt: skip
    powers = st.builds(
        lambda exponent, sign, ulp: nudged(sign * math.ldexp(1.0, exponent), dtype, ulp),
        st.integers(smallest, largest), st.sampled_from([1, -1]), ulps,
    )  # fmt: skip
    patterns = st.integers(0, 2**info.bits - 1).map(lambda bits: from_pattern(bits, dtype))
    specials = st.sampled_from(special_numbers(dtype))
    return st.one_of(on_grid, on_grid, on_grid, powers, patterns, specials)


@st.composite
def quantizations(draw, kind: str):
    """A tensor, a format of that kind that fits it, and a rule."""
    shape = draw(shapes().filter(lambda shape: kind != "microscaling" or len(shape) > 0))
    fmt = draw(
        {
            "fixed": fixed_points(),
            "minifloat": minifloats(),
            "block": block_floats(shape),
            "microscaling": microscalings(shape),
            "binary": st.builds(Binary, st.integers(-20, 20)),
        }[kind]
    )
    flat = fmt if kind not in ("block", "microscaling") else without_layout(fmt)
    dtype = draw(st.sampled_from(carriers(flat)))
    low, high, bits = aim(draw, fmt)
    count = math.prod(shape)
    values = draw(st.lists(numbers(dtype, low, high, bits), min_size=count, max_size=count))
    rule = draw(roundings().filter(lambda rule: rule in rules(fmt, [rule])))
    return torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape), fmt, rule


def without_layout(fmt):
    """The same numbers, one block for each element of any tensor that has a dimension."""
    if isinstance(fmt, Microscaling):
        return Microscaling(fmt.element, tile=1)
    return BlockFloat(fmt.word_length, exponent_bits=fmt.exponent_bits, symmetric=fmt.symmetric)


def aim(draw, fmt) -> tuple[int, int, int]:
    """The exponents of the gaps that interesting numbers lie on, and the length of a word."""
    if isinstance(fmt, FixedPoint | Binary):
        return -fmt.frac_bits, -fmt.frac_bits, fmt.bits
    if isinstance(fmt, Minifloat):
        m = fmt.mantissa_bits
        return fmt.min_exponent - m, fmt.max_exponent - m, m + 1
    # A block has its gap from its own largest element: aim at blocks near some exponent.
    field = (-1 << fmt.exponent_bits - 1) if isinstance(fmt, BlockFloat) else -127
    shared = draw(st.one_of(st.just(field), st.just(-field - 1), st.integers(-12, 12)))
    return shared - fmt.bits, shared - fmt.bits + 3, fmt.bits


def nudged(value: float, dtype: torch.dtype, ulps: int) -> float:
    """`value` in that dtype, moved by -1, 0 or 1 of its numbers."""
    number = torch.tensor(value, dtype=torch.float64).to(dtype)
    if ulps:
        number = torch.nextafter(number, torch.tensor(ulps * math.inf, dtype=dtype))
    return number.item()


def from_pattern(bits: int, dtype: torch.dtype) -> float:
    """The number that has these bits."""
    width = torch.finfo(dtype).bits
    signed = bits - (bits >> (width - 1) << width)
    integer = {16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    return torch.tensor(signed, dtype=integer).view(dtype).item()


def _ldexp(k: int, exponent: int) -> float:
    try:
        return math.ldexp(k, exponent)
    except OverflowError:
        return math.copysign(math.inf, k)


def same(left: Tensor, right: Tensor) -> bool:
    """Equal in dtype, shape, every bit of every number; a NaN equals a NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    numbers = (left == right) & (left.signbit() == right.signbit())
    return bool((numbers | (left.isnan() & right.isnan())).all())
