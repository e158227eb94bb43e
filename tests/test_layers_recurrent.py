"""Recurrent layers: PyTorch's own computation, with quantized operands at every step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import swalp
from rounded import lossless, recipe, rounded

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

KINDS = {
    "RNN": (nn.RNN, {}),
    "RNN, relu": (nn.RNN, {"nonlinearity": "relu"}),
    "LSTM": (nn.LSTM, {}),
    "LSTM, projected": (nn.LSTM, {"proj_size": 3}),
    "GRU": (nn.GRU, {}),
}
OPTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "deep": {"num_layers": 3, "bias": False},
    "both ways": {"num_layers": 2, "bidirectional": True},
}


def flat(result):
    """The tensors of what a recurrent layer returns."""
    parts = result if isinstance(result, tuple) and not isinstance(result, PackedSequence) else ()
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in parts for tensor in flat(part)]


def pair(kind, options, chosen):
    torch.manual_seed(0)
    plain = KINDS[kind][0](5, 7, **KINDS[kind][1], **OPTIONS[options])
    return plain, swalp.convert(copy.deepcopy(plain), chosen)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_with_lossless_operands_it_is_pytorchs(kind, options):
    """Outputs, final states and gradients within 1e-6 (two orders of summation)."""
    plain, model = pair(kind, options, lossless())
    x = torch.randn(4, 3, 5)
    for inputs in (x, x[0], pack_sequence([x[:2, 0], x[:, 1], x[:3, 2]], enforce_sorted=False)):
        given, expected = flat(model(inputs)), flat(plain(inputs))
        for ours, theirs in zip(given, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        sum(tensor.square().sum() for tensor in given).backward()
        sum(tensor.square().sum() for tensor in expected).backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_state(kind):
    plain, model = pair(kind, "both ways", lossless())
    x = torch.randn(4, 3, 5)
    lengths = pack_sequence([x[:2, 0], x[:, 1], x[:3, 2]], enforce_sorted=False)
    _, state = plain(torch.randn(2, 3, 5))
    for inputs in (x, lengths):
        for ours, theirs in zip(
            flat(model(inputs, state)), flat(plain(inputs, state)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_role_off_it_is_pytorchs_to_the_bit(kind):
    plain, model = pair(kind, "both ways", lossless(activation=None, error=None))
    x = torch.randn(4, 3, 5)
    for ours, theirs in zip(flat(model(x)), flat(plain(x)), strict=True):
        assert torch.equal(ours, theirs)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_gru_quantizes_inputs_and_hidden_states():
    """Against the recurrence written out: one rounding of all inputs, one of each state."""
    torch.manual_seed(0)
    model = swalp.convert(nn.GRU(5, 7), recipe(), seed=4)
    x = torch.randn(3, 2, 5, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    weights = [w.detach().clone().requires_grad_() for w in model.parameters()]

    def q(value, call):
        return rounded(value, "", seed=4, step=1, call=call)

    w_ih, w_hh, b_ih, b_hh = weights
    inner = F.linear(q(twin.flatten(0, 1), 0), w_ih, b_ih).reshape(3, 2, -1)
    h, states = torch.zeros(2, 7), []
    for step in range(3):
        i_r, i_z, i_n = inner[step].chunk(3, 1)
        o_r, o_z, o_n = F.linear(q(h, 1 + step), w_hh, b_hh).chunk(3, 1)
        r, z = (o_r + i_r).sigmoid(), (o_z + i_z).sigmoid()
        h = (h - (i_n + r * o_n).tanh()) * z + (i_n + r * o_n).tanh()
        states.append(h)
    expected = torch.stack(states)
    given, final = model(x)
    assert torch.equal(given, expected)
    assert torch.equal(final[0], h)
    given.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_the_networks_input_stays_as_it_is():
    torch.manual_seed(0)
    coarse = recipe(quantize_input=False)
    model = swalp.convert(nn.Sequential(nn.LSTM(5, 7)), coarse, seed=4)
    layer, x = model[0], torch.randn(1, 2, 5)
    gates = F.linear(x[0], layer.weight_ih_l0, layer.bias_ih_l0) + layer.bias_hh_l0  # h is 0
    i, _, g, o = gates.chunk(4, 1)
    expected = o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()
    torch.testing.assert_close(model(x)[0][0], expected, rtol=0, atol=1e-6)
    assert not torch.allclose(model(torch.cat([x, x]))[0][1], layer_twice(layer, x)[1], atol=1e-4)


def layer_twice(layer, x):
    plain = nn.LSTM(5, 7)
    plain.load_state_dict(layer.state_dict())
    return plain(torch.cat([x, x]))[0]


def test_dropout_between_layers_is_pytorchs():
    torch.manual_seed(0)
    plain = nn.GRU(5, 7, num_layers=2, dropout=0.5)
    model = swalp.convert(copy.deepcopy(plain), lossless())
    x = torch.randn(4, 3, 5)
    torch.manual_seed(1)
    dropped = model(x)[0]
    assert not torch.allclose(dropped, plain.eval()(x)[0], atol=1e-3)
    torch.testing.assert_close(model.eval()(x)[0], plain(x)[0], rtol=0, atol=1e-6)
    plain.train()
    torch.manual_seed(1)  # the same mask, for a tensor of as many numbers
    torch.testing.assert_close(dropped, plain(x)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells(kind):
    torch.manual_seed(0)
    plain = kind(5, 7)
    model = swalp.convert(copy.deepcopy(plain), lossless())
    off = swalp.convert(copy.deepcopy(plain), lossless(activation=None, error=None))
    x, h = torch.randn(3, 5), torch.randn(3, 7)
    state = (h, torch.randn(3, 7)) if kind is nn.LSTMCell else h
    for arguments in ((x,), (x[0],), (x, state)):
        given, expected, exact = (flat(cell(*arguments)) for cell in (model, plain, off))
        for ours, theirs, same in zip(given, expected, exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
            assert torch.equal(same, theirs)


def test_a_cell_in_a_loop_has_noise_of_its_own_at_every_step():
    model = swalp.convert(nn.Sequential(nn.Linear(5, 5), nn.GRUCell(5, 7)), recipe())
    x, h = torch.randn(3, 5), torch.randn(3, 7)
    with torch.no_grad():
        first, second = model[1](x, h), model[1](x, h)
    assert not torch.equal(first, second)


def test_packed_parameters_reach_the_layers_own_list():
    """PyTorch's forward reads `_flat_weights`, not the parameters."""
    torch.manual_seed(0)
    on = swalp.recipes.get("paper-small-block-8")
    chosen = lossless(weight=on.weight, activation=None, error=None)
    plain = nn.LSTM(5, 7)
    model = swalp.convert(copy.deepcopy(plain), chosen, packed=True)
    loose = swalp.convert(copy.deepcopy(plain), chosen)
    x = torch.randn(4, 3, 5)
    assert torch.equal(model(x)[0], loose(x)[0])
    assert torch.equal(swalp.to_float(model)(x)[0], loose(x)[0])


