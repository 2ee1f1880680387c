"""Opens an HDF5 file as data: no links, no other files, no unknown filters, no bombs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5l, h5o, h5z
from numpy.typing import NDArray

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_OBJECTS = 100_000
_MAX_ATTRIBUTE_ITEMS = 100_000
# A file may declare far more than it stores: compressed zeros, or chunks that were never written. Trained
# weights hardly compress, so these bounds leave honest files alone.
_MAX_EXPANSION = 32
_FREE_EXPANSION = 64 * 2**20
_MAX_TOTAL = 4 * 2**30
_FILTERS = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32, h5z.FILTER_LZF}
_HINT_UNTRUSTED = "Do not use this file; ask its publisher for a plain copy."


def is_hdf5(data: bytes) -> bool:
    """Whether ``data`` has the HDF5 signature at one of the offsets where the format allows it."""
    offset = 0
    while offset < len(data):
        if data.startswith(_SIGNATURE, offset):
            return True
        offset = max(512, 2 * offset)
    return False


@contextmanager
def opened(data: bytes, name: str) -> Iterator[h5py.File]:
    """Open ``data`` for reading after a look at its whole structure.

    Args:
        data: The file's bytes.
        name: What to call the file in errors.

    Raises:
        UnsafeModelError: The file refers to other files or hides what it holds.
        ArtifactError: The file is broken.
    """
    if not is_hdf5(data):
        raise ArtifactError(f"{name} is not an HDF5 file.", hint="Give a Keras .h5 file, or check the download.")
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            _check_structure(file, name)
            yield file
    # Whatever h5py meets in a broken file surfaces as one of these.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise ArtifactError(
            f"{name} is a broken HDF5 file.",
            why=" ".join(str(error).split()),
            hint="Download or copy the file again; it may be cut off.",
        ) from error


def _check_structure(file: h5py.File, name: str) -> None:
    """Visit every object once, following no link that leaves the tree."""
    root = file["/"].id
    seen = {h5o.get_info(root).addr}
    stack: list[tuple[Any, str]] = [(root, "")]
    while stack:
        group, path = stack.pop()
        for raw in group:
            child = f"{path}/{raw.decode('utf-8', 'replace')}"
            if group.links.get_info(raw).type != h5l.TYPE_HARD:
                raise UnsafeModelError(
                    f"{name} was refused: its entry {child} is a link.",
                    why="Links can make a reader open other files; Keras never writes them.",
                    hint=_HINT_UNTRUSTED,
                )
            info = h5o.get_info(group, raw)
            if info.addr in seen:
                continue
            seen.add(info.addr)
            if len(seen) > _MAX_OBJECTS:
                raise UnsafeModelError(
                    f"{name} was refused: it holds more than {_MAX_OBJECTS} objects.", hint=_HINT_UNTRUSTED
                )
            if info.type == h5o.TYPE_GROUP:
                stack.append((h5o.open(group, raw), child))
            elif info.type == h5o.TYPE_DATASET:
                _check_dataset(h5o.open(group, raw), child, name)


def _check_dataset(dataset: Any, path: str, name: str) -> None:
    plan = dataset.get_create_plist()
    elsewhere = ""
    if plan.get_layout() == h5d.VIRTUAL:
        elsewhere = "virtual"
    elif plan.get_external_count():
        elsewhere = "external"
    if elsewhere:
        raise UnsafeModelError(
            f"{name} was refused: its dataset {path} is {elsewhere}.",
            why="Such datasets take their values from other files; Keras never writes them.",
            hint=_HINT_UNTRUSTED,
        )
    filters = {plan.get_filter(index)[0] for index in range(plan.get_nfilters())}
    if unknown := filters - _FILTERS:
        raise UnsafeModelError(
            f"{name} was refused: its dataset {path} uses the HDF5 filters {sorted(unknown)}.",
            why="HDF5 would load code for them; only gzip, shuffle, fletcher32 and lzf are allowed.",
            hint="Save the model again with plain datasets.",
        )


class Budget:
    """How many bytes the datasets of one file may declare together.

    Args:
        file_size: Size of the file in bytes.
        name: What to call the file in errors.
    """

    def __init__(self, file_size: int, name: str) -> None:
        self._file_size = file_size
        self._left = min(_MAX_TOTAL, max(_FREE_EXPANSION, _MAX_EXPANSION * file_size))
        self._name = name

    def read(self, dataset: h5py.Dataset) -> NDArray[Any]:
        """Read a numeric dataset, or refuse before anything is allocated.

        Raises:
            UnsafeModelError: It declares more than the file can hold, or holds anything but numbers.
        """
        where = f"dataset {dataset.name} of {self._name}"
        if dataset.dtype.kind not in "fiub":
            if dataset.dtype.kind == "V":
                raise UnsupportedModelError(
                    f"The {where} has the number format {dataset.dtype}.",
                    hint="Save the model with float32 weights.",
                )
            raise UnsafeModelError(
                f"The {where} holds {dataset.dtype} where numbers belong.",
                why="Weights are numbers; objects and texts are not.",
                hint=_HINT_UNTRUSTED,
            )
        if dataset.shape is None:
            raise ArtifactError(f"The {where} is empty.", hint="Download or copy the file again.")
        declared = int(dataset.dtype.itemsize)
        for size in dataset.shape:
            declared *= int(size)
        self._left -= declared
        stored = int(dataset.id.get_storage_size())
        contiguous = dataset.chunks is None
        if self._left < 0 or stored > self._file_size or (contiguous and stored < declared):
            raise UnsafeModelError(
                f"The {where} declares {declared:,} bytes, but {stored:,} are stored in a file of "
                f"{self._file_size:,} bytes.",
                why="Reading it would fill the memory with values that are not in the file.",
                hint=_HINT_UNTRUSTED,
            )
        return np.asarray(dataset[()])


def text_attribute(item: h5py.Group, key: str) -> str | None:
    """A text attribute, joined where Keras split it into ``key0``, ``key1``, … over 64 kB; ``None`` if absent."""
    if key in item.attrs:
        values = _texts(item, key)
    else:
        values = [text for part in _parts(item, key) for text in _texts(item, part)]
    return "".join(values) if values else None


def names_attribute(item: h5py.Group, key: str) -> list[str] | None:
    """An attribute that lists names, joined where Keras split it; ``None`` if absent."""
    if key in item.attrs:
        return _texts(item, key)
    parts = _parts(item, key)
    return [text for part in parts for text in _texts(item, part)] if parts else None


def _parts(item: h5py.Group, key: str) -> list[str]:
    parts: list[str] = []
    while f"{key}{len(parts)}" in item.attrs:
        parts.append(f"{key}{len(parts)}")
    return parts


def _texts(item: h5py.Group, key: str) -> list[str]:
    """The values of an attribute as text, checked to be text and few."""
    space = item.attrs.get_id(key).get_space()
    if space.get_simple_extent_npoints() > _MAX_ATTRIBUTE_ITEMS:
        raise UnsafeModelError(f"The attribute {key} of {item.name} is too long.", hint=_HINT_UNTRUSTED)
    texts: list[str] = []
    for value in np.asarray(item.attrs[key], dtype=object).ravel().tolist():
        if isinstance(value, bytes):
            texts.append(value.decode("utf-8"))
        elif isinstance(value, str):
            texts.append(value)
        else:
            raise ArtifactError(
                f"The attribute {key} of {item.name} is not text.", hint="Save the model again with Keras."
            )
    return texts
