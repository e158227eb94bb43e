"""Q of a role as tests write it out: by its name in the run, not by the library's sites."""

import torch

from swalp import BlockFloat, Nearest, Stochastic, quantize
from swalp.noise import stream_seed
from swalp.recipes import Quantizer, Recipe

BITS = {"activation": 5, "error": 4}


def recipe(**changes):
    """Stochastic activations and errors, of different words; weights and the optimizer float."""
    roles = {
        role: Quantizer(BlockFloat(bits), Stochastic(random_bits=16)) for role, bits in BITS.items()
    }
    return Recipe(**{"name": "tests", "quantize_input": True, **roles, **changes})


def lossless(**changes):
    """Activations and errors of 24 bits: what is computed by quantized layers, but exactly."""
    wide = Quantizer(BlockFloat(24), Nearest())
    return Recipe(**{"name": "wide", "activation": wide, "error": wide, "quantize_input": True,
                     **changes})  # fmt: skip


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward = backward
        return forward(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.backward(grad), None, None


def rounded(x, layer, *, seed, step, call=0):
    """`x` rounded as an activation of `recipe()`, and its gradient as an error."""

    def q(role):
        rule = Stochastic(stream_seed(seed, role, layer), random_bits=16, step=step, call=call)
        return lambda value: quantize(value, BlockFloat(BITS[role]), rule)

    return _Both.apply(x, q("activation"), q("error"))
