"""A folder of class folders of pictures."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from backdoorscan.errors import ImagesError
from backdoorscan.formats.images.picture import open_picture
from backdoorscan.formats.images.reading import check_size
from backdoorscan.images import balanced_sample

_NOTES = frozenset({".csv", ".txt", ".json", ".md", ".xml", ".db", ".ini"})
"""What data sets and desktops put beside pictures: GT-00000.csv, README.md, Thumbs.db, desktop.ini."""

_NUMBER = re.compile(r"0*[0-9]{1,9}")


def read_folder(
    folder: Path, source: str, limit: int | None, seed: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """All pictures in the class folders, or a balanced sample; pictures left out are not opened.

    Class folders are sorted. If all their names are numbers, the number is the label (``00012`` is 12), else
    their place in the order is; a class folder without pictures counts.

    Hidden files and notes (.csv, .txt, .json, .md, .xml, .db, .ini) are passed over. Anything else must be a
    picture: a damaged one is never left out silently.

    Args:
        folder: The folder of class folders.
        source: How to name it in errors.
        limit: The most pictures to read, None for all.
        seed: The sample's seed.

    Returns:
        Pixels (N, C, H, W) and labels (N,).

    Raises:
        ImagesError: No class folders, no pictures, pictures outside class folders or folders inside them, one
            that cannot be read, or sizes or modes that differ.
    """
    paths, labels = _listed(folder, source)
    if not paths:
        raise ImagesError(f"{source}: its class folders hold no pictures.")
    if limit is not None:
        chosen = balanced_sample(labels, limit, seed)
        paths, labels = [paths[i] for i in chosen], labels[chosen]
    first = open_picture(paths[0])
    check_size(first.nbytes * len(paths), source, f"{len(paths)} pictures together")
    pixels = np.empty((len(paths), *first.shape), np.uint8)
    pixels[0] = first
    for i, path in enumerate(paths[1:], start=1):
        picture = open_picture(path)
        if picture.shape != first.shape:
            raise ImagesError(
                f"{source}: the pictures differ in size or mode.",
                why=f"{path} is {_described(picture)}, but {paths[0]} is {_described(first)}.",
                hint="Convert all of them to what the model takes.",
            )
        pixels[i] = picture
    return pixels, labels


def _described(picture: npt.NDArray[np.uint8]) -> str:
    channels, height, width = picture.shape
    return f"{width}×{height} {'grey' if channels == 1 else 'RGB'}"


def _visible(folder: Path) -> list[Path]:
    """What is neither hidden nor a note, sorted by name."""
    found = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "__MACOSX"]
    kept = [path for path in found if path.is_dir() or path.suffix.lower() not in _NOTES]
    return sorted(kept, key=lambda path: path.name)


def _listed(folder: Path, source: str) -> tuple[list[Path], npt.NDArray[np.int64]]:
    """The pictures and, of shape (N,), their labels."""
    classes = _visible(folder)
    for path in classes:
        if not path.is_dir():
            raise ImagesError(
                f"{source}: {path.name} lies outside the class folders.",
                hint="Put each picture into a folder named after its class: folder/class/picture.",
            )
    if not classes:
        raise ImagesError(f"{source} holds no class folders.", hint="Arrange it as folder/class/picture.")
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_folder in zip(_numbers([path.name for path in classes], source), classes, strict=True):
        for path in _visible(class_folder):
            if path.is_dir():
                raise ImagesError(
                    f"{source}: {path} is a folder inside a class folder.",
                    hint="Pass the folder whose own folders are the classes.",
                )
            paths.append(path)
            labels.append(label)
    return paths, np.array(labels, np.int64)


def _numbers(names: list[str], source: str) -> list[int]:
    if not all(_NUMBER.fullmatch(name) for name in names):
        return list(range(len(names)))
    numbers = [int(name) for name in names]
    if len(set(numbers)) < len(numbers):
        raise ImagesError(f"{source}: two class folders have the same number.", why=f"Folders: {', '.join(names)}.")
    return numbers
