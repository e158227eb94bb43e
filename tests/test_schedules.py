import copy
import itertools
import math

import pytest
import torch
from torch import nn

import swalp
from swalp.schedules import Cosine, Cyclic, Linear, Published, as_scheduler

RATE = Published(start=200, learning_rate=0.05, averaging_rate=0.01)
ENDS = {"start": 10, "learning_rate": 0.1, "averaging_rate": 0.02}


def test_published_vgg16_rates():
    assert [RATE(epoch) for epoch in (0, 99, 100)] == [0.05] * 3
    assert RATE(140) == pytest.approx(0.05 * (1 - 0.99 * 0.5))
    assert [RATE(epoch) for epoch in (180, 190, 199)] == [pytest.approx(0.0005)] * 3
    assert [RATE(epoch) for epoch in (200, 299)] == [0.01] * 2


def test_published_falls_without_jumps_before_averaging():
    rates = [RATE(epoch / 10) for epoch in range(2000)]
    assert all(0 <= before - after < 1e-4 for before, after in itertools.pairwise(rates))


def test_linear_and_cosine_end_in_the_averaging_rate():
    assert [Linear(**ENDS)(t) for t in (0, 5, 10, 99)] == pytest.approx([0.1, 0.06, 0.02, 0.02])
    cosine = Cosine(**ENDS)
    assert [cosine(t) for t in (0, 5, 10, 99)] == pytest.approx([0.1, 0.06, 0.02, 0.02])
    assert cosine(2.5) == pytest.approx(0.02 + 0.08 * (1 + math.cos(math.pi / 4)) / 2)


def test_cyclic_is_low_where_it_is_averaged():
    rate = Cyclic(before=RATE, start=200, cycle=5, high=0.05, low=0.01)
    assert rate(199) == RATE(199)
    expected = [0.05, 0.04, 0.03, 0.02, 0.01] * 2
    assert [rate(200 + t) for t in range(10)] == pytest.approx(expected)
    model = nn.Linear(1, 1)
    average = swalp.WeightAverage(model, start=200, every=5)
    rates = []
    for step in range(220):
        before = average.count
        average.update_parameters(model)
        if average.count > before:
            rates.append(rate(step))
    assert rates == pytest.approx([0.01] * 4)


@pytest.mark.parametrize("schedule", [RATE, Cosine(**ENDS)], ids=repr)
def test_as_a_pytorch_scheduler(schedule):
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    groups = [{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = as_scheduler(optimizer, schedule)
    for step in range(30):
        own, double = (group["lr"] for group in optimizer.param_groups)
        assert own == pytest.approx(schedule(step))
        assert double == pytest.approx(2 * schedule(step))
        optimizer.step()
        scheduler.step()


def two_groups(lr=0.1):
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    groups = [{"params": first.parameters()}, {"params": second.parameters(), "lr": 2 * lr}]
    return torch.optim.SGD(groups, lr=lr)


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def advance(optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("loads_first", [True, False])
def test_a_scheduler_resumes_whichever_is_loaded_first(loads_first):
    optimizer = two_groups()
    scheduler = as_scheduler(optimizer, Cosine(**ENDS))
    advance(optimizer, scheduler, 8)
    states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    optimizer = two_groups()
    if loads_first:
        optimizer.load_state_dict(states[0])
    scheduler = as_scheduler(optimizer, Cosine(**ENDS))
    if not loads_first:
        optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    advance(optimizer, scheduler, 1)
    rate = Cosine(**ENDS)(9)
    assert rates(optimizer) == pytest.approx([rate, 2 * rate])


def test_a_second_schedule_on_one_optimizer():
    optimizer = two_groups()
    advance(optimizer, as_scheduler(optimizer, Cosine(**ENDS)), 10)
    scheduler = as_scheduler(optimizer, Linear(start=4, learning_rate=0.5, averaging_rate=0.1))
    assert rates(optimizer) == pytest.approx([0.5, 1.0])
    advance(optimizer, scheduler, 4)
    assert rates(optimizer) == pytest.approx([0.1, 0.2])


def test_a_rate_that_is_a_tensor():
    optimizer = two_groups(lr=torch.tensor(0.1))
    scheduler = as_scheduler(optimizer, Cosine(**ENDS))
    advance(optimizer, scheduler, 5)
    assert rates(optimizer) == pytest.approx([0.06, 0.12])


def test_mistakes():
    with pytest.raises(ValueError, match="Published: start=0 must be positive"):
        Published(start=0, learning_rate=0.1, averaging_rate=0.1)
    with pytest.raises(ValueError, match=r"Linear: learning_rate=-0\.1 must be 0 or more"):
        Linear(start=1, learning_rate=-0.1, averaging_rate=0.1)
    with pytest.raises(ValueError, match="Cyclic: cycle=0 must be positive"):
        Cyclic(before=RATE, start=1, cycle=0, high=1, low=0)
    with pytest.raises(ValueError, match="first group has lr=0"):
        as_scheduler(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.0), RATE)
