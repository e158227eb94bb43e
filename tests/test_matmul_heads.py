"""Parts of heads and their products: against the tensors that they are parts of, bit for bit."""

import pytest
import torch

from swalp.matmul import heads, kernels
from swalp.matmul.heads import matrices, multiplication
from swalp.matmul.operands import Operand
from swalp.quantize import plans
from test_matmul import BUILDS, running

pytestmark = pytest.mark.skipif(not plans.available, reason="there are no kernels here")


@pytest.fixture(params=[*BUILDS, "through tensors"])
def build(request, monkeypatch):
    """Each compiled product, and what computes it where there is none."""
    if request.param in BUILDS:
        with running(request.param):
            yield request.param
    else:
        monkeypatch.setattr(kernels, "in_one_pass", lambda _: False)
        yield request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


# How (samples, heads, rows, columns) lies in memory: the order of its dimensions.
ORDERS = {"as it is": (0, 1, 2, 3), "heads side by side": (0, 2, 1, 3), "turned": (0, 1, 3, 2),
          "neither": (2, 3, 0, 1)}  # fmt: skip


def codes(shape, order, exponent, seed):
    """An operand in memory of that order, whose codes reach both ends."""
    generator = torch.Generator().manual_seed(seed)
    there = [shape[axis] for axis in order]
    x = torch.randint(-127, 128, there, dtype=torch.int8, generator=generator)
    back = [order.index(axis) for axis in range(4)]
    exponents = None if exponent is None else torch.full((1,) * 4, exponent, dtype=torch.int8)
    return Operand(x.permute(back), exponents, -3)


def exact(left, right):
    exponents = [x.gap + (0 if x.exponents is None else int(x.exponents)) for x in (left, right)]
    return (left.codes.double() @ right.codes.double() * 2.0 ** sum(exponents)).float()


def part(x, some, rows, columns):
    return x._replace(codes=x.codes[some, :, rows, columns])


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize(
    ("shape", "some", "rows", "terms", "columns"),
    [
        ((1, 1, 1, 1, 1), slice(0, 1), slice(0, 1), slice(0, 1), slice(0, 1)),
        ((3, 2, 9, 7, 5), slice(1, 3), slice(2, 9), slice(0, 6), slice(1, 5)),
        ((2, 3, 70, 64, 130), slice(0, 2), slice(32, 70), slice(0, 64), slice(0, 129)),
        ((4, 2, 40, 200, 33), slice(2, 3), slice(0, 40), slice(72, 200), slice(0, 33)),
        ((2, 1, 300, 640, 300), slice(1, 2), slice(0, 300), slice(0, 640), slice(0, 300)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("build", "threads")
def test_products_of_parts_are_those_of_tensors(order, shape, some, rows, terms, columns):
    samples, count, m, k, n = shape
    left = codes((samples, count, m, k), order, 2, seed=1)
    right = codes((samples, count, k, n), order, None, seed=2)
    out = torch.full((samples, m, count, n + 3), 7.0).transpose(1, 2)[..., 1 : n + 1]
    to = matrices(out).part(some, rows, columns)
    a, b = part(left, some, rows, terms), part(right, some, terms, columns)
    multiplication(left, right)(
        matrices(left).part(some, rows, terms), matrices(right).part(some, terms, columns), to
    )
    expected = torch.full_like(out, 7.0)
    expected[some, :, rows, columns] = exact(a, b)
    assert torch.equal(out, expected)
    # Both turned: the product turned.
    turned = torch.empty(*expected[some, :, rows, columns].mT.shape)
    multiplication(left, right)(
        matrices(right).transposed().part(some, columns, terms),
        matrices(left).transposed().part(some, terms, rows),
        matrices(turned),
    )
    assert torch.equal(turned, exact(a, b).mT)


@pytest.mark.usefixtures("build")
def test_a_sum_of_nothing_is_zero_and_parts_end_where_slices_do():
    left, right = codes((2, 3, 8, 16), (0, 1, 2, 3), 0, 1), codes((2, 3, 16, 4), (0, 1, 2, 3), 0, 2)
    out = torch.full((2, 3, 8, 4), 7.0)
    nothing = slice(16, 9)
    multiplication(left, right)(
        matrices(left).part(None, None, nothing), matrices(right).part(None, nothing), matrices(out)
    )
    assert torch.equal(out, torch.zeros(2, 3, 8, 4))
    beyond = slice(5, 100)
    assert torch.equal(matrices(left).part(beyond, beyond).view(), left.codes[beyond, :, beyond])
    inner = left.codes[1:, :, 2:, 3:]
    seen = matrices(Operand(inner, None, 0)).part(None, slice(1, 4), slice(2, 5))
    assert torch.equal(seen.view(), inner[:, :, 1:4, 2:5])
    assert torch.equal(seen.transposed().view(), inner[:, :, 1:4, 2:5].mT)


@pytest.mark.skipif(not BUILDS, reason="there is no compiled product here")
def test_what_does_not_fit_is_refused():
    x, y = codes((2, 3, 8, 16), (0, 1, 2, 3), 0, 1), codes((2, 3, 16, 4), (0, 1, 2, 3), 0, 2)
    multiply, out = multiplication(x, y), matrices(torch.empty(2, 3, 8, 4))
    with pytest.raises(ValueError, match="shapes do not fit"):
        multiply(matrices(x), matrices(y).part(None, slice(0, 15)), out)
    with pytest.raises(ValueError, match="shapes do not fit"):
        multiply(matrices(x), matrices(y), matrices(torch.empty(2, 3, 4, 8)).transposed())
    with pytest.raises(ValueError, match="of other samples"):
        multiply(matrices(x).part(slice(0, 1)), matrices(y), out)
    with pytest.raises(TypeError, match="codes become floats"):
        multiply(out, matrices(torch.empty(2, 3, 4, 4)), matrices(torch.empty(2, 3, 8, 4)))
    with pytest.raises(ValueError, match="in one piece"):
        matrices(x).part(slice(0, 2, 2))
    with pytest.raises(TypeError, match="slices"):
        matrices(x).part(0)
    with pytest.raises(ValueError, match="four dimensions"):
        matrices(torch.empty(3, 4, 5))
    each = x._replace(exponents=torch.zeros(2, 1, 1, 1, dtype=torch.int8))
    with pytest.raises(ValueError, match="one exponent"):
        matrices(each)


def test_room_is_one_memory_for_all_bands():
    room = heads.Room(2 * 3 * 4 * 8)
    x, there = room.of(slice(5, 7), 3, slice(4, 8), slice(0, 8))
    assert x.shape == (6, 4, 8)
    y, _ = room.of(slice(0, 1), 3, slice(0, 4), slice(0, 2))
    assert y.shape == (3, 4, 2)
    assert y.data_ptr() == x.data_ptr()
    x.copy_(torch.arange(192.0).view(6, 4, 8))
    assert torch.equal(there.view(), x.view(2, 3, 4, 8))
    assert room.of(slice(1, 3), 3, slice(0, 4), slice(0, 8))[0] is x
