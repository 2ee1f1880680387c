"""Changes a copy of an HDF5 file, or of the one in a ``.keras`` archive. Needs no torch, and runs apart."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import h5py
from numpy.typing import NDArray

from backdoorscan.formats.keras.archive import CONFIG, WEIGHTS, is_archive, read_members, with_members

_TRAINING = ("optimizer_weights", "optimizer")


@dataclass(frozen=True)
class Edit:
    """What changes in a file.

    Attributes:
        values: New values of datasets, by their paths; they may have another shape.
        config: A new architecture. What only training needs goes with the old one.
    """

    values: Mapping[str, NDArray[Any]] = field(repr=False)
    config: bytes | None = None


def edited(data: bytes, edit: Edit, name: str) -> bytes:
    """A copy of a file with changes.

    Args:
        data: The original, which was checked when it was read.
        edit: The changes.
        name: What to call the file in errors.
    """
    if not is_archive(data):
        return _edited(data, edit, whole=True)
    contents = {WEIGHTS: _edited(read_members(data, name)[WEIGHTS], edit, whole=False)}
    return with_members(data, contents if edit.config is None else {**contents, CONFIG: edit.config})


def _edited(data: bytes, edit: Edit, *, whole: bool) -> bytes:
    """A copy of an HDF5 file, which is whole where it holds the architecture too."""
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "r+") as file:
        for path, values in edit.values.items():
            if file[path].shape == values.shape:
                file[path][...] = values
            else:
                del file[path]
                file.create_dataset(path, data=values)
        if edit.config is not None:
            _without_training(file)
            if whole:
                file.attrs["model_config"] = edit.config
    return buffer.getvalue()


def _without_training(file: h5py.File) -> None:
    for group in _TRAINING:
        if group in file:
            del file[group]
    for key in list(file.attrs):
        if re.fullmatch(r"model_config\d*|training_config\d*", key):
            del file.attrs[key]
