"""HDF5 files of images, read as data: nothing in them can make the reader open another file."""

from __future__ import annotations

import io
import math
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from backdoorscan.errors import ArtifactError, ImagesError
from backdoorscan.formats.images.pairs import Entry, choose_pair
from backdoorscan.formats.images.reading import check_size, parsing
from backdoorscan.formats.sandbox import run_apart

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_OFFSETS = (0, 512, 1024, 2048)  # the format allows a user block before the signature; MATLAB writes one
_MAX_ENTRIES = 2_000

_FILTERS = frozenset({1, 2, 3, 32000})
"""deflate, shuffle, fletcher32 and lzf: built into h5py. Others may load a shared library by name."""


def is_hdf5(content: bytes) -> bool:
    """Whether the bytes are an HDF5 file."""
    return any(content.startswith(_SIGNATURE, offset) for offset in _OFFSETS)


def read_hdf5(content: bytes, source: str, split: str | None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Images and labels as stored, read in the sandbox.

    Args:
        content: The file.
        source: How to name it in errors.
        split: The set to read, None for the only one.

    Raises:
        ImagesError: Damaged or too large; a link, an external or a virtual dataset; no such pair of arrays.
    """
    try:
        return run_apart(read_stored, content, source, split, name=source)
    except ArtifactError as error:
        raise ImagesError(error.what, why=error.why, hint="Save the images again, as .npz.") from error


def read_stored(content: bytes, source: str, split: str | None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """What ``read_hdf5`` returns, read in this process."""
    with parsing(source, "an HDF5 file"), h5py.File(io.BytesIO(content), "r") as file:
        if "model_config" in file.attrs or "layer_names" in file.attrs:
            raise ImagesError(f"{source} is a Keras model.", hint="Pass the file of the clean images here.")
        datasets = safe_datasets(file, source)
        entries = [Entry(name, dataset.shape or (), dataset.dtype) for name, dataset in datasets.items()]
        pair = choose_pair(entries, split, source)
        return read_dataset(datasets[pair.images.name], source), read_dataset(datasets[pair.labels.name], source)


def safe_datasets(file: h5py.File, source: str) -> dict[str, h5py.Dataset]:
    """All datasets by path, found without following any link."""
    datasets = {}
    groups = [("", file)]
    visited = 0
    for prefix, group in groups:  # grows as it goes
        for name in group:
            path = prefix + name
            visited += 1
            if visited > _MAX_ENTRIES:  # also ends the walk through a group that contains itself
                raise ImagesError(f"{source} is refused.", why=f"It holds more than {_MAX_ENTRIES:,} entries.")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ImagesError(
                    f"{source} is refused.",
                    why=f"'{path}' is a link, which may lead to another file.",
                    hint="Save the images in one file without links.",
                )
            item = group[name]
            if isinstance(item, h5py.Group):
                groups.append((f"{path}/", item))
            elif isinstance(item, h5py.Dataset):
                if item.is_virtual or item.external:
                    raise ImagesError(
                        f"{source} is refused.",
                        why=f"The values of '{path}' lie in other files.",
                        hint="Save the images themselves in one file.",
                    )
                datasets[path] = item
    return datasets


def read_dataset(dataset: h5py.Dataset, source: str) -> npt.NDArray[Any]:
    """The values of one of ``safe_datasets``.

    Raises:
        ImagesError: It is too large, was never filled, or needs a filter that is not built in.
    """
    plist = dataset.id.get_create_plist()
    filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
    if unknown := sorted(filters - _FILTERS):
        raise ImagesError(
            f"{source}: '{dataset.name}' is compressed in a way that is not supported.",
            why=f"It needs the HDF5 filters {unknown}.",
            hint="Save it with gzip or without compression.",
        )
    check_size(dataset.size * dataset.dtype.itemsize if dataset.size else 0, source, f"'{dataset.name}'")
    if dataset.chunks:  # the library allocates whole chunks, however small the dataset is
        check_size(math.prod(dataset.chunks) * dataset.dtype.itemsize, source, f"A chunk of '{dataset.name}'")
    if dataset.size and not dataset.id.get_storage_size():
        raise ImagesError(
            f"{source}: '{dataset.name}' was never filled.",
            why=f"It declares shape {dataset.shape} and stores nothing.",
        )
    return np.asarray(dataset[()])
