"""Arrays of known names, as files of triggers hold them. Needs no torch, and runs apart."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import h5py
import numpy.typing as npt

from backdoorscan.formats.images.hdf5 import is_hdf5, read_dataset, safe_datasets
from backdoorscan.formats.images.npz import is_zip, read_member
from backdoorscan.formats.images.reading import parsing


def read_named(content: bytes, source: str, names: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
    """Those arrays of an HDF5 file or a NumPy archive that have one of some names; none of any other file.

    Args:
        content: The file.
        source: How to name it in errors.
        names: The names.

    Raises:
        ImagesError: The file is damaged or too large, or refers to others.
    """
    with parsing(source, "a file of triggers"):
        if is_zip(content):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
                return {name: read_member(archive, members[name], source) for name in names if name in members}
        if is_hdf5(content):
            with h5py.File(io.BytesIO(content), "r") as file:
                datasets = safe_datasets(file, source)
                return {name: read_dataset(datasets[name], source) for name in names if name in datasets}
    return {}
