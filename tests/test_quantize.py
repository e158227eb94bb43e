"""`quantize` equals the oracle, keeps its properties on every format, and works inside PyTorch."""

import math

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

import oracle
from strategies import (
    DETERMINISTIC,
    FORMATS,
    ROUNDINGS,
    SHAPE,
    carriers,
    is_binary,
    is_symmetric,
    quantizations,
    reaches_zero,
    rules,
    same,
    ugly_tensor,
)
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
    pack,
    parse_format,
    quantize,
    quantize_many,
)
from swalp.quantize import reference

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
FLIPPED = {TowardPositive(): TowardNegative(), TowardNegative(): TowardPositive()}


def one_block(fmt):
    """The same numbers with one block, or one block in each group of 32 neighbours."""
    if isinstance(fmt, Microscaling):
        return Microscaling(fmt.element)
    if isinstance(fmt, BlockFloat):
        return BlockFloat(fmt.word_length, exponent_bits=fmt.exponent_bits, symmetric=fmt.symmetric)
    return fmt


# The definition.


@pytest.mark.parametrize("kind", ["fixed", "minifloat", "block", "microscaling", "binary"])
def test_equals_exact_fractions(kind):
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(quantizations(kind))
    def check(case):
        x, fmt, rule = case
        before = x.clone()
        expected = oracle.quantize(x, fmt, rule)
        assert same(quantize(x, fmt, rule), expected)
        assert same(reference.quantize(x, fmt, rule), expected)
        assert same(x, before)

    check()


@every_format
def test_equals_exact_fractions_on_every_format_rule_and_carrier(fmt):
    for dtype in carriers(fmt):
        x = ugly_tensor(SHAPE, dtype, seed=2)[:2, :2]  # 128 numbers, whole blocks
        for rule in rules(fmt):
            assert same(quantize(x, fmt, rule), oracle.quantize(x, fmt, rule)), (dtype, rule)


def test_every_format_of_the_list_has_a_carrier():
    assert all(torch.float64 in carriers(fmt) for fmt in FORMATS)
    assert sum(torch.float32 in carriers(fmt) for fmt in FORMATS) == len(FORMATS)
    assert {dtype for fmt in FORMATS for dtype in carriers(fmt)} == {
        torch.float32, torch.float64, torch.bfloat16, torch.float16,
    }  # fmt: skip


# Properties, over one list of all formats.


@every_format
def test_values_never_move(fmt):
    fmt = one_block(fmt)
    values = fmt.values()
    if isinstance(fmt, BlockFloat | Microscaling) and not is_symmetric(fmt):
        values = values[1:]  # -2**(W-1) moves to the next block exponent: see below
    scales = [0]
    if isinstance(fmt, BlockFloat):
        scales = [fmt.min_exponent, -3, 0, min(fmt.max_exponent, 1000)]
    elif isinstance(fmt, Microscaling):
        scales = [fmt.element_exponent - 127, 0, 100]
        padding = -len(values) % 32
        values = torch.cat([values, values[-1:].expand(padding)])
        fmt = Microscaling(fmt.element, tile=len(values))
    for scale in scales:
        x = values * 2.0**scale
        for rule in rules(fmt):
            assert same(quantize(x, fmt, rule), x), rule


@every_format
def test_twice_is_once(fmt):
    x = ugly_tensor(SHAPE, carriers(fmt)[0], seed=3)
    for rule in rules(fmt):
        once = quantize(x, fmt, rule)
        for again in rules(fmt):
            if is_symmetric(fmt) or not isinstance(fmt, BlockFloat | Microscaling):
                assert same(quantize(once, fmt, again), once), (rule, again)


@pytest.mark.parametrize(
    "fmt", [BlockFloat(4, symmetric=False), Microscaling(FixedPoint(4, 2), tile=2)], ids=str
)
def test_twos_complement_blocks_are_where_twice_is_not_once(fmt):
    x = torch.tensor([-1.95, 0.25])  # gap 1/4: -1.95 becomes -2, whose own block has gap 1/2
    once = quantize(x, fmt)
    assert once.tolist() == [-2.0, 0.25]
    assert quantize(once, fmt).tolist() == [-2.0, 0.0]
    unmoved = torch.tensor([-1.75, 0.25])
    assert same(quantize(unmoved, fmt), unmoved)


