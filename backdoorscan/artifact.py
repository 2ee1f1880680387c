"""An artifact: the model file on disk, read once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from backdoorscan.errors import ArtifactError


@dataclass(frozen=True)
class Artifact:
    """The bytes of a model file with their digest.

    The file is read exactly once: what is hashed is what is parsed, so a file that is exchanged during a
    scan can't be reported under another's digest.

    Attributes:
        path: Where the bytes came from.
        data: The whole file.
        sha256: Hexadecimal SHA-256 of ``data``.
    """

    path: Path
    data: bytes = field(repr=False)
    sha256: str

    @classmethod
    def read(cls, path: str | Path) -> Artifact:
        """Read a file.

        Raises:
            ArtifactError: The file is missing, a folder, empty or unreadable.
        """
        path = Path(path)
        if path.is_dir():
            raise ArtifactError(f"{path} is a folder, not a model file.", hint="Give the path of a model file.")
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise ArtifactError(f"There is no model file {path}.", hint="Check the path.") from None
        except OSError as error:
            raise ArtifactError(f"Cannot read {path}.", why=str(error)) from error
        if not data:
            raise ArtifactError(f"{path} is empty.", hint="Download or copy the file again.")
        return cls(path, data, hashlib.sha256(data).hexdigest())
