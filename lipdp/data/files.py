"""Readers and writers of the on-disk formats: IDX, CIFAR pickles, npz.

Every byte read here is untrusted. A file loads whole and valid, or a `DataError` names it and says what to do; nothing
in it is executed, and no more memory is taken than its size on disk can justify.
"""

from __future__ import annotations

import io
import math
import pickle
import reprlib
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import GzipFile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lipdp.errors import DataError
from lipdp.files import written_whole

MAX_EXPANSION = 1032
"""Deflate cannot expand by more (RFC 1951: 258 bytes from 2 bits), so a file that declares more is lying."""

MAX_BYTES = 16 * 2**30
"""No single array is larger; the real files of this module are below 1 GiB."""

REMEDY = "the file is corrupt or of another kind: delete it and fetch it again"


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


def _check_size(path: Path, declared: int, on_disk: int) -> None:
    """Refuse a header that asks for more memory than `on_disk` compressed bytes can fill."""
    if declared > min(MAX_BYTES, MAX_EXPANSION * on_disk):
        raise DataError(f"{path} declares {declared} bytes of data but holds {on_disk} bytes; {REMEDY}")


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


@dataclass
class _PickledDtype:
    """Stands for `numpy.dtype` while unpickling: keeps the type's name and drops the state that follows."""

    name: str

    def __setstate__(self, state: object) -> None:
        pass


class _PickledArray:
    """Stands for `numpy.ndarray` while unpickling, so that numpy's C code never meets untrusted state."""

    shape: object = None
    dtype: object = None
    fortran: object = None
    body: object = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.fortran, self.body = state

    def bytes_array(self, path: Path) -> npt.NDArray[np.uint8]:
        """The array itself, if it is two-dimensional, of unsigned bytes and consistent."""
        shape, dtype, body = self.shape, self.dtype, self.body
        if not (isinstance(dtype, _PickledDtype) and dtype.name in ("u1", "|u1", "uint8")):
            raise DataError(f"{path}: the images are not unsigned bytes; {REMEDY}")
        if not (isinstance(shape, tuple) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
            raise DataError(f"{path}: the images have shape {reprlib.repr(shape)}, not (n, 3072); {REMEDY}")
        if not isinstance(body, bytes | bytearray) or len(body) != math.prod(shape):
            raise DataError(f"{path}: the images do not fill their shape {shape}; {REMEDY}")
        return np.frombuffer(body, np.uint8).reshape(shape, order="F" if self.fortran else "C")


def _text(value: object) -> str:
    if not isinstance(value, str | bytes):
        raise DataError(f"a name in the pickle is a {type(value).__name__}; do not trust the file")
    return value.decode("ascii") if isinstance(value, bytes) else value


def _dtype(name: object, *_: object) -> _PickledDtype:
    return _PickledDtype(_text(name))


def _array(*_: object) -> _PickledArray:
    return _PickledArray()


def _array_from_buffer(body: object, dtype: object, shape: object, order: object, *_: object) -> _PickledArray:
    array = _PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", body))
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise DataError(f"encoding {encoding!r} in a pickle of bytes")
    return text.encode("latin-1")


_GLOBALS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    **{(f"{core}.multiarray", "_reconstruct"): _array for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.numeric", "_frombuffer"): _array_from_buffer for core in ("numpy.core", "numpy._core")},
}


_OPCODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT LONG LONG1 BININT BININT1 BININT2 FLOAT BINFLOAT"
    " STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BYTEARRAY8"
    " EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS"
    " GLOBAL STACK_GLOBAL REDUCE BUILD GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE"
)