@every_format
def test_sign_symmetry(fmt):
    x = ugly_tensor(SHAPE, carriers(fmt)[0], seed=4)
    if not is_symmetric(fmt):
        x = x.clamp(-1e-2, 1e-2) if isinstance(fmt, FixedPoint) else x.abs()
    for rule in rules(fmt):
        plus = quantize(x, fmt, rule)
        minus = quantize(-x, fmt, FLIPPED.get(rule, rule))
        if not getattr(fmt, "signed", True):
            assert bool(minus[x > 0].isnan().all())
            continue
        if not is_symmetric(fmt):  # the lowest number has no opposite: beyond it the clamp shows
            plus, minus = plus[minus > lowest(fmt, -x)], minus[minus > lowest(fmt, -x)]
        nonzero = torch.ones_like(plus, dtype=torch.bool) if not is_binary(fmt) else x != 0
        known = nonzero & ~plus.isnan()
        assert torch.equal(minus[known], -plus[known])


def lowest(fmt, x):
    """The most negative number of each element's grid."""
    if isinstance(fmt, FixedPoint):
        return torch.full_like(x, -fmt.largest)
    extents = reference.block_extents(fmt, x.shape)
    shared = reference.spread(reference.shared_exponents(x, fmt), extents).double()
    if isinstance(fmt, BlockFloat):
        return (-(2.0 ** (shared + 1))).to(x.dtype)
    return (-(2.0 ** (shared + fmt.element_exponent + 1))).to(x.dtype)


@every_format
def test_order_is_kept_where_the_block_exponent_is(fmt):
    fmt = one_block(fmt)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(64, 32, generator=generator) * 4 ** torch.randn(64, 32, generator=generator)
    step = torch.rand(64, 32, generator=generator) ** 4
    x, y = x, x + step * torch.rand(64, 1, generator=generator)
    top = 1.5 * torch.maximum(x.abs(), y.abs()).amax()
    x[:, 0], y[:, 0] = top, top  # each block keeps its exponent
    if not getattr(fmt, "signed", True):
        x, y = x.abs(), x.abs() + (y - x)
    dtype = carriers(fmt)[0]
    x, y = x.to(dtype), y.to(dtype)
    for rule in rules(fmt):
        if is_binary(fmt) and isinstance(rule, Stochastic):
            continue  # P(+) = 1/2 at zero: order and sign symmetry exclude each other
        low, high = quantize(x, fmt, rule), quantize(y, fmt, rule)
        assert bool((low <= high)[~high.isnan()].all()), rule


def test_a_stochastic_binary_format_keeps_the_sign_symmetry_and_not_the_order():
    x = torch.full((64,), 2.0**-20)
    up, down = quantize(x, Binary(), Stochastic(1)), quantize(-x, Binary(), Stochastic(1))
    assert torch.equal(down, -up)
    assert bool((down > up).any())


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed axes": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "every second": lambda x: torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2],
    "offset": lambda x: torch.cat([x[:1] * 3, x])[1:],
    "rows of a wider one": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}


@every_format
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_plays_no_part(fmt, layout):
    plain = ugly_tensor(SHAPE, carriers(fmt)[0], seed=7)
    x = LAYOUTS[layout](plain)
    assert same(x, plain)
    for rule in (Nearest(), Stochastic(3, random_bits=16)):
        result = quantize(x, fmt, rule)
        assert same(result, quantize(plain, fmt, rule))
        if layout in ("transposed", "reversed axes"):
            assert result.stride() == x.stride()


@every_format
def test_expanded_tensors(fmt):
    x = ugly_tensor(SHAPE, carriers(fmt)[0], seed=8)[:, :1].expand(SHAPE)
    for rule in (Nearest(), Stochastic(3)):
        assert same(quantize(x, fmt, rule), quantize(x.contiguous(), fmt, rule))


@pytest.mark.parametrize("axes", [None, (0,), (1,), (0, 1)])
def test_channels_last(axes):
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    last = x.to(memory_format=torch.channels_last)
    result = quantize(last, BlockFloat(8, axes=axes), Stochastic(2))
    assert same(result, quantize(x, BlockFloat(8, axes=axes), Stochastic(2)))
    assert result.is_contiguous(memory_format=torch.channels_last)


# Ugly inputs, one by one.


@every_format
def test_nan_stays_and_disturbs_no_neighbour(fmt):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)).to(carriers(fmt)[0])
    if not getattr(fmt, "signed", True):
        x = x.abs()
    small = torch.zeros(SHAPE, dtype=torch.bool)
    small[..., 1::2] = True
    x = torch.where(small, x / 16, x)  # each block keeps its largest
    holed = torch.where(small, torch.nan, x)
    zeroed = torch.where(small, 0.0, x)
    for rule in rules(fmt):
        result = quantize(holed, fmt, rule)
        assert bool(result[small].isnan().all())
        assert same(result[~small], quantize(zeroed, fmt, rule)[~small])


