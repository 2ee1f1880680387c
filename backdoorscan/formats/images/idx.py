"""The idx files of MNIST and its relatives: images in one file, labels in another beside it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from backdoorscan.errors import ImagesError
from backdoorscan.formats.images.reading import check_size, gunzip, read_file

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_AXES = 4


def is_idx(content: bytes) -> bool:
    """Whether the (unpacked) bytes look like an idx file: two zeros, a known type, one to four axes."""
    return len(content) >= 4 and content[:2] == b"\0\0" and content[2] in _TYPES and 1 <= content[3] <= _MAX_AXES


def read_idx(content: bytes, path: Path, source: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Images, and labels from the file beside them.

    Args:
        content: The unpacked file of images.
        path: Its path; ``images-idx3`` in its name becomes ``labels-idx1``, with or without ``.gz``.
        source: How to name it in errors.

    Returns:
        Images of shape (N, H, W) or with another axis, labels of shape (N,).

    Raises:
        ImagesError: It holds labels, is damaged, or has no file of labels beside it.
    """
    images = _array(content, source)
    if images.ndim < 3:
        raise ImagesError(
            f"{source} does not hold images.",
            why=f"It is an idx file of shape {images.shape}, such as holds labels.",
            hint="Pass the file of images: the labels beside it are found by themselves.",
        )
    labels = _labels_beside(path, source)
    found = gunzip(read_file(labels, str(labels)), str(labels))
    if not is_idx(found):
        raise ImagesError(f"{labels} is not an idx file.", why=f"It should hold the labels of {path.name}.")
    return images, _array(found, str(labels))


def _labels_beside(path: Path, source: str) -> Path:
    stem = re.sub(r"idx\d", "idx1", path.name.removesuffix(".gz").replace("images", "labels"))
    candidates = [path.with_name(stem + suffix) for suffix in ("", ".gz")]
    for candidate in candidates:
        if candidate != path and candidate.exists():
            return candidate
    if "images" not in path.name:
        raise ImagesError(
            f"{source}: the file of its labels is unknown.",
            why="It is found through the word 'images' in the name, which this name lacks.",
            hint="Name the files as MNIST does: t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte.",
        )
    raise ImagesError(
        f"{source}: the file of its labels is missing.",
        why=f"Neither {candidates[0].name} nor {candidates[1].name} lies beside it.",
    )


def _array(content: bytes, source: str) -> npt.NDArray[Any]:
    dtype, axes = np.dtype(_TYPES[content[2]]), content[3]
    start = 4 + 4 * axes
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    needed = math.prod(shape) * dtype.itemsize
    check_size(needed, source, f"An array of shape {shape}")
    if len(content) != start + needed:
        raise ImagesError(
            f"{source} is damaged.",
            why=f"Shape {shape} needs {start + needed:,} bytes, there are {len(content):,}.",
            hint="The file may be truncated: fetch it again.",
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape)
