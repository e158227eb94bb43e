"""Recurrent layers, step by step, so that the operands of their products can be quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from swalp.layers.base import Quantized
from swalp.layers.functions import paused
from swalp.layers.products import Products
from swalp.packed import PackedTensor

# A cell takes the gates of the input and of the hidden state, and the state, and returns the next:
# (h,), or (h, c) for the LSTM.
State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]


def _tanh(inner: Tensor, outer: Tensor, state: State) -> State:
    return ((outer + inner).tanh(),)


def _relu(inner: Tensor, outer: Tensor, state: State) -> State:
    return ((outer + inner).relu(),)


def _lstm(inner: Tensor, outer: Tensor, state: State) -> State:
    i, f, g, o = (outer + inner).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(inner: Tensor, outer: Tensor, state: State) -> State:
    inner_r, inner_z, inner_n = inner.chunk(3, dim=-1)
    outer_r, outer_z, outer_n = outer.chunk(3, dim=-1)
    reset, update = (outer_r + inner_r).sigmoid(), (outer_z + inner_z).sigmoid()
    new = (inner_n + reset * outer_n).tanh()
    return ((state[0] - new) * update + new,)


_CELLS: dict[str, Cell] = {"RNN_TANH": _tanh, "RNN_RELU": _relu, "LSTM": _lstm, "GRU": _gru}


class QuantizedRecurrent(Quantized):
    """Mixin over `torch.nn.RNN`, `LSTM` and `GRU`: what enters their products is quantized.

    The input of a layer is quantized for all steps at once, the hidden state at each step, the
    output of an LSTM before its projection likewise. Gates, cell states and dropout are float. With
    both sites off it is PyTorch's own computation.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the parent's."""
        layer = self._swalp_layer
        if layer.input_site is None and layer.output_site is None:
            with paused():
                return super().forward(input, hx)  # type: ignore[misc]  # a mixin
        products = Products.begin(layer, self.training)
        with paused():
            return _recurrent(self, products, input, hx)


def _recurrent(module: Any, products: Products, x: Any, hx: Any) -> Any:
    """The forward of an RNN, LSTM or GRU on a batch, a sequence or a packed batch."""
    is_lstm = module.mode == "LSTM"
    packed = x if isinstance(x, PackedSequence) else None
    batch_sizes: Tensor | None = None
    batched = True
    if packed is not None:
        data, batch_sizes, order, back = packed
        sizes = batch_sizes.tolist()
        steps = data
    else:
        order = back = None
        if x.dim() not in (2, 3):
            raise ValueError(f"{module.mode}: expected input to be 2-D or 3-D, got {x.dim()}-D")
        batched = x.dim() == 3
        if not batched:
            x = x.unsqueeze(0 if module.batch_first else 1)
        steps = x
        time_first = x.transpose(0, 1) if module.batch_first else x
        if not len(time_first):
            raise RuntimeError(f"{module.mode}: expected a sequence of at least one step")
        sizes = [time_first.size(1)] * time_first.size(0)
        data = time_first.flatten(0, 1)
    if hx is None:
        state = _zeros(module, data, sizes[0], is_lstm)
    else:
        state = tuple(hx) if is_lstm else (hx,)
        if not batched:
            state = tuple(part.unsqueeze(1) for part in state)
        if order is not None:
            state = tuple(part.index_select(1, order) for part in state)
    module.check_forward_args(steps, state if is_lstm else state[0], batch_sizes)

    finals: list[State] = []
    directions = 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        operand = data if layer == 0 and module._swalp_layer.outer else products.enter(data)
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            suffix = f"l{layer}{'_reverse' if direction else ''}"
            start = tuple(part[place] for part in state)
            output, final = _scan(module, products, operand, sizes, start, suffix)
            outputs.append(output)
            finals.append(final)
        data = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
        if module.dropout > 0 and layer < module.num_layers - 1:
            data = F.dropout(data, module.dropout, module.training)
    last = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    if back is not None:
        last = tuple(part.index_select(1, back) for part in last)
    if not batched:
        last = tuple(part.squeeze(1) for part in last)
    final_state = last if is_lstm else last[0]
    if packed is not None:
        return PackedSequence(data, packed.batch_sizes, order, back), final_state
    output = data.reshape(len(sizes), sizes[0], data.shape[-1])
    if module.batch_first:
        output = output.transpose(0, 1)
    if not batched:
        output = output.squeeze(0 if module.batch_first else 1)
    return output, final_state


def _scan(
    module: nn.RNNBase, products: Products, operand: Tensor, sizes: list[int], start: State,
    suffix: str,
) -> tuple[Tensor, State]:  # fmt: skip
    """One direction of one layer: outputs of all steps, and the state after the last of each.

    Args:
        module: has the weights.
        products: multiplies.
        operand: quantized inputs of all steps, (sum of sizes, features).
        sizes: of the batch at each step, never rising: the longest sequences come first.
        start: states before the first step, (batch, …).
        suffix: of the weights' names; it says the direction.
    """
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = (
        getattr(module, f"{name}_{suffix}", None)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    )
    assert weight_ih is not None
    weight_hh, weight_hr, bias_hh = map(_as_floats, (weight_hh, weight_hr, bias_hh))
    assert weight_hh is not None
    cell = _CELLS[module.mode]
    inner = torch.split(products.leave(F.linear(operand, weight_ih, bias_ih)), sizes)
    backward = suffix.endswith("_reverse")
    outputs: list[Tensor] = []
    finished: list[State] = []
    state = start
    if backward:
        state = tuple(part[: sizes[-1]] for part in start)
    for step in reversed(range(len(sizes))) if backward else range(len(sizes)):
        have, size = state[0].size(0), sizes[step]
        if size > have:  # backward: sequences that end here begin
            state = tuple(
                torch.cat([part, first[have:size]])
                for part, first in zip(state, start, strict=True)
            )
        elif size < have:  # forward: sequences that ended before
            finished.append(tuple(part[size:] for part in state))
            state = tuple(part[:size] for part in state)
        state = cell(inner[step], products.linear(state[0], weight_hh, bias_hh), state)
        if weight_hr is not None:
            state = (products.linear(state[0], weight_hr), *state[1:])
        outputs.append(state[0])
    if backward:
        outputs.reverse()
    parts = [state, *reversed(finished)]
    final = tuple(torch.cat(rows) for rows in zip(*parts, strict=True))
    return torch.cat(outputs), final


def _as_floats(parameter: Tensor | None) -> Tensor | None:
    """A packed parameter unpacked for all steps at once, as autograd sees; others as they are."""
    return parameter.mul(1.0) if isinstance(parameter, PackedTensor) else parameter


def _zeros(module: nn.RNNBase, x: Tensor, batch: int, is_lstm: bool) -> State:
    count = module.num_layers * (2 if module.bidirectional else 1)
    hidden = x.new_zeros(count, batch, module.proj_size or module.hidden_size)
    return (hidden, x.new_zeros(count, batch, module.hidden_size)) if is_lstm else (hidden,)


class QuantizedCell(Quantized):
    """Mixin over the cells of recurrent layers: what enters their two products is quantized."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the parent's."""
        layer = self._swalp_layer
        if layer.input_site is None and layer.output_site is None:
            with paused():
                return super().forward(input, hx)  # type: ignore[misc]  # a mixin
        products = Products.begin(layer, self.training)
        with paused():
            return _cell(self, _cell_of(self), products, input, hx)