@every_format
def test_infinities(fmt):
    fmt = one_block(fmt)
    values = fmt.values()
    x = torch.ones(32, dtype=carriers(fmt)[0])  # finite neighbours: the block exponent is 0
    x[3], x[5] = torch.inf, -torch.inf
    for rule in rules(fmt):
        top, bottom = quantize(x, fmt, rule)[[3, 5]].tolist()
        if getattr(fmt, "saturating", True):
            assert top == values[-1]
            assert bottom == values[0] or (math.isnan(bottom) and not fmt.signed)
        elif fmt.specials == "ieee":
            assert (bottom, top) == (-math.inf, math.inf)
        else:
            assert math.isnan(top)
            assert math.isnan(bottom)


@every_format
def test_negative_zero(fmt):
    result = quantize(torch.full(SHAPE, -0.0, dtype=carriers(fmt)[0]), fmt)
    element = fmt.element if isinstance(fmt, Microscaling) else fmt
    keeps_sign = isinstance(element, Minifloat) and element.specials != "fnuz" and element.signed
    smallest = 0.0 if reaches_zero(fmt) else fmt.smallest  # without a zero the smallest stands in
    assert bool((result.abs() == smallest).all())
    assert bool((result.signbit() == keeps_sign).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ROUNDINGS, ids=str)
def test_a_block_of_zeros_stays_zero(dtype, rule):
    for fmt in (BlockFloat(8, axes=(0,)), parse_format("mxfp8_e4m3/4"), parse_format("mxint8/4")):
        assert same(
            quantize(torch.zeros(3, 4, dtype=dtype), fmt, rule), torch.zeros(3, 4).to(dtype)
        )


def test_the_exponent_is_exact_beside_powers_of_two():
    for exponent in (-126, -100, -1, 0, 1, 3, 100, 126, 127):
        power = torch.tensor(2.0**exponent)
        below = torch.nextafter(power, torch.tensor(0.0))
        assert reference.shared_exponents(power.reshape(1), BlockFloat(8)).item() == exponent
        assert reference.shared_exponents(below.reshape(1), BlockFloat(8)).item() == exponent - 1


@pytest.mark.parametrize(
    ("x", "fmt", "expected"),
    [
        # At 2**127 and just below 2**128; two's complement may not overflow the carrier.
        ([2.0**127, 1.0], BlockFloat(8), [2.0**127, 0.0]),
        ([3.4e38, 1e38], BlockFloat(8), [127 * 2.0**121, 38 * 2.0**121]),
        ([-3.4e38, 1e38], BlockFloat(8, symmetric=False), [-127 * 2.0**121, 38 * 2.0**121]),
        ([-3.4e38, 1e38], Microscaling(FixedPoint(8, 6), tile=2),
         [-127 * 2.0**121, 38 * 2.0**121]),
        # Subnormals: numbers like any other, until the exponent field ends at -128.
        ([2.0**-130, 3 * 2.0**-135], BlockFloat(8), [2.0**-130, 2.0**-133]),
        ([2.0**-149, 2.0**-148], BlockFloat(8), [0.0, 0.0]),
        ([2.0**-149, 2.0**-148], BlockFloat(8, exponent_bits=9), [2.0**-149, 2.0**-148]),
        # Infinities take their block's exponent from the finite numbers, the lowest without any.
        ([math.inf, 1.0], BlockFloat(8), [127 / 64, 1.0]),
        ([math.inf, 0.0], BlockFloat(8), [127 * 2.0**-134, 0.0]),
        ([math.inf, math.nan], BlockFloat(8), [127 * 2.0**-134, math.nan]),
        # The exponent field clips above, too: 4 bits end at 7.
        ([1000.0, 1.0], BlockFloat(8, exponent_bits=4), [254.0, 0.0]),
    ],
)  # fmt: skip
def test_blocks_at_the_ends_of_float32(x, fmt, expected):
    assert same(quantize(torch.tensor(x), fmt), torch.tensor(expected))


def test_where_the_carrier_is_too_coarse_for_the_limit_of_a_block_it_rounds_the_limit():
    # The block of 2**-24 has gap 2**-30 and limit 127 * 2**-30; float16 has multiples of 2**-24.
    x = torch.tensor([torch.inf, 2.0**-24], dtype=torch.float16)
    assert quantize(x, BlockFloat(8)).tolist() == [2.0**-23, 2.0**-24]


