"""Two processes, FSDP on the CPU: the average of shards is that of the whole."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import swalp


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def trained(model, average):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 5, generator=generator)).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)


def work(rank, world, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    check_shards(world)
    check_batchnorm(rank, world)
    dist.barrier()
    dist.destroy_process_group()
    # At a process's end PyTorch now and then aborts over a thread of its own that still runs.
    os._exit(0)


def check_shards(world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, model = network(), network()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[3], model):
        fully_shard(layer, mesh=mesh)
    ours, whole = swalp.WeightAverage(model), swalp.WeightAverage(plain)
    trained(model, ours)
    trained(plain, whole)
    expected = whole.module.state_dict()
    found = ours.averaged_state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert 0.3 < ours.nbytes / sum(8 * p.numel() for p in plain.parameters()) < 0.7

    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    model.eval()
    before = model(x)
    with ours.applied(model):
        assert torch.equal(model(x), whole.module.eval()(x))
    assert torch.equal(model(x), before)

    again = swalp.WeightAverage(model)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    model(x)  # of which some parameters stay whole
    again.update_parameters(model)
    whole.update_parameters(plain)
    found = again.averaged_state_dict()
    assert all(torch.equal(found[name], p) for name, p in whole.module.named_parameters())
    with pytest.raises(RuntimeError, match=r"load averaged_state_dict\(\), on all ranks at once"):
        _ = ours.module


def check_batchnorm(rank, world):
    """Each process has its own batches, unequal ones; all get the statistics of all."""
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(size, 5, generator=generator) for size in (8, 5, 9, 2, 4)]
    expected, model = network(), network()
    swalp.recompute_batchnorm(expected, batches)
    swalp.recompute_batchnorm(model, batches[rank::world], group=dist.group.WORLD)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    assert model[1].num_batches_tracked == 5
    check_rare_layers(rank, world)


def check_rare_layers(rank, world):
    """A layer that one process alone reaches, once, and one that none does."""
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(4))
    model = nn.ModuleList(nn.BatchNorm1d(7) for _ in range(3))
    model[2].running_mean.fill_(100)
    batches = [(x[:4], 0), (x[:4], 0)] if rank == 0 else [(x[4:], 0), (x, 1)]
    swalp.recompute_batchnorm(
        model, batches, forward=lambda model, batch: model[batch[1]](batch[0]),
        group=dist.group.WORLD,
    )  # fmt: skip
    torch.testing.assert_close(model[0].running_mean, (2 * x[:4].sum(0) + x[4:].sum(0)) / 10)
    torch.testing.assert_close(model[1].running_mean, x.mean(0))
    torch.testing.assert_close(model[1].running_var, x.var(0))
    assert model[2].running_mean.tolist() == [100] * 7
    assert [int(layer.num_batches_tracked) for layer in model] == [3, 1, 0]


def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(2, port), nprocs=2)
