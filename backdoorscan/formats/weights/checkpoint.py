"""From bytes to a checkpoint, as data: what would run code from the file is refused."""

from __future__ import annotations

import io
import json
import re
import struct
import warnings
import zipfile
from pickle import UnpicklingError
from typing import Any, Literal, TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError

Kind: TypeAlias = Literal["zip", "legacy", "pickle", "torchscript", "pt2", "safetensors"]

_EXPORT = (
    "Where you trust the file, export its weights: torch.save(model.state_dict(), 'weights.pt'); then pass --arch."
)
_AGAIN = "Download or copy the file again."

_ZIP_MAGIC = b"PK\x03\x04"
# What torch.save wrote before 1.6, as a pickled integer, behind the pickle's own protocol mark.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_TORCH_MEMBER = re.compile(r"(?:[^/]+/)?(?:data\.pkl|data/\d+)")
# The library's own limit on a safetensors header.
_MAX_HEADER = 100_000_000
# How the restricted unpickler says that it met something other than tensors and plain containers.
_REFUSALS = re.compile(
    r"GLOBAL (?P<name>[\w.]+)|Trying to (?:call reduce|instantiate|load unsupported)|Can only (?:create|build)"
    r"|allowlisted|unsupported persistent id|persistent_load|must be imported"
)


def kind_of(data: bytes) -> Kind | None:
    """Tell by content what PyTorch or safetensors wrote, or ``None`` for anything else.

    Archives that only running code could open are recognised too, so that they are refused with a reason.
    """
    # First, since a header of 640 bytes looks like the start of a pickle.
    if _safetensors_header_end(data) is not None:
        return "safetensors"
    if data.startswith(_ZIP_MAGIC):
        return _zip_kind(data)
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        if data[2:].startswith(_LEGACY_MAGIC):
            return "legacy"
        return "pickle" if data[2:3] != b"\0" else None
    return None


def _safetensors_header_end(data: bytes) -> int | None:
    if len(data) < 9 or data[8:9] != b"{":
        return None
    (length,) = struct.unpack("<Q", data[:8])
    return 8 + length if 2 <= length <= _MAX_HEADER else None


def _zip_kind(data: bytes) -> Kind | None:
    try:
        names = [member.filename for member in _members(data)]
    except ArtifactError:
        # The table of contents is lost; the first member still tells who wrote the archive.
        (length,) = struct.unpack("<H", data[26:28]) if len(data) >= 30 else (0,)
        first = data[30 : 30 + length].decode("utf-8", "replace")
        return "zip" if _TORCH_MEMBER.fullmatch(first) else None
    tails = {name.partition("/")[2] or name for name in names}
    if "data.pkl" in tails:
        return "torchscript" if "constants.pkl" in tails else "zip"
    if tails & {"archive_format", "models/model.json", "serialized_exported_program.json"}:
        return "pt2"
    return None


def _members(data: bytes) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, OSError, NotImplementedError, OverflowError) as error:
        raise ArtifactError("The zip archive is broken.", why=str(error)) from error


def read_torch(artifact: Artifact) -> Any:
    """Read what ``torch.save`` wrote: tensors and plain containers, nothing else.

    Raises:
        UnsafeModelError: The file holds code, or objects that only code from somewhere could rebuild.
        ArtifactError: The file is truncated or broken.
    """
    path, kind = artifact.path, kind_of(artifact.data)
    if kind == "torchscript":
        raise UnsafeModelError(
            f"{path} is a TorchScript archive.",
            why="It carries its own program, and loading it runs code from the file.",
            hint=_EXPORT,
        )
    if kind == "pt2":
        raise UnsafeModelError(
            f"{path} is an exported program (torch.export).",
            why="torch.export.load can run code from the file.",
            hint=_EXPORT,
        )
    if kind == "pickle":
        raise UnsafeModelError(
            f"{path} is a plain pickle, not written by torch.save in its default form.",
            why="Unpickling it would run code from the file.",
            hint=_EXPORT,
        )
    if kind == "zip":
        _check_sizes(artifact)
    try:
        with warnings.catch_warnings():
            # torch's remarks on old files and dtypes are for whoever wrote them.
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(artifact.data), weights_only=True, map_location="cpu")
    except UnpicklingError as error:
        reason = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
        refusal = _REFUSALS.search(reason)
        if refusal is None:
            raise _broken(artifact, f"The safe reader stopped: {' '.join(reason.split())[:200]}.") from error
        name = refusal["name"]
        raise UnsafeModelError(
            f"{path} holds more than weights{f': {name}' if name else ''}.",
            why="It is a pickled model or another object; opening it would run code from the file.",
            hint=_EXPORT,
        ) from error
    except Exception as error:
        # A damaged pickle derails the unpickler in any way there is: IndexError, KeyError, struct.error …
        said = str(error).strip().splitlines()
        raise _broken(artifact, f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__) from error


def _check_sizes(artifact: Artifact) -> None:
    # torch.save never compresses: members that unpack to more than the file are compressed or overlap, and a
    # few kilobytes of them could fill the memory.
    try:
        unpacked = sum(member.file_size for member in _members(artifact.data))
    except ArtifactError as error:
        raise ArtifactError(f"{artifact.path} is damaged or truncated.", why=error.why, hint=_AGAIN) from error
    if unpacked > len(artifact.data):
        raise UnsupportedModelError(
            f"{artifact.path} is compressed.",
            why=f"Its {len(artifact.data)} bytes unpack to {unpacked}; torch.save never does that.",
            hint="Save it again with torch.save.",
        )


def _broken(artifact: Artifact, why: str) -> ArtifactError:
    return ArtifactError(
        f"{artifact.path} is damaged, truncated or not what torch.save writes by default.", why=why, hint=_AGAIN
    )


def read_safetensors(artifact: Artifact) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        ArtifactError: The file is truncated or broken.
    """
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(artifact.data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, MemoryError) as error:
        raise ArtifactError(
            f"{artifact.path} is damaged, truncated or not a safetensors file.", why=str(error), hint=_AGAIN
        ) from error
    return tensors


def safetensors_spans(data: bytes) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes lie in a safetensors file that ``read_safetensors`` accepted."""
    end = _safetensors_header_end(data)
    if end is None:
        raise ArtifactError("This is not a safetensors file.")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    return {name: (end + entry["data_offsets"][0], end + entry["data_offsets"][1]) for name, entry in header.items()}