def test_between_zero_and_the_smallest_normal_number_without_subnormals():
    fmt = Minifloat(4, 3, subnormals=False)
    half = fmt.smallest / 2
    x = torch.tensor([half, math.nextafter(half, 1), fmt.smallest, -half / 2], dtype=torch.float64)
    assert quantize(x, fmt).tolist() == [0.0, fmt.smallest, fmt.smallest, -0.0]


def test_powers_of_two_tie_to_the_even_exponent_field():
    x = torch.tensor([0.125, 0.375, 0.75, 1.5, 3.0, 6.0, 12.0, 24.0])
    assert quantize(x, parse_format("e3m0")).tolist() == [0.0, 0.5, 0.5, 2.0, 2.0, 8.0, 8.0, 16.0]


@pytest.mark.parametrize("shape", [(), (0,), (0, 32), (3, 0, 32), (1,), (1, 1, 32)])
def test_empty_and_scalar_tensors(shape):
    x = torch.ones(shape)
    for fmt in (FixedPoint(8, 4), BlockFloat(8), Minifloat(4, 3), Binary()):
        assert same(quantize(x, fmt, Stochastic(0)), x)
    if shape:
        for fmt in (BlockFloat(8, axes=(0,)), BlockFloat(8, tile=1), parse_format("mxint8/1")):
            assert same(quantize(x, fmt, Stochastic(0)), x)


# Seeds, outputs, gradients.


def test_the_same_rule_rounds_alike_and_another_step_does_not():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    rule = Stochastic(5, random_bits=16)
    first = quantize(x, BlockFloat(4), rule)
    assert same(quantize(x, BlockFloat(4), rule), first)
    for other in (rule.at(1), rule.at(0, 1), Stochastic(6, random_bits=16)):
        assert (quantize(x, BlockFloat(4), other) != first).float().mean() > 0.1


def test_more_random_bits_round_alike_but_where_the_first_ones_are_close():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    fine = quantize(x, BlockFloat(4), Stochastic(5))
    for bits, most in ((16, 0.001), (8, 0.02), (2, 0.3)):
        differing = quantize(x, BlockFloat(4), Stochastic(5, random_bits=bits)) != fine
        assert differing.float().mean() <= most
    assert differing.any()


@pytest.mark.parametrize("recorded", [False, True])
def test_without_a_seed_torch_governs(recorded):
    x = torch.randn(100).requires_grad_(recorded)
    torch.manual_seed(1)
    first, second = (quantize(x, FixedPoint(4, 1), Stochastic()) for _ in range(2))
    torch.manual_seed(1)
    assert same(quantize(x, FixedPoint(4, 1), Stochastic()), first)
    assert not same(first, second)


@every_format
def test_out(fmt):
    x = ugly_tensor(SHAPE, carriers(fmt)[0])
    expected = quantize(x, fmt, Stochastic(1))
    out = torch.empty_like(x)
    assert quantize(x, fmt, Stochastic(1), out=out) is out
    assert same(out, expected)
    assert quantize(x, fmt, Stochastic(1), out=x) is x
    assert same(x, expected)


def test_out_records_no_gradient():
    x = torch.randn(4, requires_grad=True)
    out = torch.empty(4)
    assert not quantize(x, FixedPoint(4, 1), out=out).requires_grad
    assert same(out, quantize(x.detach(), FixedPoint(4, 1)))


@every_format
@pytest.mark.parametrize("rule", [Nearest(), Stochastic(1)], ids=str)
def test_the_straight_through_gradient_passes(fmt, rule):
    x = torch.randn(SHAPE).to(carriers(fmt)[0]).requires_grad_()
    weights = torch.randn(SHAPE).to(x.dtype)
    y = quantize(x, fmt, rule)
    assert same(y.detach(), quantize(x.detach(), fmt, rule))
    (gradient,) = torch.autograd.grad(y, x, weights)
    assert same(gradient, weights)


@every_format
def test_the_clipped_gradient_is_zero_beyond_the_grid(fmt):
    fmt = one_block(fmt)
    values = fmt.values()
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if isinstance(fmt, BlockFloat | Microscaling):
        x = x.clamp(-1.999, 1.999)  # each block has the exponent 0, that of values()
        x[:, 0], x[:, 1], x[:, 2] = 1.999, -1.999, torch.inf
    else:
        x *= 2 * fmt.largest
        x[:, 0], x[:, 1], x[:, 2] = fmt.largest, values[0], 1.01 * values[0]
    x[:, 3] = torch.nan
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(quantize(x, fmt, gradient="clipped").sum(), x)
    lowest = values[0] if getattr(fmt, "signed", True) else 0.0
    inside = (x >= lowest) & (x <= values[-1])
    assert same(gradient.bool(), inside)
    assert bool(inside.any())
    assert not bool(inside.all())


