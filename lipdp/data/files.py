"""Readers and writers of the on-disk formats: IDX, CIFAR pickles, npz.

Every byte read here is untrusted. A file loads whole and valid, or a `DataError` names it and says what to do; nothing
in it is executed, and no more memory is taken than its size on disk can justify.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import GzipFile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lipdp.errors import DataError
from lipdp.files import written_whole

MAX_EXPANSION = 1032
"""Deflate cannot expand by more (RFC 1951: 258 bytes from 2 bits), so a file that declares more is lying."""

MAX_BYTES = 16 * 2**30
"""No single array is larger; the real files of this module are below 1 GiB."""

REMEDY = "the file is corrupt or of another kind: delete it and fetch it again"
OWN_REMEDY = "the file is corrupt or of another kind: write it again, with numpy.savez"


@contextmanager
def parsing(path: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turn whatever a parser raises on `path` into a `DataError` that names the file and the remedy."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except PermissionError as error:
        raise DataError(f"{path} may not be read: {error.strerror}; change its permissions") from error
    except Exception as error:  # zip, gzip, pickle and npy parsers document no closed list of what they raise
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}); {remedy}") from error


def _check_size(path: Path, declared: int, on_disk: int, remedy: str = REMEDY) -> None:
    """Refuse a header that asks for more memory than `on_disk` compressed bytes can fill."""
    if declared > min(MAX_BYTES, MAX_EXPANSION * on_disk):
        raise DataError(f"{path} declares {declared} bytes of data but holds {on_disk} bytes; {remedy}")


# ------------------------------------------------------------------------------------------------------------- IDX


def read_idx(path: Path, item_shape: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, plain or gzipped (told by its content, not by its name).

    Args:
        path: the file, e.g. `train-images-idx3-ubyte.gz`.
        item_shape: the shape every item must have: `(28, 28)` for MNIST images, `()` for labels.

    Returns:
        Array of shape `(n, *item_shape)`, n ≥ 1, read-only.

    Raises:
        DataError: missing, empty, truncated or over-long file, failed checksum, wrong magic number or shape.

    Source: the format is described at the end of http://yann.lecun.com/exdb/mnist/.
    """
    item_shape = tuple(item_shape)
    axes = 1 + len(item_shape)
    with parsing(path):
        on_disk = path.stat().st_size
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with GzipFile(fileobj=raw) if zipped else raw as stream:
                header = stream.read(4 + 4 * axes)
                if len(header) < 4 + 4 * axes:
                    raise DataError(f"{path} ends inside its header ({len(header)} bytes); {REMEDY}")
                magic, *shape = struct.unpack(f">{1 + axes}I", header)
                if magic != 0x800 + axes:
                    raise DataError(f"{path} starts with {magic:#x}, not with {0x800 + axes:#x}; {REMEDY}")
                if tuple(shape[1:]) != item_shape or shape[0] == 0:
                    raise DataError(f"{path} declares shape {tuple(shape)}, not (n ≥ 1, {item_shape}); {REMEDY}")
                declared = math.prod(shape)
                _check_size(path, declared, on_disk)
                body = stream.read(declared + 1)  # the extra byte finds a tail, and the end checks gzip's CRC
    if len(body) != declared:
        found = f"only {len(body)}" if len(body) < declared else "more"
        raise DataError(f"{path} declares {declared} bytes of data and holds {found}; {REMEDY}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def write_idx(path: Path, array: npt.NDArray[np.uint8]) -> None:
    """Write `array` of unsigned bytes as an IDX file, whole or not at all."""
    with written_whole(path) as stream:
        stream.write(struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape))
        stream.write(np.ascontiguousarray(array, np.uint8).tobytes())


# ------------------------------------------------------------------------------------------------ CIFAR-10 batches


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

    Raises:
        DataError: missing, truncated or corrupt file, another name in the pickle, wrong shapes, labels outside 0..9,
            or as many labels as images not.

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


# ------------------------------------------------------------------------------------------------------------- npz


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _read_npy(path: Path, archive: zipfile.ZipFile, key: str, *, text: bool = False) -> npt.NDArray[Any]:
    """Read one numeric member of an npz archive (or one of text), checking its declared size before reading it."""
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{path}: {key} is not stored or deflated; write the file with numpy.savez or savez_compressed")
    _check_size(path, info.file_size, info.compress_size, OWN_REMEDY)
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise DataError(f"{path}: {key} has npy version {version}, not 1.0 or 2.0; {OWN_REMEDY}")
        shape, fortran, dtype = _HEADERS[version](stream)
        if not (text and dtype.kind in "US") and (dtype.kind not in "biuf" or dtype.itemsize > 8):
            raise DataError(f"{path}: {key} has dtype {dtype}; write integers or floats of at most 64 bits")
        declared = dtype.itemsize * math.prod(shape)
        body = stream.read()  # to the end, which checks the archive's CRC; bounded by info.file_size
    if len(body) != declared:
        raise DataError(f"{path}: {key} declares {declared} bytes and holds {len(body)}; {OWN_REMEDY}")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")


def axes_of(path: Path, key: str | None = None) -> int | None:
    """How many axes the array of an npy file has, or an array of an npz archive, by its header alone; None where that
    cannot be told."""
    try:
        with zipfile.ZipFile(path).open(f"{key}.npy") if key else path.open("rb") as stream:
            return len(_HEADERS[np.lib.format.read_magic(stream)](stream)[0])
    except Exception:  # of any file; reading it in full says what is wrong
        return None


def read_npz(
    path: Path, required: Sequence[str], optional: Sequence[str] = (), *, text: Sequence[str] = ()
) -> dict[str, npt.NDArray[Any]]:
    """Read named numeric arrays of an npz archive (of text those in `text`), without pickle or trust in its headers.

    Raises:
        DataError: missing or corrupt file, failed checksum, a required key absent, a dtype that is not a number.
    """
    with parsing(path, OWN_REMEDY), zipfile.ZipFile(path) as archive:
        held = {name.removesuffix(".npy") for name in archive.namelist()}
        absent = sorted(set(required) - held)
        if absent:
            raise DataError(f"{path} lacks {', '.join(absent)} (it holds {', '.join(sorted(held)) or 'nothing'})")
        wanted = [key for key in (*required, *optional) if key in held]
        return {key: _read_npy(path, archive, key, text=key in text) for key in wanted}