def _cell_of(module: object) -> Cell:
    if isinstance(module, nn.RNNCell):
        return _CELLS[f"RNN_{module.nonlinearity.upper()}"]
    return _lstm if isinstance(module, nn.LSTMCell) else _gru


def _cell(module: Any, cell: Cell, products: Products, x: Tensor, hx: Any) -> Tensor | State:
    if x.dim() not in (1, 2):
        raise ValueError(f"{type(module).__name__}: expected a 1-D or 2-D input, got {x.dim()}-D")
    batched = x.dim() == 2
    is_lstm = cell is _lstm
    if hx is None:
        zeros = x.new_zeros(*x.shape[:-1], module.hidden_size)
        hx = (zeros, zeros) if is_lstm else zeros
    state: State = tuple(hx) if is_lstm else (hx,)
    if not batched:
        x, state = x.unsqueeze(0), tuple(part.unsqueeze(0) for part in state)
    operand = x if module._swalp_layer.outer else products.enter(x)
    inner = products.leave(F.linear(operand, module.weight_ih, module.bias_ih))
    outer = products.linear(state[0], module.weight_hh, module.bias_hh)
    state = cell(inner, outer, state)
    if not batched:
        state = tuple(part.squeeze(0) for part in state)
    return state if is_lstm else state[0]
