"""Bytes from disk, bounded before they are read; and one way of saying that a file is broken."""

from __future__ import annotations

import difflib
import gzip
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from backdoorscan.errors import BackdoorscanError, ImagesError

MAX_BYTES = 2 * 2**30
"""The most that one file, or one array unpacked from it, may occupy: 60,000 CIFAR images as float64 fit."""

_GZIP_MAGIC = b"\x1f\x8b"
_BLOCK = 2**20


@contextmanager
def accessing(source: str) -> Iterator[None]:
    """Turn what the file system refuses into one message.

    Args:
        source: The file, as the user wrote it.

    Raises:
        ImagesError: The block raised an ``OSError``, which is its cause.
    """
    try:
        yield
    except OSError as error:
        raise ImagesError(f"{source} cannot be read.", why=f"{error.strerror or error}.") from error


@contextmanager
def parsing(source: str, kind: str) -> Iterator[None]:
    """Turn whatever a third-party parser raises on a broken file into one message.

    Args:
        source: The file, as the user wrote it.
        kind: What it was taken for, with its article, e.g. ``"an HDF5 file"``.

    Raises:
        ImagesError: The block failed; the parser's exception is its cause.
    """
    try:
        yield
    except BackdoorscanError:
        raise
    except Exception as error:
        # On damaged input h5py, zipfile, gzip and Pillow raise anything from KeyError to SyntaxError: a closed
        # list of types would let the next one through as a traceback.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImagesError(
            f"{source} cannot be read as {kind}.",
            why=f"The reader says: {reason}",
            hint="The file may be truncated or damaged: fetch it again.",
        ) from error


def check_size(size: int, source: str, what: str) -> None:
    """Refuse a size before anything of that size is allocated.

    Args:
        size: Bytes.
        source: The file, as the user wrote it.
        what: What has that size, as the subject of a sentence.

    Raises:
        ImagesError: ``size`` is above ``MAX_BYTES``.
    """
    if size > MAX_BYTES:
        raise ImagesError(
            f"{source} is too large.",
            why=f"{what} takes {size:,} bytes, the limit is {MAX_BYTES:,}.",
            hint="A few thousand images are enough: pass a smaller set.",
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint naming the nearest known name, empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else ""


def read_file(path: Path, source: str) -> bytes:
    """The content of a regular file.

    Args:
        path: The file.
        source: How to name it in errors.

    Raises:
        ImagesError: It is missing, not a regular file, empty, too large or cannot be read.
    """
    with accessing(source):
        if not path.exists():
            siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ImagesError(f"{source} does not exist.", hint=did_you_mean(path.name, siblings))
        if not path.is_file():  # reading a pipe or a device might never end
            raise ImagesError(f"{source} is not a regular file.")
        check_size(path.stat().st_size, source, "The file")
        content = path.read_bytes()
    if not content:
        raise ImagesError(f"{source} is empty.", hint="Its download may have failed: fetch it again.")
    return content


def gunzip(content: bytes, source: str) -> bytes:
    """``content`` unpacked if it is gzip, else as it is.

    Raises:
        ImagesError: It is damaged, or larger than ``MAX_BYTES`` when unpacked.
    """
    if not content.startswith(_GZIP_MAGIC):
        return content
    unpacked = bytearray()
    with parsing(source, "a gzip file"), gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
        while block := stream.read(_BLOCK):
            unpacked += block
            check_size(len(unpacked), source, "What it unpacks to")
    if not unpacked:
        raise ImagesError(f"{source} is empty.", why="It is a gzip file that unpacks to nothing.")
    return bytes(unpacked)
