"""`WeightAverage`: an average of a model's parameters over its training."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swalp._validation import require_bool, require_int, require_model
from swalp.averaging import taking
from swalp.averaging.kinds import (
    Accumulator,
    Equal,
    ExactSum,
    Exponential,
    Kind,
    check,
    describe,
)
from swalp.averaging.overlap import Overlap
from swalp.averaging.shards import is_sharded, local, reshard, sharded_like, whole
from swalp.convert import strip
from swalp.packed import PackedTensor
from swalp.recipes import Quantizer


class WeightAverage:
    """An average of a model's parameters over its training.

    Parameters of integers or bools, such as tables of indices, are no averages but the latest, like
    buffers.

    Call `update_parameters` once a step (or once an epoch: `start` and `every` count the calls).
    With t counting the calls, the parameters are taken when t > `start` and (t - start) is a
    multiple of `every`. Several averages of one run are several `WeightAverage`s.

    It keeps, for each weight: 8 bytes; with a `Quantizer` of at most 16 bits, codes and exponents;
    with `Window`, `length` iterates as they are. `nbytes` says how much. `module` needs 4 bytes
    more, from its first use on, unless the accumulator is torch.float32, whose memory it shares.

    Args:
        model: the network to be averaged: converted or float, packed or not, sharded or not.
        start: S, calls before averaging starts.
        every: c, calls from one iterate taken to the next.
        kind: `Equal()`, `Exponential(decay)` or `Window(length)`.
        accumulator: what the average is kept in, whatever the type of the parameters.

            * torch.float64: running mean;
            * torch.float32: running mean with a second float32 that collects what rounding loses,
              so that 10**6 iterates are averaged to within 2 units in the last place of the
              largest of them;
            * ``ExactSum(format)``: for fixed-point weights, integer sums;
            * ``Quantizer(format, rounding)``: the paper's Q_SWA: each update is rounded to a
              low-precision format. A stochastic rule gets streams of its own from `seed`.
        device: where the average lives, such as "cpu" for a model on a GPU; default: with the
            parameters.
        overlap: take iterates in a thread of its own while training goes on, from a copy that has
            the size of the parameters as they are held. The average is the same bit for bit;
            whatever reads it waits for that thread.
        seed: the run's seed, for a stochastic `accumulator`.

    Source: Yang et al. 2019 (arXiv:1904.11943), Algorithms 1 and 2.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        start: int = 0,
        every: int = 1,
        kind: Kind = Equal(),  # noqa: B008  (frozen)
        accumulator: Accumulator = torch.float32,
        device: torch.device | str | None = None,
        overlap: bool = False,
        seed: int = 0,
    ) -> None:
        require_int("WeightAverage", "start", start, 0, 2**62, "it counts calls")
        require_int("WeightAverage", "every", every, 1, 2**62, "it counts calls")
        require_int("WeightAverage", "seed", seed, 0, 2**64 - 1, "it is a 64-bit key")
        require_bool("WeightAverage", "overlap", overlap)
        require_model("WeightAverage", model)
        check(kind, accumulator)
        self.start = start
        self.every = every
        self.kind = kind
        self.accumulator = accumulator
        self.steps = 0
        self.count = 0
        self._seed = seed
        self._device = None if device is None else torch.device(device)
        self._overlap = Overlap() if overlap else None
        reshard(model)
        parameters = dict(model.named_parameters())
        _refuse_complex(parameters)
        self._sharded = any(is_sharded(each) for each in parameters.values())
        self._state = {
            name: self._empty(each) for name, each in parameters.items() if each.is_floating_point()
        }
        self._buffers = {
            name: self._at_home(each.detach().clone())
            for name, each in (*parameters.items(), *model.named_buffers())
            if name not in self._state
        }
        self._shapes = {name: each.shape for name, each in parameters.items()}
        self._names = _saved_names(model)
        self._module = None if self._sharded else self._skeleton(model)
        self._stale = True
        self._torn = False

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Count a call, and take `model`'s parameters into the average if it is time.

        If it raises, nothing has changed, unless Ctrl-C or a want of memory comes while an iterate
        is taken: then the average is of use again after `load_state_dict`. With `overlap`, numbers
        that could not be taken are told by the next call that needs the average, which is then
        without them.

        Raises:
            ValueError: `model` has other parameters or buffers than the network that the average
                was made from, as wrappers have, which put a name in front; or `accumulator` cannot
                take the numbers: an exact sum those off its grid, a format without NaN a NaN.
        """
        elapsed = self.steps + 1 - self.start
        due = elapsed > 0 and elapsed % self.every == 0
        if due or self.steps == 0:  # a mistake is told at once, not after the steps before `start`
            parameters, buffers = self._parameters(model), self._known_buffers(model)
        if not due:
            self.steps += 1
            return
        self._settle()
        weight, count = self._weight(), self.count
        if isinstance(self.accumulator, ExactSum) and count >= self.accumulator.most:
            raise ValueError(
                f"WeightAverage: {count} iterates are averaged, and sums of one more of "
                f"{self.accumulator.format} might not fit 64 bits; average in torch.float64"
            )
        jobs = [(name, local(parameters[name].detach())) for name in self._state]
        self._torn = True  # until all of it is done: Ctrl-C may come in between
        try:
            if self._overlap is None:
                self._take(jobs, weight, count, torch.get_num_threads())
            else:
                self._overlap.start(
                    jobs, lambda copies: self._take(copies, weight, count, 1), self._device
                )
        except taking.NotTakenError:
            self._torn = False
            raise
        for name, each in (parameters | buffers).items():
            if name in self._buffers:
                self._buffers[name].copy_(each)
        self.steps += 1
        self.count += 1
        self._stale = True
        self._torn = False

    @property
    def module(self) -> nn.Module:
        """A float network with the averaged parameters and the latest buffers.

        It is one and the same network, brought up to date at each access. Parameters and buffers of
        fewer than 32 bits are float32 there. Batch-norm statistics are those of the last iterate:
        run `recompute_batchnorm` on it before using it; they stay until the next iterate is taken.

        Raises:
            RuntimeError: nothing has been averaged yet, or the model is sharded.
        """
        if self._module is None:
            raise RuntimeError(
                "WeightAverage: a sharded model has no averaged network of its own; load "
                "averaged_state_dict(), on all ranks at once, into a plain one, or validate inside "
                "applied(model)"
            )
        self._require_iterates()
        if self._stale:
            # Memory made here is written to again, perhaps outside inference mode.
            with torch.inference_mode(False), torch.no_grad():
                self._fill(self._module)
            self._stale = False
        return self._module

    def value(self, name: str) -> Tensor:
        """The average of one parameter: float64, or float32 where that is what is kept.

        Of a sharded parameter it is sharded alike.

        Raises:
            RuntimeError: nothing has been averaged yet.
            KeyError: there is no such parameter of floats.
        """
        self._require_iterates()
        if name not in self._state:
            raise KeyError(
                f"WeightAverage: no parameter {name!r}; there are {', '.join(self._state)}"
            )
        state = self._state[name]
        average = taking.value(
            {key: local(each) for key, each in state.items()},
            self.kind,
            self.accumulator,
            self.count,
        )
        return sharded_like(next(iter(state.values())), average)

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters, whole, and the latest buffers, for `nn.Module.load_state_dict`.

        The keys are those of the model's own `state_dict`: a tied parameter has all its names, and
        buffers that are not persistent are left out. Extra state, which is no tensor, is too. Of a
        sharded model all ranks must ask at once.

        Raises:
            RuntimeError: nothing has been averaged yet.
        """
        self._require_iterates()
        averages = {name: self.value(name) for name in self._state}
        full = {name: whole(value) for name, value in averages.items()}
        full |= {name: whole(buffer).clone() for name, buffer in self._buffers.items()}
        return {key: full[name] for key, name in self._names.items() if name in full}

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """`model` with the averaged parameters, inside a ``with`` block; afterwards its own again.

        The averages stand there as floats, whatever the parameters are, in the type that the model
        computes in; a converted model goes on quantizing its activations. Buffers changed inside,
        such as recomputed batch-norm statistics, are put back too.

        Raises:
            RuntimeError: nothing has been averaged yet.
            ValueError: `model` has other parameters than the network that the average was made
                from, as wrappers have, which put a name in front.
        """
        self._require_iterates()
        buffers = [
            (module._buffers, key, buffer, buffer.clone())
            for module in model.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]
        put_back: list[Any] = []
        try:
            with torch.no_grad():
                for parent, key, own, average in self._slots(model):
                    if is_sharded(own):  # FSDP knows its shards, and needs them to stay
                        shard = local(own)
                        put_back.append((shard.copy_, shard.clone()))
                        shard.copy_(local(average))
                    else:
                        value = average.to(own.device, own.dtype, copy=True)
                        put_back.append((lambda own, p=parent, k=key: p.update({k: own}), own))
                        parent[key] = nn.Parameter(value, requires_grad=False)
            yield
        finally:
            if self._sharded:
                reshard(model)
            with torch.no_grad():
                for restore, value in put_back:
                    restore(value)
                for owner, key, buffer, before in buffers:
                    owner[key] = buffer.copy_(before)  # a forward may have put another there

    @property
    def nbytes(self) -> int:
        """Bytes kept: of the averages (this rank's shards), of `module`, of copies to overlap."""
        kept = [local(each) for state in self._state.values() for each in state.values()]
        shared = {each.data_ptr() for each in kept if not isinstance(each, PackedTensor)}
        own = {} if self._module is None else dict(self._module.named_parameters())
        averages = [each for name, each in own.items() if name in self._state]
        extra = [each for each in averages if not each.is_meta and each.data_ptr() not in shared]
        copies = 0 if self._overlap is None else self._overlap.nbytes
        return sum(each.nbytes for each in (*kept, *extra)) + copies

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: counts, what is kept of each parameter, the buffers.

        Beside tensors there are only numbers and strings.
        """
        self._settle()
        return {
            "kind": describe(self.kind, self.accumulator),
            "steps": self.steps,
            "count": self.count,
            "average": {
                name: {key: value.clone() for key, value in state.items()}
                for name, state in self._state.items()
            },
            "buffers": {name: value.clone() for name, value in self._buffers.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it belongs to another network, or to another kind of average.
        """
        if not self._torn:
            self._settle()
        elif self._overlap is not None:
            with contextlib.suppress(Exception):  # whatever it was, all is replaced
                self._overlap.wait()
        kind = describe(self.kind, self.accumulator)
        if state.get("kind", kind) != kind:  # version 0.1.0 saved none
            raise ValueError(
                f"WeightAverage: the saved average is {state['kind']}, this one {kind}; make it "
                f"with the kind and accumulator of the saved one"
            )
        if not {"average", "buffers", "steps", "count"} <= state.keys():
            raise ValueError(
                f"WeightAverage: the saved state has {sorted(state)}, where state_dict() of an "
                f"average gives average, buffers, count, kind and steps"
            )
        mine = _layout(self._state, self._buffers)
        theirs = _layout(state["average"], state["buffers"])
        if mine != theirs:
            different = sorted(
                name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)
            )
            raise ValueError(
                f"WeightAverage: the saved average is of another network or kind; what differs: "
                f"{', '.join(different[:5])}"
            )
        self._torn = True
        self.steps, self.count = state["steps"], state["count"]
        for name, kept in self._state.items():
            for key, value in kept.items():
                value.copy_(state["average"][name][key])
        for name, buffer in self._buffers.items():
            buffer.copy_(state["buffers"][name])
        self._stale = True
        self._torn = False

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return self.__dict__.copy()

    def _take(
        self, jobs: list[tuple[str, Tensor]], weight: float, count: int, threads: int
    ) -> None:
        for name, parameter in jobs:
            taking.check(parameter, self.accumulator, name)
        for name, parameter in jobs:
            taking.take(
                {key: local(each) for key, each in self._state[name].items()},
                parameter,
                self.kind,
                self.accumulator,
                weight=weight,
                count=count,
                seed=self._seed,
                name=name,
                threads=threads,
            )

    def _empty(self, parameter: Tensor) -> taking.State:
        kept = taking.empty(local(parameter.detach()), self.kind, self.accumulator, self._device)
        return {key: sharded_like(parameter, each) for key, each in kept.items()}

    def _at_home(self, value: Tensor) -> Tensor:
        """`value` where the average lives, in float32 if it is a shorter float."""
        short = value.is_floating_point() and value.dtype.itemsize < 4
        return value.to(self._device, torch.float32 if short else value.dtype)

    def _skeleton(self, model: nn.Module) -> nn.Module:
        """A float copy of `model` without averages: the rest of its values are those kept here."""
        memo: dict[int, Any] = {}
        for name, parameter in model.named_parameters():
            if name in self._buffers:
                memo[id(parameter)] = nn.Parameter(self._buffers[name], requires_grad=False)
                continue
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            memo[id(parameter)] = nn.Parameter(
                torch.empty(parameter.shape, dtype=dtype, device="meta"), requires_grad=False
            )
        for name, buffer in model.named_buffers():
            memo[id(buffer)] = self._buffers[name]
        return strip(copy.deepcopy(model, memo))

    def _fill(self, module: nn.Module) -> None:
        """Values for the network's parameters: shared with what is kept, or copied from it."""
        named = dict(module.named_parameters())
        if any(each.is_meta for each in named.values()):
            memory = {named[name]: self._memory(name, named[name]) for name in self._state}
            for part in module.modules():
                for key, each in part._parameters.items():
                    if each in memory:
                        part._parameters[key] = memory[each]
            named = dict(module.named_parameters())
        for name, each in named.items():
            if name in self._buffers:
                each.copy_(self._buffers[name])  # after copy.deepcopy they share no memory
            elif each.data_ptr() != self._shareable(name, each):
                each.copy_(self.value(name))

    def _memory(self, name: str, like: Tensor) -> nn.Parameter:
        """Memory for a parameter of `module`."""
        state = self._state[name]
        if self._shareable(name, like) is not None:
            return nn.Parameter(state["average"], requires_grad=False)
        home = next(iter(state.values())).device
        return nn.Parameter(torch.empty_like(like, device=home), requires_grad=False)

    def _shareable(self, name: str, like: Tensor) -> int | None:
        """Where the average of a parameter lies, if it lies as `module` needs it."""
        average = self._state[name].get("average")
        if average is None or isinstance(self.accumulator, Quantizer):
            return None
        return average.data_ptr() if average.dtype == like.dtype else None

    def _slots(self, model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor, Tensor]]:
        """(its module's dict, its key there, a parameter, its average), for each that has one."""
        names = {parameter: name for name, parameter in self._parameters(model).items()}
        for module in model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None and names[parameter] in self._state:
                    average = self.value(names[parameter])
                    yield module._parameters, key, parameter, average

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of `model` by name, or their shards; they must be those averaged."""
        if self._sharded:
            reshard(model)
        parameters = dict(model.named_parameters())
        found, own = {name: each.shape for name, each in parameters.items()}, self._shapes
        if found != own:
            names = found.keys() | own.keys()
            different = [name for name in names if found.get(name) != own.get(name)]
            raise _another(model, "parameters", different)
        return parameters

    def _known_buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """The buffers of `model` by name, each of which the average must have, too."""
        buffers = dict(model.named_buffers())
        own = {name: each.shape for name, each in self._buffers.items()}
        different = [name for name, each in buffers.items() if own.get(name) != each.shape]
        if different:
            raise _another(model, "buffers", different)
        return buffers

    def _require_iterates(self) -> None:
        self._settle()
        if self.count == 0:
            raise RuntimeError(
                f"WeightAverage: no average after {self.steps} steps; it starts after step "
                f"{self.start} and takes every {self.every}th"
            )

    def _settle(self) -> None:
        """Wait until the last iterate is taken; if it could not be, it does not count."""
        if self._torn:
            raise RuntimeError(
                "WeightAverage: an update was interrupted, and some parameters have taken the "
                "iterate and others not; go back to a saved state with load_state_dict"
            )
        if self._overlap is None:
            return
        try:
            self._overlap.wait()
        except Exception:
            self.count -= 1
            raise

    def _weight(self) -> float:
        """The weight of the next iterate."""
        if isinstance(self.kind, Exponential) and self.count > 0:
            return 1 - self.kind.decay
        return 1 / (self.count + 1)


def _refuse_complex(parameters: Mapping[str, Tensor]) -> None:
    for name, each in parameters.items():
        if each.is_complex():
            raise ValueError(
                f"WeightAverage: parameter {name!r} is {each.dtype}, which cannot be averaged; "
                f"make torch.view_as_real of it the parameter, which is of floats"
            )


def _another(model: nn.Module, what: str, names: list[str]) -> ValueError:
    """That `model` is not the network that the average was made from."""
    return ValueError(
        f"WeightAverage: {type(model).__name__} has {what} of other names or shapes than the "
        f"network that the average was made from (they differ in {', '.join(sorted(names)[:5])}); "
        f"pass that network, of a wrapper such as torch.compile's its _orig_mod or module"
    )


def _saved_names(model: nn.Module) -> dict[str, str]:
    """Each key of the model's `state_dict`, with the first name of the parameter or buffer."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    names = {id(tensor): name for name, tensor in tensors}
    # What a hook of the model's own made of a tensor has its name.
    saved = model.state_dict(keep_vars=True)
    return {key: names.get(id(value), key) for key, value in saved.items()}


def _layout(
    state: Mapping[str, Mapping[str, Tensor]], buffers: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What a state must have in common with an average that goes on from it."""
    averages = {
        name: {
            key: (value.shape, value.dtype, getattr(value, "format", None))
            for key, value in kept.items()
        }
        for name, kept in state.items()
    }
    return averages | {name: buffer.shape for name, buffer in buffers.items()}
