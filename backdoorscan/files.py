"""Files and folders that are whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backdoorscan.errors import OutputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place to write to that becomes ``path`` only if everything went well.

    Whoever opens ``path`` meanwhile finds the old content or the new, never a part.

    Raises:
        OSError: The disk refused.
    """
    place = _beside(path)
    try:
        yield place
        place.replace(path)
    finally:
        place.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, *, hint: str = "") -> None:
    """Write a file that is either whole or not there.

    Raises:
        OutputError: The disk refused; with ``hint``.
    """
    try:
        with whole_file(path) as place:
            place.write_bytes(data)
    except OSError as error:
        raise OutputError(f"Cannot write {path}.", why=str(error), hint=hint) from error


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A place for files that becomes ``folder`` only if everything went well.

    Where ``folder`` exists, the files are moved into it, over those of the same name. Folders above it are made, and
    taken away again if something went wrong.

    Raises:
        OutputError: The disk refused.
    """
    whole = folder.absolute()
    place = _beside(whole)
    missing: list[Path] = []
    try:
        try:
            missing = [parent for parent in whole.parents if not parent.exists()]
            place.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"Cannot write to {folder.parent}.", why=str(error)) from error
        yield place
        try:
            if folder.exists():
                for file in place.iterdir():
                    file.replace(folder / file.name)
            else:
                place.rename(folder)
        except OSError as error:
            raise OutputError(f"Cannot write {folder}.", why=str(error)) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
        for parent in missing:  # innermost first; one that holds something stays
            with suppress(OSError):
                parent.rmdir()


def _beside(path: Path) -> Path:
    """A name on the same file system, so that renaming is one step, that nobody else uses, in no other container."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
