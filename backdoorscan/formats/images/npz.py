"""NumPy archives of images; arrays of Python objects, which are pickles, are never opened."""

from __future__ import annotations

import io
import warnings
import zipfile
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from backdoorscan.errors import ImagesError
from backdoorscan.formats.images.pairs import Entry, choose_pair
from backdoorscan.formats.images.reading import check_size, parsing

_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")  # the second is an archive without members
_SUFFIX = ".npy"
_MAX_MEMBERS = 1_000


def is_zip(content: bytes) -> bool:
    """Whether the bytes are a zip archive, which a ``.npz`` is."""
    return content.startswith(_SIGNATURES)


def read_npz(content: bytes, source: str, split: str | None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Images and labels as stored.

    Args:
        content: The file.
        source: How to name it in errors.
        split: The set to read, None for the only one.

    Raises:
        ImagesError: Damaged or too large; not an archive of arrays; objects; no such pair of arrays.
    """
    with parsing(source, "a NumPy archive"), zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if len(members) > _MAX_MEMBERS:
            raise ImagesError(f"{source} is refused.", why=f"It holds more than {_MAX_MEMBERS} members.")
        if not members or not all(member.filename.endswith(_SUFFIX) for member in members):
            raise ImagesError(
                f"{source} is a zip archive, but not one of NumPy arrays.",
                hint="If it holds pictures, unpack it and pass the folder.",
            )
        entries = [_entry(archive, member) for member in members]
        pair = choose_pair(entries, split, source)
        return _values(archive, pair.images, source), _values(archive, pair.labels, source)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether in Fortran's order, and type; leaves the stream at the first value."""
    version = np.lib.format.read_magic(stream)
    with warnings.catch_warnings():
        # NumPy warns of the way Python 2 wrote sizes; it reads them right all the same.
        warnings.filterwarnings("ignore", message=".*header parsing.*", category=UserWarning)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"arrays of .npy version {version} are not supported")  # 3.0 is for structures only


def _entry(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Entry:
    with archive.open(member) as stream:
        shape, _, dtype = _header(stream)
    return Entry(member.filename.removesuffix(_SUFFIX), shape, dtype)


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, source: str) -> npt.NDArray[Any]:
    """The array in a member of an archive.

    Raises:
        ImagesError: It is too large or damaged.
        ValueError: It is no array of numbers.
    """
    return _values(archive, _entry(archive, member), source)


def _values(archive: zipfile.ZipFile, entry: Entry, source: str) -> npt.NDArray[Any]:
    member = archive.getinfo(entry.name + _SUFFIX)
    # zipfile stops at the declared size, so a member cannot unpack to more than what is checked here.
    check_size(member.file_size, source, f"'{entry.name}'")
    with archive.open(member) as stream:
        shape, fortran, dtype = _header(stream)
        values = stream.read()
    if len(values) != entry.nbytes:
        raise ImagesError(
            f"{source}: '{entry.name}' is damaged.",
            why=f"Shape {shape} of {dtype} needs {entry.nbytes:,} bytes, there are {len(values):,}.",
        )
    return np.frombuffer(values, dtype).reshape(shape, order="F" if fortran else "C")