def test_the_clipped_gradient_of_nothing():
    x = torch.ones(0, 3, requires_grad=True)
    quantize(x, BlockFloat(8), gradient="clipped").sum().backward()
    assert x.grad.shape == (0, 3)


def test_second_derivatives_pass_too():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad((quantize(x, FixedPoint(6, 3)) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, 6 * quantize(x.detach(), FixedPoint(6, 3)))


# Inside PyTorch.

TRACED = [
    (FixedPoint(8, 4), Nearest()),
    (BlockFloat(8, axes=(0,)), Stochastic(2**63 + 5, random_bits=16, step=3)),
    (parse_format("mxfp4_e2m1/4"), Stochastic(1)),
    (parse_format("e4m3fn-inf"), TowardZero()),
    (Binary(), Stochastic(1)),
]


@pytest.mark.parametrize(("fmt", "rule"), TRACED, ids=str)
def test_compile_in_one_graph(fmt, rule):
    def double(x):
        return quantize(2 * x, fmt, rule, gradient="clipped") + 1

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, requires_grad=True)
    y = compiled(x)
    assert same(y.detach(), double(x).detach())
    ours, theirs = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, double))
    assert same(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of Inductor's imports
def test_compile_with_the_default_backend_and_changing_shapes():
    compiled = torch.compile(
        lambda x: quantize(x, BlockFloat(8, axes=(0,)), Stochastic(3)), fullgraph=True, dynamic=True
    )
    for shape in ((4, 8), (3, 5)):
        x = torch.randn(shape).t().contiguous().t()
        assert same(compiled(x), quantize(x, BlockFloat(8, axes=(0,)), Stochastic(3)))


def test_compile_once_for_all_steps_and_seeds():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x, rule: quantize(x, BlockFloat(8), rule), fullgraph=True, backend=backend
    )
    x = torch.randn(64)
    for step in range(6):
        rule = Stochastic(2**63 + step, step=7 * step, call=step)
        assert same(compiled(x, rule), quantize(x, BlockFloat(8), rule))
    assert len(graphs) == 2  # constants first, then symbols


