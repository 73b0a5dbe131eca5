"""Files of data sets: names, an old pickle written by hand, and arrays in an archive."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)

PYTHON2_BATCH = (
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87R"
    b"q\x05(K\x01K\x04M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff"
    b"\xff\xff\xffK\x00tb\x89T\x00\x30\x00\x00" + IMAGES.tobytes() + b"tbU\x06labelsq\x08]q\x09(K\x03K\x01K\x04K\x09e"
    b"U\x0bbatch_labelq\x0aU\x15training batch 1 of 5q\x0bu."
)
"""What cPickle of Python 2 wrote for the original files, written out by hand: old module names, byte strings."""


def pickled(protocol: int, core: str | None = None, **fields) -> bytes:
    batch = {b"data": IMAGES, b"labels": [3, 1, 4, 9], **{k.encode(): v for k, v in fields.items()}}
    content = pickle.dumps(batch, protocol)
    return content.replace(b"numpy._core", b"numpy.core") if core == "numpy.core" and protocol < 4 else content


def save(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)
