"""Features kept on disk: computed batch by batch once, whole or resumed, read only where a checksum agrees."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lipdp.batches.records import finite
from lipdp.errors import DataError
from lipdp.files import written_whole

if TYPE_CHECKING:
    from lipdp.features.maps import FeatureSpec

_FORMAT = 2  # of the cache; raise it when the same spec would give other numbers
_BATCH = 512


def kept(x: Tensor, spec: FeatureSpec, folder: Path, report: Callable[[int], None]) -> Tensor:
    """The features of `x`, read from `folder` if a complete file is there, else computed and left there.

    Each batch is left there as it is computed, and all of them are removed once the whole is there. So an interrupted
    computation goes on where it was, and processes that compute the same share the work.
    """
    name, numbers = spec.key
    key = {"format": _FORMAT, **numbers, "input": [str(x.dtype), *x.shape]}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
    digest.update(_raw(x))
    path = folder / f"{name}-{digest.hexdigest()[:32]}.npy"
    record = path.with_suffix(".json")
    try:
        if not _is_intact(path, record):
            checksum = _write(path, x, spec, report)
            with written_whole(record) as stream:
                stream.write(json.dumps({**key, "sha256": checksum}, indent=1).encode())
            for part in _parts(path, len(x)):
                part.unlink(missing_ok=True)
        stored = np.load(path, mmap_mode="c", allow_pickle=False)
    except OSError as error:
        raise DataError(
            f"the features cannot be kept in {folder} ({error}); free some space there, or set LIPDP_CACHE"
            " (cache_dir=...)"
        ) from error
    report(len(x))
    return torch.from_numpy(stored)


def _is_intact(path: Path, record: Path) -> bool:
    """Whether the file is the one whose checksum was recorded when it was written."""
    try:
        recorded: Any = json.loads(record.read_bytes())
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(recorded, Mapping) and recorded.get("sha256") == digest.hexdigest()


@torch.no_grad()
def _write(path: Path, x: Tensor, spec: FeatureSpec, report: Callable[[int], None]) -> str:
    """Compute the features batch by batch into an npy file, whole or not at all; return its checksum."""
    digest, shape = hashlib.sha256(), (len(x), *spec.output_shape(x.shape[1:]))
    with written_whole(path) as stream:

        def put(content: bytes | memoryview) -> None:
            digest.update(content)
            stream.write(content)

        put(_npy_header(spec.dtype, shape))
        for start, part in zip(range(0, len(x), _BATCH), _parts(path, len(x)), strict=True):
            batch = x[start : start + _BATCH]
            size = len(batch) * shape[1] * np.dtype(spec.dtype).itemsize
            put(_read_part(part, size) or _computed(part, batch, spec, keep=len(x) > _BATCH))
            report(start + len(batch))
    return digest.hexdigest()


def _parts(path: Path, records: int) -> Iterator[Path]:
    """The file of each batch while the whole is not there yet."""
    return (path.with_suffix(f".part{number}") for number in range(-(-records // _BATCH)))


def _read_part(part: Path, size: int) -> bytes | None:
    """The features of a batch that an interrupted computation left, if they are whole."""
    try:
        content = part.read_bytes()
    except FileNotFoundError:
        return None
    checksum, features = content[:32], content[32:]
    return features if len(features) == size and hashlib.sha256(features).digest() == checksum else None


def _computed(part: Path, x: Tensor, spec: FeatureSpec, *, keep: bool) -> bytes:
    features = bytes(_raw(finite(spec(finite(x)))))
    if keep:
        with written_whole(part) as stream:
            stream.write(hashlib.sha256(features).digest() + features)
    return features


def _raw(x: Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    array: Any = x.detach().cpu().contiguous().numpy()
    return memoryview(array).cast("B")


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(header, {"descr": description, "fortran_order": False, "shape": shape})
    return header.getvalue()