def test_compile_draws_a_fresh_seed_each_time():
    compiled = torch.compile(
        lambda x: quantize(x, FixedPoint(4, 1), Stochastic()), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(200)
    assert not same(compiled(x), compiled(x))


def test_compile_writes_to_out():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def into(x, out):
        return quantize(x, BlockFloat(4), out=out)

    x, out = torch.randn(9), torch.empty(9)
    into(x, out)
    assert same(out, quantize(x, BlockFloat(4)))


def test_compile_checks_too():
    compiled = torch.compile(
        lambda x: quantize(x, BlockFloat(8, axes=(5,))), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="axis 5 is out of range for a tensor of shape"):
        compiled(torch.randn(3, 3))


@pytest.mark.parametrize(("fmt", "rule"), TRACED, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap_is_a_loop(fmt, rule, dim):
    x = torch.randn(4, 4, 4)
    batched = torch.func.vmap(lambda part: quantize(part, fmt, rule), in_dims=dim)(x)
    assert same(batched, torch.stack([quantize(part, fmt, rule) for part in x.unbind(dim)]))


@pytest.mark.parametrize("fmt", [FixedPoint(4, 2), BlockFloat(4, symmetric=False)], ids=str)
@pytest.mark.parametrize("gradient", ["straight-through", "clipped"])
def test_gradients_of_each_sample(fmt, gradient):
    x, weights = 3 * torch.randn(4, 5), torch.randn(5)

    def loss(row):
        return (quantize(row, fmt, Stochastic(1), gradient=gradient) * weights).sum()

    def eager(row):
        row = row.clone().requires_grad_()
        return torch.autograd.grad(loss(row), row)[0]

    expected = torch.stack([eager(row) for row in x])
    assert same(torch.func.vmap(torch.func.grad(loss))(x), expected)
    assert same(torch.stack([torch.func.grad(loss)(row) for row in x]), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own use
@pytest.mark.parametrize("gradient", ["straight-through", "clipped"])
def test_tangents(gradient):
    """What gradients are multiplied by, tangents are."""
    x = torch.tensor([0.3, -9.0, 1.7, 100.0])

    def low(x):
        return quantize(x, FixedPoint(8, 4), gradient=gradient)

    y, tangent = torch.func.jvp(low, (x,), (torch.full((4,), 3.0),))
    assert same(y, low(x))
    passed = torch.tensor([1.0, 0.0, 1.0, 0.0] if gradient == "clipped" else [1.0] * 4)
    assert same(tangent, 3 * passed)
    assert same(torch.func.jacfwd(low)(x), passed.diag())


def test_vmap_over_the_noise_alone():
    x = torch.rand(50)
    rows = torch.func.vmap(
        lambda _: quantize(x, FixedPoint(4, 0), Stochastic()), randomness="different"
    )(torch.zeros(3))
    assert rows.shape == (3, 50)
    assert len({tuple(row.tolist()) for row in rows}) == 3


@every_format
def test_meta_and_fake_tensors(fmt):
    dtype = carriers(fmt)[0]
    x = torch.empty(SHAPE, dtype=dtype).transpose(0, 1).contiguous().transpose(0, 1)
    meta = quantize(x.to("meta"), fmt, Stochastic(1))
    assert (meta.shape, meta.dtype, meta.device.type) == (SHAPE, dtype, "meta")
    assert meta.stride() == x.stride()
    with FakeTensorMode() as mode:
        fake = quantize(mode.from_tensor(x), fmt, Nearest())
    assert (fake.shape, fake.dtype, fake.stride()) == (SHAPE, dtype, x.stride())


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return quantize(x, BlockFloat(8, axes=(0,)), Stochastic(4)) * 2

    x = torch.randn(3, 5)
    program = torch.export.export(Layer(), (x,))
    assert any("swalp.quantize" in str(node.target) for node in program.graph.nodes)
    assert same(program.module()(x), Layer()(x))


@pytest.mark.parametrize("clipped", [False, True])
def test_opcheck(clipped):
    arguments = (BlockFloat(8, axes=(1,)), Stochastic(1, random_bits=16))
    torch.library.opcheck(
        torch.ops.swalp.quantize.default,
        (
            torch.randn(3, 4, requires_grad=True),
            *(*map(str, arguments), -5, 1, 2, None, None, clipped),
        ),
    )
    torch.library.opcheck(
        torch.ops.swalp.quantize.default,
        (torch.randn(2, 3, 4).mT, "e4m3fn", "nearest", 0, 0, 0, None, None, clipped),
    )


# A caller's mistakes.


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([1.0], FixedPoint(8, 4)), TypeError, "x must be a torch.Tensor, not list"),
        ((torch.ones(2), "bfp8"), TypeError, "fmt must be a format .*parse_format reads"),
        ((torch.ones(2), FixedPoint(8, 4), "nearest"), TypeError, "rounding must be a rule"),
        ((torch.ones(2), FixedPoint(8, 4), Nearest), TypeError, "rounding must be a rule"),
        ((torch.ones(2, dtype=torch.int64), FixedPoint(8, 4)), TypeError,
         r"x is torch.int64; .* x.float\(\)"),
        ((torch.ones(2, dtype=torch.complex64), Binary()), TypeError, "x is torch.complex64"),
        ((torch.ones(2, dtype=torch.bool), Binary()), TypeError, "x is torch.bool"),
        ((torch.ones(2, dtype=torch.bfloat16), BlockFloat(12)), ValueError,
         "bfp12 has 11 significant bits, but bfloat16 carries 8"),
        ((torch.ones(2, dtype=torch.float16), FixedPoint(16, 8)), ValueError,
         "fixed16.8 has 15 significant bits, but float16 carries 11"),
        ((torch.ones(2), FixedPoint(32, 8)), ValueError, "but float32 carries 24"),
        ((torch.ones(2, dtype=torch.float16), Minifloat(8, 7)), ValueError,
         "bf16 reaches from .* but float16 from 5.96e-08 to 6.55e"),
        ((torch.ones(2, dtype=torch.float16), FixedPoint(8, 30)), ValueError,
         "fixed8.30 reaches from 9.31e-10"),
        ((torch.ones(2), Binary(200)), ValueError, "convert x to a wider dtype"),
        ((torch.ones(2, 3), BlockFloat(8, axes=(2,))), ValueError,
         r"bfp8\[2\]: axis 2 is out of range for a tensor of shape \(2, 3\); it has 2 dim"),
        ((torch.ones(2, 3), BlockFloat(8, axes=(-3,))), ValueError, "axis -3 is out of range"),
        ((torch.tensor(1.0), BlockFloat(8, tile=4)), ValueError, "axis -1 is out of range"),
        ((torch.ones(2, 3), BlockFloat(8, tile=2)), ValueError,
         r"a tile of 2 does not divide axis 1 of a tensor of shape \(2, 3\); .*divides 3"),
        ((torch.ones(2, 30), parse_format("mxfp8_e4m3")), ValueError, "a tile of 32 does not div"),
        ((torch.ones(2), Binary(), TowardZero()), ValueError, "binary has no zero to round toward"),
        ((torch.ones(4, 4), BlockFloat(4, axes=(0, -2), tile=(2, 4))), ValueError,
         r"two of its axes are one in a tensor of shape \(4, 4\); name each axis once"),
        ((torch.ones(2), Microscaling(Minifloat(9, 3), tile=2)), ValueError,
         r"reaches 2\*\*128 with its finest scale, but float32 ends below 2\*\*128"),
    ],
)  # fmt: skip
def test_a_callers_mistakes_get_one_clear_line(arguments, error, text):
    with pytest.raises(error, match=text) as caught:
        quantize(*arguments)
    assert "\n" not in str(caught.value)