@pytest.mark.parametrize(
    ("inputs", "message"), [((2, 3, 4, 5), "2-D or 3-D, got 4-D"), ((2, 3, 6), "6|input_size")]
)
def test_wrong_inputs(inputs, message):
    model = swalp.convert(nn.GRU(5, 7), recipe())
    with pytest.raises((ValueError, RuntimeError), match=message):
        model(torch.randn(inputs))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_empty_batches_and_sequences(kind):
    layer = swalp.convert(kind(4, 3), "paper-big-block-8")
    assert layer(torch.randn(5, 0, 4))[0].shape == (5, 0, 3)
    with pytest.raises(RuntimeError, match="at least one step"):
        layer(torch.randn(0, 2, 4))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_a_recurrent_layer_with_a_forward_of_its_own_is_not_left_in_float_silently(kind):
    class Own(kind):
        def forward(self, x):
            return super().forward(x)

    x = torch.randn(2, 3, 4) if issubclass(kind, nn.RNNBase) else torch.randn(3, 4)
    with pytest.raises(TypeError, match="computes products that cannot be reached"):
        swalp.convert(Own(4, 3), "paper-big-block-4")(x)


def test_weights_that_are_computed_anew_are_refused():
    for layer, name in ((nn.LSTM(4, 3), "weight_hh_l0"), (nn.GRUCell(4, 3), "weight_hh"),
                        (nn.MultiheadAttention(4, 2), "in_proj_weight")):  # fmt: skip
        torch.nn.utils.parametrizations.weight_norm(layer, name)
        with pytest.raises(ValueError, match="computes its weights anew each time"):
            swalp.convert(layer, "paper-big-block-4")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_weights_train_to_the_same_numbers(kind):
    found = []
    for packed in (False, True):
        torch.manual_seed(0)
        model = swalp.convert(kind(8, 16, num_layers=2), "paper-small-block-8", packed=packed)
        optimizer = swalp.optim.SGD(model, lr=0.1, momentum=0.9, recipe="paper-small-block-8")
        x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            optimizer.zero_grad()
            model(x)[0].square().sum().backward()
            optimizer.step()
        found.append([torch.zeros_like(p).copy_(p.detach()) for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
