"""Reads the few pickle opcodes that the official CIFAR files use, and refuses every other.

Nothing is unpickled: :mod:`pickletools` only disassembles, and the small machine below builds dictionaries, lists,
numbers, byte strings and arrays of unsigned bytes. The only names it knows are the three that numpy's pickled arrays
mention, and knowing them means taking them for tags: nothing is ever imported or called.
Opcodes: https://github.com/python/cpython/blob/3.11/Lib/pickletools.py
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from services.tolaria.errors import DataCorruptError

_MARK: Final = object()
_RECONSTRUCT: Final = frozenset({"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"})
_KNOWN_NAMES: Final = _RECONSTRUCT | {"numpy ndarray", "numpy dtype"}


class _RefusedError(Exception):
    pass


@dataclass(frozen=True)
class _Name:
    """A global's name as a tag; never resolved."""

    text: str


class _UnsignedByte:
    """Stands for ``numpy.dtype('u1')``, the only element type accepted."""


@dataclass
class _Array:
    content: npt.NDArray[np.uint8] | None = None

    def build(self, state: Any) -> None:
        _version, shape, dtype, fortran, content = state
        if not isinstance(dtype, _UnsignedByte) or not isinstance(content, bytes):
            raise _RefusedError("an array of anything but unsigned bytes")
        flat = np.frombuffer(content, dtype=np.uint8)
        self.content = flat.reshape(shape, order="F" if fortran else "C")


def read(data: bytes) -> dict[Any, Any]:
    """The dictionary that ``data`` (a pickle of protocol 2) describes; byte strings stay bytes, arrays are read-only.

    Raises DataCorruptError for an opcode or a name outside the closed set, for truncated data and for anything that
    is not a dictionary in the end. The message does not name the file: the caller knows it.
    """
    try:
        value = _resolve(_Machine().run(data))
    except _RefusedError as error:
        raise DataCorruptError(f"holds {error}, which no official file has") from None
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise DataCorruptError(f"is truncated or damaged ({error})") from None
    if not isinstance(value, dict):
        raise DataCorruptError(f"holds a {type(value).__name__} instead of a dictionary")
    return value


class _Machine:
    """The stack machine of one file."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._operations: Final[dict[str, Callable[[Any], None]]] = {
            "PROTO": lambda _: None,
            "STOP": lambda _: None,
            "NONE": lambda _: self._stack.append(None),
            "NEWTRUE": lambda _: self._stack.append(True),
            "NEWFALSE": lambda _: self._stack.append(False),
            "BININT": self._stack.append,
            "BININT1": self._stack.append,
            "BININT2": self._stack.append,
            "BINSTRING": lambda text: self._stack.append(text.encode("latin-1")),
            "SHORT_BINSTRING": lambda text: self._stack.append(text.encode("latin-1")),
            "EMPTY_DICT": lambda _: self._stack.append({}),
            "EMPTY_LIST": lambda _: self._stack.append([]),
            "MARK": lambda _: self._stack.append(_MARK),
            "BINPUT": self._put,
            "LONG_BINPUT": self._put,
            "BINGET": self._get,
            "LONG_BINGET": self._get,
            "TUPLE": lambda _: self._stack.append(tuple(self._pop_to_mark())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "APPEND": lambda _: self._extend([self._stack.pop()]),
            "APPENDS": lambda _: self._extend(self._pop_to_mark()),
            "SETITEM": lambda _: self._set_items(self._pop(2)),
            "SETITEMS": lambda _: self._set_items(self._pop_to_mark()),
            "GLOBAL": self._name,
            "REDUCE": lambda _: self._reduce(*self._pop(2)),
            "BUILD": lambda _: self._build(self._stack.pop()),
        }

    def run(self, data: bytes) -> Any:
        for opcode, argument, _position in pickletools.genops(data):
            operation = self._operations.get(opcode.name)
            if operation is None:
                raise _RefusedError(f"the opcode {opcode.name}")
            operation(argument)
        return self._stack.pop()

    def _pop(self, count: int) -> list[Any]:
        return [self._stack.pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _put(self, slot: int) -> None:
        self._memo[slot] = self._stack[-1]

    def _get(self, slot: int) -> None:
        self._stack.append(self._memo[slot])

    def _tuple(self, count: int) -> None:
        self._stack.append(tuple(self._pop(count)))

    def _extend(self, items: list[Any]) -> None:
        self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        self._stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _name(self, text: str) -> None:
        if text not in _KNOWN_NAMES:
            raise _RefusedError(f"the name {text!r}")
        self._stack.append(_Name(text))

    def _reduce(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, _Name):
            raise _RefusedError("a call of something that is no name")
        if function.text in _RECONSTRUCT:
            self._stack.append(_Array())
        elif function.text == "numpy dtype" and arguments[0] in (b"u1", "u1"):
            self._stack.append(_UnsignedByte())
        else:
            raise _RefusedError(f"a call of {function.text!r}")

    def _build(self, state: Any) -> None:
        if isinstance(self._stack[-1], _Array):
            self._stack[-1].build(state)
        elif not isinstance(self._stack[-1], _UnsignedByte):
            raise _RefusedError("state for something that is no array")


def _resolve(value: Any) -> Any:
    """``value`` with the machine's arrays replaced by numpy's (the files hold them at the top level only)."""
    if isinstance(value, dict):
        return {key: item.content if isinstance(item, _Array) else item for key, item in value.items()}
    return value