def test_keyword_mistakes():
    x = torch.ones(2)
    with pytest.raises(ValueError, match="gradient='ste' must be 'straight-through' or 'clipped'"):
        quantize(x, Binary(), gradient="ste")
    with pytest.raises(ValueError, match=r"out is torch.float32 \(3,\) on cpu; it must be like x"):
        quantize(x, Binary(), out=torch.ones(3))
    with pytest.raises(ValueError, match=r"it must be like x, torch\.float32"):
        quantize(x, Binary(), out=torch.ones(2, dtype=torch.float64))


def test_deterministic_rules_are_one_each():
    assert len({type(rule) for rule in DETERMINISTIC}) == 4


@pytest.mark.parametrize(("fmt", "x", "expected"), [
    (FixedPoint(32, 16), torch.tensor([32768.0, 32767.5], dtype=torch.float64), [0.0, 1.0]),
    (FixedPoint(8, 156), torch.tensor([2.0**-152], dtype=torch.float64), [1.0]),
    (FixedPoint(8, -130), torch.tensor([1e300], dtype=torch.float64), [0.0]),
    (BlockFloat(8, symmetric=False), torch.tensor([-65504.0, 1.0]).half(), [0.0, 1.0]),
    (BlockFloat(8, symmetric=False), torch.tensor([-3.4e38, 1.0]), [0.0, 1.0]),
], ids=str)  # fmt: skip
def test_the_clipped_gradient_knows_the_ends_exactly(fmt, x, expected):
    x = x.clone().requires_grad_()
    quantize(x, fmt, gradient="clipped").sum().backward()
    assert x.grad.tolist() == expected


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def test_the_default_dtype_plays_no_part(default_dtype):
    x = torch.tensor([127.99], dtype=torch.float32, requires_grad=True)
    quantize(x, FixedPoint(12, 4), gradient="clipped").sum().backward()
    assert x.grad.tolist() == [0.0]
    signs = torch.tensor([1.0, -1.0], dtype=torch.float32)
    expected = [2.0**-30, -(2.0**-30)]
    assert quantize(signs.double(), Binary(30)).tolist() == expected
    assert pack(signs, Binary(30)).dequantize().tolist() == expected


@pytest.mark.parametrize("frac_bits", [200, -200])
def test_binary_values_beyond_float32(frac_bits):
    x = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert quantize(x, Binary(frac_bits)).tolist() == [2.0**-frac_bits, -(2.0**-frac_bits)]


