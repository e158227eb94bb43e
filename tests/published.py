"""The two published codes of SWALP, said again in eager PyTorch: the oracle of their recipes.

`Official` is the loop of `stevenygd/SWALP`, `QPyTorch` that of the example in `Tiiiger/QPyTorch`.
Both round by ``floor(x + r)``, both step `torch.optim.SGD`; the uniform numbers r come from the
library's noise. What is mended here as in the library: the exponent is exact, blocks of zeros stay
zeros, r has as many bits as the recipe gives it, and initial weights are rounded.
"""

import numpy as np
import torch
from torch import Tensor, nn

from swalp.noise import stream_seed


def philox(blocks: np.ndarray, seed: int, step: int, call: int) -> list[np.ndarray]:
    """Four 32-bit words for each block number, by Philox4x32-10, in uint64."""
    word = np.uint64(0xFFFFFFFF)
    high = np.uint64(32)
    a, b = blocks & word, blocks >> high
    c, d = np.full_like(blocks, step), np.full_like(blocks, call)
    left, right = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a = (second >> high) ^ b ^ np.uint64(left)
        c = (first >> high) ^ d ^ np.uint64(right)
        b, d = second & word, first & word
        left, right = (left + 0x9E3779B9) & 0xFFFFFFFF, (right + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def uniform(shape, bits: int, seed: int, step: int, call: int = 0) -> Tensor:
    """(U + 1/2) / 2**bits for each element, float64; `bits` is 16 or 32."""
    count, at_once = int(np.prod(shape)), 1 << 16
    parts = []
    for start in range(0, -(-count // 8), at_once):  # so that it stays in the cache
        blocks = np.arange(start, min(start + at_once, -(-count // 8)), dtype=np.uint64)
        numbers = np.uint64(0)
        for added in (0, 1 << 63)[: bits // 16]:
            words = philox(blocks | np.uint64(added), seed, step, call)
            halves = [half for word in words for half in (word & np.uint64(0xFFFF), word >> 16)]
            numbers = numbers << np.uint64(16) | np.stack(halves, axis=1).reshape(-1)
        parts.append(numbers)
    numbers = np.concatenate(parts)[:count] if parts else np.zeros(0)
    return torch.from_numpy((numbers + 0.5) * 2.0**-bits).reshape(shape)


def block_quantize(x: Tensor, bits: int, u: Tensor, *, rows: bool, symmetric: bool) -> Tensor:
    """Block floating point with an exponent for each index of dim 0, or for the tensor."""
    largest = x.abs().reshape(x.shape[0], -1).amax(1) if rows else x.abs().amax()
    exponent = torch.frexp(largest)[1].double() - 1
    exponent = exponent.clamp(-128, 127).reshape([-1 if rows else 1] + [1] * (x.dim() - 1))
    # floor(x + r) rounds a magnitude up where r >= 1 - fraction above zero, r < fraction below. The
    # library never does where r is as far from its end as that: hence the grain of sand.
    r = torch.where(x < 0, u, 1 - u - 2.0**-41)
    integers = torch.floor(x.double() * 2 ** (bits - 2 - exponent) + r)
    top = 2 ** (bits - 1) - 1
    integers = integers.clamp(-top if symmetric else -top - 1, top)
    return (integers * 2 ** (exponent - bits + 2)).float()


class _Quantizer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, code, name, step, call):
        ctx.code, ctx.key = code, (name, step, call)
        return code.signal(x, "activation", *ctx.key)

    @staticmethod
    def backward(ctx, grad):
        return ctx.code.signal(grad, "error", *ctx.key), None, None, None, None


class Published:
    """A network, an optimizer, and where the code puts its quantizers."""

    bits = 8
    seed = 0
    symmetric: bool

    def __init__(self, model: nn.Module, **settings) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.optimizer = torch.optim.SGD(model.parameters(), **settings)
        self.passes = self.steps = 0
        self.calls: dict[str, int] = {}

    def u(self, shape, bits, role, name, step, call=0):
        return uniform(shape, bits, stream_seed(self.seed, role, name), step, call)

    def quant(self, x: Tensor, name: str) -> Tensor:
        """A BlockQuantizer: rounds what passes, and the gradient that comes back."""
        call = self.calls.get(name, 0)
        self.calls[name] = call + 1
        return _Quantizer.apply(x, self, name, self.passes, call)

    def signal(self, x, role, name, step, call):
        u = self.u(x.shape, 16, role, name, step, call)
        rows = self.rows_of_signals
        return block_quantize(x, self.bits, u, rows=rows, symmetric=self.symmetric)

    def of_parameter(self, x: Tensor, role: str, name: str, call: int = 0) -> Tensor:
        u = self.u(x.shape, 32 if role in ("weight", "accumulator") else 16,
                   role, name, self.steps, call)  # fmt: skip
        rows = self.rows(x)
        return block_quantize(x, self.bits, u, rows=rows, symmetric=self.symmetric)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.calls.clear()
        return self.network(x)

    def momentum(self, p: Tensor) -> dict:
        return self.optimizer.state[p]


class Official(Published):
    """`BlockQuantizer` drops its block arguments: one exponent for a whole activation or error."""

    symmetric = False
    rows_of_signals = False

    def __init__(self, model: nn.Module, **settings) -> None:
        super().__init__(model, **settings)
        self.accumulators = {name: p.data.clone() for name, p in self.parameters.items()}

    def rows(self, x: Tensor) -> bool:
        return x.dim() > 1

    def step(self) -> None:
        """What follows the backward pass in its `train_batch`."""
        for name, p in self.parameters.items():
            p.grad = self.of_parameter(p.grad, "gradient", name)
            p.data = self.accumulators[name]
        self.optimizer.step()
        for name, p in self.parameters.items():
            self.accumulators[name] = self.of_parameter(p.data, "accumulator", name)
            p.data = self.of_parameter(self.accumulators[name], "weight", name)
        for name, p in self.parameters.items():
            state = self.optimizer.state[p]
            state["momentum_buffer"] = self.of_parameter(
                state["momentum_buffer"], "momentum", name
            )  # by the gradients' quantizer
        for name, p in self.parameters.items():
            p.data = self.of_parameter(p.data, "weight", name, call=1)
        self.steps += 1


class OfficialVGG(Official):
    """Its VGG has a quantizer after each nonlinearity."""

    def network(self, x: Tensor) -> Tensor:
        for name, layer in self.model.named_children():
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                x = self.quant(x, name)
        return x


class OfficialPreResNet(Official):
    """Its PreResNet has one after each nonlinearity and convolution, but for the last and the
    shortcuts'."""

    def network(self, x: Tensor) -> Tensor:
        stem, *blocks, norm, relu, pool, flat, last = self.model.named_children()
        x = self.quant(stem[1](x), stem[0])
        for name, block in blocks:
            residual = x
            out = self.quant(block.relu1(block.bn1(x)), f"{name}.relu1")
            out = self.quant(block.conv1(out), f"{name}.conv1")
            out = self.quant(block.relu2(block.bn2(out)), f"{name}.relu2")
            out = self.quant(block.conv2(out), f"{name}.conv2")
            out = self.quant(block.relu3(block.bn3(out)), f"{name}.relu3")
            out = self.quant(block.conv3(out), f"{name}.conv3")
            x = out + block.shortcut(residual)
        return last[1](flat[1](pool[1](relu[1](norm[1](x)))))


class QPyTorch(Published):
    """`sequential_lower` puts a quantizer after each convolution and linear layer; the example
    takes the last one out. All blocks go by dim 0, even those of vectors."""

    symmetric = True
    rows_of_signals = True

    def rows(self, x: Tensor) -> bool:
        return True

    def network(self, x: Tensor) -> Tensor:
        names = [name for name, _ in self.model.named_children()]
        for name, layer in self.model.named_children():
            x = layer(x)
            if isinstance(layer, nn.Conv2d | nn.Linear) and name != names[-1]:
                x = self.quant(x, name)
        return x

    def step(self) -> None:
        """Its `OptimLP.step`, with a weight, a gradient and a momentum quantizer."""
        for name, p in self.parameters.items():
            p.grad = self.of_parameter(p.grad, "gradient", name)
        self.optimizer.step()
        for name, p in self.parameters.items():
            p.data = self.of_parameter(p.data, "weight", name)
        for name, p in self.parameters.items():
            state = self.optimizer.state[p]
            state["momentum_buffer"] = self.of_parameter(state["momentum_buffer"], "momentum", name)
        self.steps += 1
