"""Views of packed tensors: values to read, and what a dispatcher must know of an operation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def read_only() -> RuntimeError:
    """Why nothing can be written to a view."""
    return RuntimeError(
        "a view of a packed tensor is read-only, as its exponents are shared with the rest; assign "
        "to the tensor itself, as in weight[0] = 0, or dequantize() it first"
    )


class View(torch.Tensor):
    """Values of a part of a packed tensor: of floats that nobody holds, so that writes are refused.

    Attributes:
        floats: the values, plain.
    """

    floats: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> View:
        """Of these floats, a tensor of their own."""
        result: View = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), dtype=values.dtype, device=values.device
        )
        result.floats = values
        return result

    def numpy(self, *, force: bool = False) -> Any:
        """As a copy would have it."""
        return self.floats.detach().requires_grad_(self.requires_grad).numpy(force=force)

    def tolist(self) -> Any:
        """Likewise."""
        return self.floats.tolist()

    def __format__(self, spec: str) -> str:
        return self.floats.__format__(spec)  # type: ignore[no-untyped-call,no-any-return]  # PyTorch has no type

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.floats.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.floats.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # PyTorch has no type

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # untyped
        return repr(self.floats)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # as PyTorch's own subclasses have it
        kwargs = kwargs or {}
        refuse_collectives(func)
        if any(isinstance(target, View) for target in targets(func, args, kwargs)):
            raise read_only()

        def widen(argument: Any) -> Any:
            return argument.floats if isinstance(argument, View) else argument

        with mode_of(func, args):
            result = func(*tree_map(widen, args), **tree_map(widen, kwargs))
            return tree_map(viewed, result) if views(func) else result


def viewed(value: Any) -> Any:
    """A plain tensor as a view; anything else as it is."""
    return View(value) if type(value) is Tensor else value


@cache
def views(func: Any) -> bool:
    """Whether results share the memory of an argument that the operation does not write to."""
    return any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in func._schema.returns
    )


def mode_of(func: Any, args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Of inference or not, as the base was made: a view shares its version, if it has one."""
    if not views(func) or args[0].is_inference() == torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(args[0].is_inference())


def refuse_collectives(func: Any) -> None:
    """Their schemas do not say what they write to."""
    if func.namespace == "c10d":
        raise RuntimeError(
            f"{func} does not take packed tensors, nor views of them: communicate .codes and "
            f".exponents of the packed tensor, or dequantize() it first"
        )


def targets(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What the operation writes to."""
    found: list[Any] = []
    for position, parameter in enumerate(func._schema.arguments):
        if parameter.alias_info is None or not parameter.alias_info.is_write:
            continue
        given = args[position] if position < len(args) else kwargs.get(parameter.name)
        found += given if isinstance(given, list | tuple) else [given]
    return found