class _CifarUnpickler(pickle._Unpickler):
    """Unpickles containers, text, bytes, numbers and byte arrays, through stand-ins; any other name or opcode is refused.

    Keys are text, bytes or numbers: to hash a tuple that holds itself twice, forty levels deep, takes longer than anyone
    waits. State is set on the stand-ins' instances only: not on the functions, whose defaults it would replace.

    The pure-Python unpickler is used on purpose: the C one sizes its memo by an index read from the file.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise DataError(f"the pickle refers to {module}.{name}, which no CIFAR batch does; do not trust the file")
        return _GLOBALS[module, name]

    def _set_items(self, pairs: Sequence[Any], into: dict[Any, Any]) -> None:
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | bytes | int):
                raise DataError(f"a key in the pickle is a {type(key).__name__}; do not trust the file")
            into[key] = value

    def _setitem(self) -> None:
        pair = self.stack[-2:]
        del self.stack[-2:]
        self._set_items(pair, self.stack[-1])

    def _setitems(self) -> None:
        pairs = self.pop_mark()
        self._set_items(pairs, self.stack[-1])

    def _dict(self) -> None:
        pairs = self.pop_mark()
        self.stack.append({})
        self._set_items(pairs, self.stack[-1])

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _PickledArray | _PickledDtype):
            raise DataError(f"the pickle sets a state on a {type(self.stack[-1]).__name__}; do not trust the file")
        self.stack[-1].__setstate__(state)

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **{getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES.split()},
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.DICT[0]: _dict,
        pickle.BUILD[0]: _build,
    }


def read_cifar_batch(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read one CIFAR-10 batch: the original Python 2 pickles, and those written today with numpy ≥ 2.

    The pickle runs no code: only the five names such a file needs are known, and each is a harmless stand-in.

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
            batch = _CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        if not isinstance(batch, dict):
            raise DataError(f"{path} holds a {type(batch).__name__}, not a CIFAR batch; {REMEDY}")
        fields = {_text(key): value for key, value in batch.items() if isinstance(key, str | bytes)}
        data, labels = fields.get("data"), fields.get("labels")
        if not isinstance(data, _PickledArray) or not isinstance(labels, list):
            raise DataError(f"{path} lacks the array `data` or the list `labels`; {REMEDY}")
        images = data.bytes_array(path)
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


def _read_npy(path: Path, archive: zipfile.ZipFile, key: str, *, text: bool = False) -> npt.NDArray[Any]:
    """Read one numeric member of an npz archive (or one of text), checking its declared size before reading it."""
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{path}: {key} is not stored or deflated; write the file with numpy.savez or savez_compressed")
    _check_size(path, info.file_size, info.compress_size)
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise DataError(f"{path}: {key} has npy version {version}, not 1.0 or 2.0; {REMEDY}")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(stream)
        if not (text and dtype.kind in "US") and (dtype.kind not in "biuf" or dtype.itemsize > 8):
            raise DataError(f"{path}: {key} has dtype {dtype}; write integers or floats of at most 64 bits")
        declared = dtype.itemsize * math.prod(shape)
        body = stream.read()  # to the end, which checks the archive's CRC; bounded by info.file_size
    if len(body) != declared:
        raise DataError(f"{path}: {key} declares {declared} bytes and holds {len(body)}; {REMEDY}")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")


def read_npz(
    path: Path, required: Sequence[str], optional: Sequence[str] = (), *, text: Sequence[str] = ()
) -> dict[str, npt.NDArray[Any]]:
    """Read named numeric arrays of an npz archive (those in `text` may be of text), without pickle or trust in its headers.

    Raises:
        DataError: missing or corrupt file, failed checksum, a required key absent, a dtype that is not a number.
    """
    with parsing(path), zipfile.ZipFile(path) as archive:
        held = {name.removesuffix(".npy") for name in archive.namelist()}
        absent = sorted(set(required) - held)
        if absent:
            raise DataError(f"{path} lacks {', '.join(absent)} (it holds {', '.join(sorted(held)) or 'nothing'})")
        wanted = [key for key in (*required, *optional) if key in held]
        return {key: _read_npy(path, archive, key, text=key in text) for key in wanted}