@pytest.mark.parametrize(("fmt", "shape"), [
    (BlockFloat(8, tile=(2,) * 9), (4,) * 9),
    (BlockFloat(8, axes=tuple(range(0, 20, 2))), (2,) * 20),
], ids=["tiles", "axes"])  # fmt: skip
def test_blocks_along_more_axes_than_the_kernels_have(fmt, shape):
    x = torch.randn(shape)
    expected = quantize(x.double(), fmt).float()
    for _ in range(2):
        assert same(quantize(x, fmt), expected)
    assert same(pack(x, fmt).dequantize(), expected)
    assert same(quantize_many([x], fmt)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_out_is_written_below_autograd(dtype):
    x = torch.randn(4, dtype=dtype, requires_grad=True)
    y = x * 2
    quantize(y, FixedPoint(4, 1), out=y)
    y.sum().backward()
    assert x.grad.tolist() == [2.0] * 4
    parameter = torch.nn.Parameter(x.detach().clone())
    quantize(parameter, FixedPoint(4, 1), out=parameter)
    assert same(parameter.detach(), quantize(x.detach(), FixedPoint(4, 1)))


def test_another_out_that_requires_a_gradient_is_refused():
    out = torch.ones(3, requires_grad=True) * 2
    with pytest.raises(ValueError, match="out requires a gradient, which would be that of what it"):
        quantize(torch.full((3,), 0.3), FixedPoint(8, 4), out=out)
    with torch.no_grad():
        assert quantize(torch.full((3,), 0.3), FixedPoint(8, 4), out=out).tolist() == [0.3125] * 3


def test_unlike_rules_draw_the_keys_that_a_loop_draws():
    tensors = [torch.full((64,), 0.3), torch.full((64,), 0.3)]
    fmt = FixedPoint(4, 1)
    for unlike in ([Stochastic(), Nearest()], [Stochastic(), Stochastic(random_bits=32)]):
        torch.manual_seed(0)
        loop = [quantize(x, fmt, rule) for x, rule in zip(tensors, unlike, strict=True)]
        state = torch.get_rng_state()
        torch.manual_seed(0)
        many = quantize_many(tensors, fmt, unlike)
        assert all(same(one, other) for one, other in zip(loop, many, strict=True))
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("fmt", [BlockFloat(8), BlockFloat(8, exponent_bits=9)], ids=str)
def test_integers_have_one_zero(dtype, fmt):
    """Even where the largest value of a block is too small for the dtype."""
    x = torch.tensor([0.0, -0.0, -torch.inf], dtype=dtype)
    values = quantize(x, fmt)
    assert not values[:2].signbit().any()
    assert values[2] < 0 or not values[2].signbit()
    if dtype == torch.float32:
        assert same(values, pack(x, fmt).dequantize())


def test_values_closer_than_the_carriers_are_refused():
    fmt = Minifloat(2, 7, bias=149, subnormals=False, specials="finite")
    with pytest.raises(ValueError, match=r"reaches from 2\.19e-47 to"):
        quantize(torch.ones(1), fmt)
    assert quantize(torch.ones(1).double(), fmt).item() == fmt.largest


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's: they are young
def test_tensors_of_other_layouts_are_refused():
    for x, layout in (
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.eye(3).to_sparse_csr(), "sparse_csr"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    ):
        for call in (quantize, pack):
            with pytest.raises(TypeError, match=f"x is {layout}; quantize its values"):
                call(x, BlockFloat(8))


def test_lists_are_asked_for():
    for arguments, name in (
        ((torch.ones(3), FixedPoint(8, 4)), "tensors"),
        (([torch.ones(3)], FixedPoint(8, 4), "nearest"), "rounding"),
        (([torch.ones(3)], FixedPoint(8, 4), Nearest), "rounding"),
    ):
        with pytest.raises(TypeError, match=f"quantize_many: {name} must be a list"):
            quantize_many(*arguments)
    with pytest.raises(TypeError, match=r"out must be a torch\.Tensor, not list"):
        quantize(torch.ones(1), FixedPoint(8, 4), out=[1])


def test_an_axis_named_twice_is_refused():
    with pytest.raises(ValueError, match="two of its axes are one"):
        quantize(torch.ones(2, 3), BlockFloat(8, axes=(0, -2)))


def test_nothing_at_all():
    assert quantize_many([], BlockFloat(8, axes=(1,))) == []
    with pytest.raises(TypeError, match="fmt must be a format"):
        quantize_many([], "bfp8")
    fmt = BlockFloat(8, axes=(1,))
    quantize(torch.ones(2, 2), fmt)  # and is known from now on
    with pytest.raises(ValueError, match="axis 1 is out of range"):
        quantize(torch.empty(0), fmt)
    none = torch.func.vmap(lambda v: quantize(v, BlockFloat(3)), in_dims=1)(torch.empty(4, 0))
    assert none.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_into_a_view_of_negatives(dtype):
    fmt, values = BlockFloat(8), torch.tensor([1.0, -0.3, 2.5], dtype=dtype)
    view = torch._neg_view(values.clone())
    quantize(view, fmt, out=view)
    assert torch.equal(view, quantize(-values, fmt))
    (view,) = quantize_many([values], fmt, out=[torch._neg_view(values.clone())])
    assert torch.equal(view, quantize(values, fmt))
