"""Which of a file's arrays are the images and which the labels; no array is read to find out."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backdoorscan.errors import ImagesError
from backdoorscan.formats.images.reading import check_size, did_you_mean

_IMAGE_WORDS = frozenset({"data", "x", "image", "images", "img", "imgs", "pixels", "input", "inputs", "features"})
_LABEL_WORDS = frozenset({"label", "labels", "y", "target", "targets", "class", "classes"})
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_LISTED = 8


@dataclass(frozen=True)
class Entry:
    """One array of a file, as its header declares it.

    Attributes:
        name: Its name in the file, with its groups, e.g. ``"x_test"`` or ``"test/images"``.
        shape: Its declared shape.
        dtype: Its declared type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def nbytes(self) -> int:
        """Bytes that the array would occupy."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {'×'.join(map(str, self.shape)) or 'scalar'} {self.dtype}"

    def check_readable(self, source: str) -> None:
        """Refuse an array that is no plain numbers or too large, before it is read.

        Raises:
            ImagesError: Objects (which are pickles), text, structures, or more than the size limit.
        """
        if self.dtype.kind not in "buif":
            hint = "Python objects are pickles, which are never opened. " if self.dtype.hasobject else ""
            raise ImagesError(
                f"{source}: '{self.name}' does not hold numbers.",
                why=f"Its type is {self.dtype}.",
                hint=f"{hint}Save pixels as uint8 and labels as class numbers.",
            )
        check_size(self.nbytes, source, f"'{self.name}' {self.shape}")


@dataclass(frozen=True)
class Pair:
    """Images and the labels that belong to them.

    Attributes:
        choice: What to write after ``#`` to get this pair.
        images: The array of images.
        labels: The array of labels.
    """

    choice: str
    images: Entry
    labels: Entry


def find_pairs(entries: Sequence[Entry]) -> list[Pair]:
    """All pairs that the names tell, else the only pair that the shapes tell.

    A name is words: one says images (``x``, ``data`` ...) or labels (``y``, ``label`` ...), the others name the
    split: ``x_test`` and ``y_test``, ``test_images`` and ``test_labels``, ``test/data`` and ``test/label``.
    """
    images: defaultdict[str, list[Entry]] = defaultdict(list)
    labels: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        words = [word.lower() for word in _WORD.findall(entry.name)]
        split = "_".join(word for word in words if word not in _IMAGE_WORDS | _LABEL_WORDS)
        if _LABEL_WORDS.intersection(words):  # first, for there are "image_labels"
            labels[split].append(entry)
        elif _IMAGE_WORDS.intersection(words):
            images[split].append(entry)
    pairs = [
        Pair(split or images[split][0].name, images[split][0], labels[split][0])
        for split in images
        if len(images[split]) == len(labels.get(split, ())) == 1
    ]
    return pairs or _pair_by_shape(entries)


def _pair_by_shape(entries: Sequence[Entry]) -> list[Pair]:
    images = [entry for entry in entries if len(entry.shape) in (3, 4)]
    labels = [entry for entry in entries if len(entry.shape) in (1, 2)]
    if len(images) == len(labels) == 1 and images[0].shape[0] == labels[0].shape[0]:
        return [Pair(images[0].name, images[0], labels[0])]
    return []


def choose_pair(entries: Sequence[Entry], split: str | None, source: str) -> Pair:
    """The pair to read.

    Args:
        entries: All arrays of the file.
        split: What the user wrote after ``#``: a split or the name of the images; None to take the only pair.
        source: The file, as the user wrote it.

    Raises:
        ImagesError: No pair, several without a choice, or no such split; all name what there is. Or the pair
            holds something else than numbers, or too many of them.
    """
    pairs = find_pairs(entries)
    if not pairs:
        listed = ", ".join(map(str, entries[:_LISTED]))
        more = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
        raise ImagesError(
            f"{source}: it is not clear which arrays are the images and which their labels.",
            why=f"It holds {listed}{more}." if entries else "It holds no arrays.",
            hint="Name them 'data' and 'label', or 'x_test' and 'y_test'.",
        )
    choices = [pair.choice for pair in pairs]
    if split is None:
        if len(pairs) > 1:
            raise ImagesError(
                f"{source} holds several sets of images: {', '.join(choices)}.",
                hint=f"Choose one, e.g. '{source}#{'test' if 'test' in choices else choices[0]}'.",
            )
        chosen = pairs[0]
    else:
        named = [pair for pair in pairs if split.lower() in (pair.choice.lower(), pair.images.name.lower())]
        if len(named) != 1:
            why = f"It holds {', '.join(choices)}."
            raise ImagesError(f"{source}: there is no '{split}'.", why=why, hint=did_you_mean(split, choices))
        chosen = named[0]
    for entry in (chosen.images, chosen.labels):
        entry.check_readable(source)
    return chosen
