"""An artifact: a model file or a folder that is a model, read once."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from backdoorscan.errors import ArtifactError, UnsafeModelError

_MAX_FILES = 1000
_MAX_BYTES = 16 * 2**30
_COPY = "Copy the files themselves, without links (cp -rL), and give the copy."


@dataclass(frozen=True)
class Artifact:
    """The bytes of a model with their digest.

    Everything is read exactly once: what is hashed is what is parsed, so a file that is exchanged during a
    scan can't be reported under another's digest.

    Attributes:
        path: Where the bytes came from: a file or a folder.
        data: The whole file; empty for a folder.
        sha256: Hexadecimal SHA-256. Of a file alone that of ``data``. Of several files that of a list of them as
            ``sha256sum`` prints it, ``<SHA-256 of the content>  <name>`` and a newline for each, sorted by name. It
            covers all files of a folder but hidden ones, in subfolders too, or a file and its companions.
        parts: What belongs to it beside ``data``, by name relative to the folder, with ``/``: the files of a folder,
            or a file's companions (``with_companions``).
    """

    path: Path
    data: bytes = field(repr=False)
    sha256: str
    parts: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}), repr=False)

    @classmethod
    def read(cls, path: str | Path) -> Artifact:
        """Read a file, or all files of a folder but hidden ones.

        Raises:
            UnsafeModelError: The folder has links or devices in it.
            ArtifactError: The file is missing, empty or unreadable, or the folder has too much in it.
        """
        path = Path(path)
        if path.is_dir():
            parts = _read_parts(path, list(file_names(path)))
            return cls(path, b"", _digest(parts), MappingProxyType(parts))
        if path.exists() and not path.is_file():
            raise UnsafeModelError(f"{path} is no regular file.", hint="Give the model file itself.")
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise ArtifactError(f"There is no model file {path}.", hint="Check the path.") from None
        except OSError as error:
            raise ArtifactError(f"Cannot read {path}.", why=str(error)) from error
        if not data:
            raise ArtifactError(f"{path} is empty.", hint="Download or copy the file again.")
        return cls(path, data, hashlib.sha256(data).hexdigest())

    def with_companions(self, names: Sequence[str]) -> Artifact:
        """The same file with others that it says belong to it.

        Args:
            names: Names relative to the folder of the file, with ``/``, as the untrusted file gives them.

        Raises:
            UnsafeModelError: A name leads out of the folder, or to a link or device.
            ArtifactError: There is no such file, or there is too much.
        """
        wanted = sorted(set(names))
        for name in wanted:
            steps = PurePosixPath(name).parts
            if not name or "/".join(steps) != name or ".." in steps or not _is_plain(name):
                raise UnsafeModelError(
                    f"{self.path} refers to the file {name!r}.",
                    why="A model may only refer to files in its own folder, by plain relative names.",
                    hint="Save the model as one file, or beside the files it refers to.",
                )
        if self.path.name in wanted:
            raise UnsafeModelError(f"{self.path} refers to itself.", hint="Save the model as one file.")
        if not wanted:
            return self
        parts = _read_parts(self.path.parent, wanted)
        return replace(self, sha256=_digest({self.path.name: self.data, **parts}), parts=MappingProxyType(parts))


def file_names(folder: Path) -> Iterator[str]:
    """The files in a folder and below but hidden ones (``.git``, ``.cache``), by relative name with ``/``.

    Raises:
        UnsafeModelError: A file has a name that cannot be printed.
        ArtifactError: The folder cannot be read.
    """
    left = [folder]
    while left:
        try:
            entries = sorted(left.pop().iterdir())
        except OSError as error:
            raise ArtifactError(f"Cannot read the folder {folder}.", why=str(error)) from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = entry.relative_to(folder).as_posix()
            if not _is_plain(name):
                raise UnsafeModelError(f"{folder} has a file with an odd name: {name!r}.", hint="Rename the file.")
            if entry.is_dir() and not entry.is_symlink():
                left.append(entry)
            else:
                yield name


def _is_plain(name: str) -> bool:
    # A backslash or a colon would lead elsewhere on Windows; what cannot be printed would make two digests alike.
    return name.isprintable() and not set(name) & set("\\:")


def _digest(files: Mapping[str, bytes]) -> str:
    lines = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read_parts(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Read files of a folder; nothing is read before all are known to be plain files and not too many."""
    if len(names) > _MAX_FILES:
        raise _too_much(folder, f"It has more than {_MAX_FILES} files.")
    total = sum(_checked(folder, name).st_size for name in names)
    if total > _MAX_BYTES:
        raise _too_much(folder, f"Its files have {total / 2**30:.1f} GiB, more than {_MAX_BYTES // 2**30}.")
    return {name: _read_part(folder, name) for name in names}


def _too_much(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{folder} is too large to be a model.", why=why, hint="Give the folder of one model alone.")


def _checked(folder: Path, name: str) -> os.stat_result:
    """What the file is, if it is a plain one of this folder.

    Raises:
        UnsafeModelError: It is a link, or behind one, or a device.
        ArtifactError: There is none.
    """
    place = folder
    try:
        for part in PurePosixPath(name).parts:
            place = place / part
            found = place.lstat()
            if stat.S_ISLNK(found.st_mode):
                raise UnsafeModelError(f"{place} is a link.", why="It could lead to any file.", hint=_COPY)
    except OSError as error:
        raise ArtifactError(f"Cannot read {folder / name}.", why=str(error), hint="Copy all files again.") from error
    if not stat.S_ISREG(found.st_mode):
        raise UnsafeModelError(f"{place} is no plain file.", hint="Give a model made of plain files.")
    if found.st_nlink > 1:
        raise UnsafeModelError(f"{place} is a hard link.", why="The same file has another name.", hint=_COPY)
    return found


def _read_part(folder: Path, name: str) -> bytes:
    known = _checked(folder, name)
    try:
        # Should a link or a pipe have taken its place meanwhile: neither follow nor wait.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(folder / name, flags), "rb") as file:
            opened = os.fstat(file.fileno())
            if (opened.st_dev, opened.st_ino) != (known.st_dev, known.st_ino):
                raise UnsafeModelError(f"{folder / name} was exchanged while it was read.", hint="Try again.")
            return file.read(known.st_size)
    except OSError as error:
        raise ArtifactError(f"Cannot read {folder / name}.", why=str(error)) from error
