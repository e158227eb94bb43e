"""What a converted layer is: its own class, with a mixin that quantizes in front."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from swalp.formats import Format
from swalp.layers.sites import Site


@dataclass(slots=True)
class Lowered:
    """What converting leaves on a layer, beside its class.

    Attributes:
        input_site: where it quantizes what enters it, or its products; None: nowhere.
        output_site: where it quantizes what leaves it, or its products.
        outer: whether it takes the input of the network, which stays as it is.
        native: whether the products that its forward calls as functions run on integers.
        simulated: why its products are simulated though the recipe asks for native ones; empty: it
            does not ask, or they are native.
        weight_format: of its weight, if its own products are native.
        functions: which its forward called in its last pass in eager mode, and how often.
    """

    input_site: Site | None
    output_site: Site | None
    outer: bool = False
    native: bool = False
    simulated: str = ""
    weight_format: Format | None = None
    functions: dict[str, int] | None = None

    def in_evaluation(self) -> Lowered:
        """The same, with sites that round to nearest in either mode."""
        sites = (self.input_site, self.output_site)
        before, after = (None if site is None else site.in_evaluation() for site in sites)
        return replace(self, input_site=before, output_site=after)


class Quantized:
    """Mixin over a module: a forward that quantizes at two sites.

    A converted layer keeps its name, parameters, state and `isinstance`; only its class has one of
    these in front, made on the fly by `quantized_class`. As the class is anybody's, nothing but
    `forward` has a name that it may have given to something else.
    """

    _swalp_kind: ClassVar[type[nn.Module]]  # the class that it had before
    _swalp_layer: Lowered
    training: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: what a user's class does with its subclasses is not for those made here."""

    @classmethod
    def _swalp_namespace(cls, kind: type[nn.Module]) -> dict[str, Any]:
        """What the class made from this mixin and `kind` has of its own."""
        shown = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        return shown | {"_swalp_kind": kind}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # No module holds the class: what is kept is what it was made from.
        state = super().__reduce_ex__(protocol)[2:]
        mixin, kind = type(self).__bases__
        return _empty, (mixin, kind), *state


_made: dict[tuple[type, type], type[nn.Module]] = {}


def quantized_class(mixin: type[Quantized], kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with `mixin` in front, under its own name: one class for each pair."""
    if (mixin, kind) not in _made:
        _made[mixin, kind] = type(kind.__name__, (mixin, kind), mixin._swalp_namespace(kind))
    return _made[mixin, kind]


def float_class(module: nn.Module) -> type[nn.Module]:
    """The class that a converted layer had before."""
    assert isinstance(module, Quantized)
    return module._swalp_kind


def _empty(mixin: type[Quantized], kind: type[nn.Module]) -> nn.Module:
    low = quantized_class(mixin, kind)
    return low.__new__(low)
