"""CIFAR-10 batches, which are pickles: read as data, so that nothing in them is executed."""

from __future__ import annotations

import math
import pickle
import pickletools
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lipdp.data.files import REMEDY, parsing
from lipdp.errors import DataError
from lipdp.files import written_whole


@dataclass(repr=False, eq=False)  # what it holds may be too deep to print or to compare
class _Call:
    """A name in a pickle, what it was to be called with, and the state that was to be set on what came out."""

    name: str
    arguments: Any = ()
    state: Any = ()


class _Pairs(list[Any]):
    """A dictionary, whose keys nobody hashes."""

    def __init__(self, items: Sequence[Any]) -> None:
        super().__init__(zip(items[::2], items[1::2], strict=True))


_ARRAYS = [f"numpy.{core}.multiarray _reconstruct" for core in ("core", "_core")]
_BUFFERS = [f"numpy.{core}.numeric _frombuffer" for core in ("core", "_core")]
_NAMES = ["numpy ndarray", "numpy dtype", "_codecs encode", *_ARRAYS, *_BUFFERS]
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONTENT = (
    "INT LONG LONG1 BININT BININT1 BININT2 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE"
    " SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BYTEARRAY8"
)
_LITERALS = _CONTENT.split()
_ITEMS = {  # that an opcode takes from the stack; None: all above the last mark
    "EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None, "EMPTY_LIST": 0, "LIST": None,
    "EMPTY_DICT": 0, "DICT": None, "APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None,
}  # fmt: skip


def _unpickled(content: bytes) -> Any:
    """What a pickle describes, read as data: nothing that it names is looked up, called, hashed or changed."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def take(count: int | None) -> list[Any]:
        start = marks.pop() if count is None else len(stack) - count
        if start < 0:
            raise DataError("the pickle takes more than it holds; do not trust the file")
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in _CONSTANTS or name in _LITERALS:
            stack.append(_CONSTANTS.get(name, argument))
        elif name in _ITEMS:
            items = take(_ITEMS[name])
            made = tuple(items) if "TUPLE" in name else items if "LIST" in name or "APPEND" in name else _Pairs(items)
            if name.startswith(("APPEND", "SETITEM")):
                stack[-1].extend(made)
            else:
                stack.append(made)
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_named(argument.split(" ") if argument else take(2)))
        elif name == "REDUCE":
            function, arguments = take(2)
            stack.append(_Call(function.name, arguments))
        elif name == "BUILD":
            (state,) = take(1)
            stack[-1].state = state
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise DataError(f"the pickle has the opcode {name}, which no CIFAR batch has; do not trust the file")
    return stack.pop()


def _named(words: list[Any]) -> _Call:
    name = " ".join(words)
    if name not in _NAMES:
        raise DataError(
            f"the pickle refers to {name.replace(' ', '.')}, which no CIFAR batch does; do not trust the file"
        )
    return _Call(name)


def _bytes(value: object) -> bytes | None:
    """Bytes, and what stands for them: text of Python 2, and the call by which old protocols make them of text."""
    if isinstance(value, _Call) and value.name == "_codecs encode":
        value = value.arguments[0]
    if isinstance(value, str):
        return value.encode("latin-1")
    return bytes(value) if isinstance(value, bytes | bytearray) else None


def _array(path: Path, call: _Call) -> npt.NDArray[np.uint8]:
    """The two-dimensional array of unsigned bytes that a call would make."""
    if call.name in _BUFFERS:
        body, dtype, shape, order, *_ = call.arguments
    else:
        _, shape, dtype, fortran, body = call.state
        order = "F" if fortran else "C"
    if not (
        isinstance(dtype, _Call)
        and dtype.name == "numpy dtype"
        and _bytes(dtype.arguments[0]) in (b"u1", b"|u1", b"uint8")
    ):
        raise DataError(f"{path}: the images are not unsigned bytes; {REMEDY}")
    if not (isinstance(shape, tuple) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise DataError(f"{path}: the images have shape {reprlib.repr(shape)}, not (n, 3072); {REMEDY}")
    content = _bytes(body)
    if content is None or len(content) != math.prod(shape):
        raise DataError(f"{path}: the images do not fill their shape {shape}; {REMEDY}")
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if order == "F" else "C")


def read_cifar_batch(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read one CIFAR-10 batch: the original Python 2 pickles, and those written today with numpy ≥ 2.

    The pickle runs no code: it is read as a description, in which only the names that such a file needs may stand.

    Returns:
        Images `(n, 3, 32, 32)` as bytes and labels `(n,)` in 0..9, n ≥ 1.

    Source: the format is described at https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    with parsing(path):
        content = path.read_bytes()
        try:
            batch = _unpickled(content)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        if not isinstance(batch, _Pairs):
            raise DataError(f"{path} holds a {type(batch).__name__}, not a CIFAR batch; {REMEDY}")
        fields = {_bytes(key): value for key, value in batch}
        data, labels = fields.get(b"data"), fields.get(b"labels")
        if not (isinstance(data, _Call) and data.name in _ARRAYS + _BUFFERS and type(labels) is list):
            raise DataError(f"{path} lacks the array `data` or the list `labels`; {REMEDY}")
        images = _array(path, data)
    if images.shape[1] != 3072:
        raise DataError(f"{path}: the images have shape {images.shape}, not (n, 3072); {REMEDY}")
    if len(labels) != len(images):
        raise DataError(f"{path} has {len(images)} images but {len(labels)} labels; {REMEDY}")
    if not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise DataError(f"{path} has labels that are not integers in 0..9; {REMEDY}")
    return images.reshape(-1, 3, 32, 32), np.asarray(labels, np.int64)


def write_cifar_batch(path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
    """Write images `(n, 3, 32, 32)` and labels `(n,)` as one CIFAR-10 batch, whole or not at all."""
    batch = {b"data": np.ascontiguousarray(images, np.uint8).reshape(-1, 3072), b"labels": labels.tolist()}
    with written_whole(path) as stream:
        pickle.dump(batch, stream, protocol=4)
