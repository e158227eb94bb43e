"""The pickles of the CIFAR files, read without running anything that they name.

`pickletools.genops` takes the file apart into opcodes; a stack machine of the few that these files
use puts dictionaries, lists, numbers, text and byte arrays together again. The one kind of object
is a NumPy array of bytes, recognized by name and never built by the code that the pickle names.
"""

from __future__ import annotations

import pickletools
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MARK = object()
_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class PickleError(ValueError):
    """The bytes are no pickle of this kind; the text, one line, says why."""


class _Name(NamedTuple):
    """Something that the pickle refers to."""

    module: str
    name: str


@dataclass(slots=True)
class _Array:
    """An array in the making: its shape and bytes arrive after it."""

    shape: tuple[int, ...] = (0,)
    text: str = ""


class _Bytes:
    """The dtype of bytes in the making: its details arrive after it."""


def read(content: bytes) -> Any:
    """What a pickle holds: dict, list, tuple, int, bool, None, str, and arrays as uint8 tensors.

    Text and binary strings of Python 2 both become str, byte for character (Latin-1).

    Args:
        content: the file, of whose size this takes a few times the memory.

    Raises:
        PickleError: it has an opcode or refers to a name that CIFAR's files do not have, is
            truncated, or does not fit together.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of escapes in garbled text
            for opcode, argument, _ in pickletools.genops(content):
                match opcode.name:
                    case "PROTO":
                        pass
                    case "STOP":
                        (result,) = stack
                        return _finished(result, len(content))
                    case _:
                        _execute(opcode.name, argument, stack, memo)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PickleError(f"malformed: {type(error).__name__}: {reason}") from None
    raise PickleError("truncated: there is no end")


def _execute(opcode: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """One step of the machine; the stack may not be what the opcode needs."""
    match opcode:
        case "BININT" | "BININT1" | "BININT2" | "SHORT_BINSTRING" | "BINSTRING" | "BINUNICODE":
            stack.append(argument)
        case "NONE":
            stack.append(None)
        case "NEWFALSE":
            stack.append(False)
        case "NEWTRUE":
            stack.append(True)
        case "EMPTY_DICT":
            stack.append({})
        case "EMPTY_LIST":
            stack.append([])
        case "EMPTY_TUPLE":
            stack.append(())
        case "MARK":
            stack.append(_MARK)
        case "BINPUT" | "LONG_BINPUT":
            memo[argument] = stack[-1]
        case "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case "TUPLE":
            stack.append(tuple(_since_mark(stack)))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            values = [stack.pop() for _ in range(int(opcode[-1]))]
            stack.append(tuple(reversed(values)))
        case "APPEND":
            value = stack.pop()
            _require(stack[-1], list).append(value)
        case "APPENDS":
            values = _since_mark(stack)
            _require(stack[-1], list).extend(values)
        case "SETITEM":
            value, key = stack.pop(), stack.pop()
            _require(stack[-1], dict)[_require(key, str)] = value
        case "SETITEMS":
            values = _since_mark(stack)
            for key, value in zip(values[::2], values[1::2], strict=True):
                _require(stack[-1], dict)[_require(key, str)] = value
        case "GLOBAL":
            module, _, name = argument.partition(" ")
            if (module, name) not in _NAMES:
                raise PickleError(
                    f"it refers to {module[:60]}.{name[:60]}, which no CIFAR file does"
                )
            stack.append(_Name(module, name))
        case "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_called(function, arguments))
        case "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        case _:
            raise PickleError(f"it has the opcode {opcode}, which no CIFAR file has")


def _called(function: Any, arguments: Any) -> _Array | _Bytes:
    """What the two calls in these files stand for."""
    match function, arguments:
        case _Name(name="_reconstruct"), (_Name(name="ndarray"), (0,), "b"):
            return _Array()
        case _Name(name="dtype"), ("u1", 0, 1):
            return _Bytes()
    raise PickleError("it calls something otherwise than CIFAR files do")


def _build(target: Any, state: Any) -> None:
    """Give an object its state: the details of bytes, which are known, or an array's content."""
    match target, state:
        case _Bytes(), (3, "|", None, None, None, -1, -1, 0):
            return
        case _Array(), (1, (rows, columns), _Bytes(), False, str(text)):
            sides = type(rows) is int and type(columns) is int and rows > 0 and columns > 0
            if sides and rows * columns == len(text):
                target.shape, target.text = (rows, columns), text
                return
    raise PickleError("it has an array that is not bytes in rows and columns")


def _finished(value: Any, limit: int) -> Any:
    """The result, whose dictionary holds arrays, with tensors in their place.

    Names for one array are many tensors; together they must not exceed `limit` bytes.
    """
    if not isinstance(value, dict):
        return value
    arrays = [item for item in value.values() if isinstance(item, _Array)]
    if sum(len(array.text) for array in arrays) > limit:
        raise PickleError("it has more arrays than fit into it")
    return {key: _tensor(item) if isinstance(item, _Array) else item for key, item in value.items()}


def _tensor(array: _Array) -> Tensor:
    content = bytearray(array.text, "latin-1")
    if not content:
        raise PickleError("it has an empty array")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(array.shape)


def _since_mark(stack: list[Any]) -> list[Any]:
    place = len(stack) - 1
    while stack[place] is not _MARK:
        place -= 1
    values = stack[place + 1 :]
    del stack[place:]
    return values


def _require(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise PickleError(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
    return value
