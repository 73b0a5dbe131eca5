"""Readers and writers of the on-disk formats IDX and npz.

Every byte read here is untrusted. A file loads whole and valid, or a `DataError` names it and says what to do; nothing
in it is executed, and no more memory is taken than its size on disk can justify.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

    Returns:
        Array of shape `(n, *item_shape)`, n ≥ 1, read-only.

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
    """Read named numeric arrays of an npz archive (of text those in `text`), without pickle or trust in its headers."""
    with parsing(path, OWN_REMEDY), zipfile.ZipFile(path) as archive:
        held = {name.removesuffix(".npy") for name in archive.namelist()}
        absent = sorted(set(required) - held)
        if absent:
            raise DataError(f"{path} lacks {', '.join(absent)} (it holds {', '.join(sorted(held)) or 'nothing'})")
        wanted = [key for key in (*required, *optional) if key in held]
        return {key: _read_npy(path, archive, key, text=key in text) for key in wanted}
