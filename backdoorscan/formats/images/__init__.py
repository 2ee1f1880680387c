"""Files of labelled images -> ``LabelledImages``. The format is told by content, never by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

from backdoorscan.errors import ImagesError
from backdoorscan.formats.images.arrays import to_labels, to_pixels
from backdoorscan.formats.images.folder import read_folder
from backdoorscan.formats.images.hdf5 import is_hdf5, read_hdf5
from backdoorscan.formats.images.idx import is_idx, read_idx
from backdoorscan.formats.images.npz import is_zip, read_npz
from backdoorscan.formats.images.picture import load_picture
from backdoorscan.formats.images.reading import accessing, gunzip, read_file
from backdoorscan.images import LabelledImages

__all__ = ["load_images", "load_picture"]

_KNOWN = "Images come as HDF5, .npz, idx (MNIST) or a folder of class folders of pictures."

_STRANGERS = {
    b"\x93NUMPY": ("It is a single NumPy array, without labels.", "Save both: np.savez(file, x=images, y=labels)."),
    b"\x89PNG": ("It is a single picture.", "Pass a folder of class folders of pictures."),
    b"\xff\xd8\xff": ("It is a single picture.", "Pass a folder of class folders of pictures."),
    b"\x80": ("It looks like a pickle, which can run code and is never opened.", _KNOWN),
}
"""First bytes of what users pass by mistake -> why and hint."""


def load_images(source: str | Path, *, limit: int | None = None, seed: int = 0) -> LabelledImages:
    """Read labelled images.

    - HDF5 with ``data`` and ``label``, ``x`` and ``y``, ``x_test`` and ``y_test``, ``images`` and ``labels`` ...
    - ``.npz`` with such names. Of several sets in one file choose one: ``file.npz#test``.
    - idx files as MNIST ships them: pass the images, the labels beside them are found.
    - A folder of class folders of pictures.

    HDF5, ``.npz`` and idx may be packed with gzip. Arrays are N×C×H×W, N×H×W×C or N×H×W (see
    ``arrays.to_pixels`` for how values and axes are told apart).

    Args:
        source: The file or folder, optionally with ``#`` and a split.
        limit: The most images to return, as evenly over the classes as they allow; None for all.
        seed: The sample's seed.

    Returns:
        The images; ``source`` is what was passed, the digest is of the images returned.

    Raises:
        ImagesError: Missing, unreadable, damaged, unsafe or too large; no or several sets; counts that differ;
            pixels that are neither 0..255 nor 0..1; labels that are no class numbers; ``limit`` below 1.
    """
    name = str(source)
    with accessing(name):
        path, split = _path_and_split(name)
        if path.is_dir():
            _no_split(name, split, "A folder")
            pixels, labels = read_folder(path, name, limit, seed)
            return LabelledImages(pixels, labels, source=name)
        stored, stored_labels = _read(path, name, split)
    images = LabelledImages(to_pixels(stored, name), to_labels(stored_labels, name), source=name)
    return images if limit is None else images.sample(limit, seed)


def _path_and_split(name: str) -> tuple[Path, str | None]:
    """The path, and what follows the last ``#`` unless a file of the whole name exists."""
    if not name:
        raise ImagesError("The name of the images is empty.")
    if "#" not in name or Path(name).exists():
        return Path(name), None
    path, _, split = name.rpartition("#")
    if not path or not split:
        raise ImagesError(f"{name} does not exist.", hint="Write the file, '#' and the split: images.npz#test")
    return Path(path), split


def _no_split(name: str, split: str | None, kind: str) -> None:
    if split is not None:
        raise ImagesError(
            f"{name}: there is no '{split}'.",
            why=f"{kind} holds one set of images.",
            hint=f"Leave out '#{split}'; only HDF5 and .npz files hold several sets.",
        )


def _read(path: Path, name: str, split: str | None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    file = name if split is None else name.removesuffix(f"#{split}")
    content = gunzip(read_file(path, file), file)
    if is_hdf5(content):
        return read_hdf5(content, file, split)
    if is_zip(content):
        return read_npz(content, file, split)
    if is_idx(content):
        _no_split(name, split, "An idx file")
        return read_idx(content, path, file)
    for signature, (why, hint) in _STRANGERS.items():
        if content.startswith(signature):
            raise ImagesError(f"{file} does not hold labelled images.", why=why, hint=hint)
    text = b"\0" not in content[:1024] and content[:1024].isascii()
    raise ImagesError(
        f"{file} does not hold labelled images.",
        why="It is a text file." if text else "Its format is not known.",
        hint=_KNOWN,
    )
