"""What a converted layer is: its own class, with a mixin that quantizes in front."""

from __future__ import annotations

from typing import Any

from torch import nn

from swalp.layers.sites import Site


class Quantized:
    """Mixin over a module: two sites, and a forward that uses them.

    A converted layer keeps its name, parameters, state and `isinstance`; only its class has one of
    these in front, made on the fly by `quantized_class`.

    Attributes:
        input_site: where it quantizes what enters it, or its products; None: nowhere.
        output_site: where it quantizes what leaves it, or its products.
        outer: whether it takes the input of the network, which stays as it is.
        native: whether the products that its forward calls as functions run on integers.
        simulated: why its products are simulated though the recipe asks for native ones; empty: it
            does not ask, or they are native.
    """

    input_site: Site | None
    output_site: Site | None
    outer: bool
    native: bool = False
    simulated: str = ""
    training: bool

    @classmethod
    def namespace(cls, kind: type[nn.Module]) -> dict[str, Any]:
        """What the class made from this mixin and `kind` has of its own."""
        return {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # No module holds the class: what is kept is what it was made from.
        state = super().__reduce_ex__(protocol)[2:]
        mixin, kind = type(self).__bases__
        return _empty, (mixin, kind), *state


_made: dict[tuple[type, type], type[nn.Module]] = {}


def quantized_class(mixin: type[Quantized], kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with `mixin` in front, under its own name: one class for each pair."""
    if (mixin, kind) not in _made:
        _made[mixin, kind] = type(kind.__name__, (mixin, kind), mixin.namespace(kind))
    return _made[mixin, kind]


def float_class(module: nn.Module) -> type[nn.Module]:
    """The class that a converted layer had before."""
    kind: type[nn.Module] = type(module).__bases__[1]
    return kind


def _empty(mixin: type[Quantized], kind: type[nn.Module]) -> nn.Module:
    low = quantized_class(mixin, kind)
    return low.__new__(low)
