"""From bytes to the shapes and places of tensors: what would run code from the file is refused. No torch here."""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Callable
from math import prod
from typing import Any, Literal, TypeAlias

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.weights import archive, pickles
from backdoorscan.formats.weights.contents import ParsedWeights, Span, StateDict, TensorSpec
from backdoorscan.formats.weights.names import find_state_dicts
from backdoorscan.formats.weights.pickles import ITEM_SIZES, Leaf, Storage

Kind: TypeAlias = Literal["zip", "legacy", "pickle", "torchscript", "pt2", "safetensors"]

_EXPORT = (
    "Where you trust the file, export its weights: torch.save(model.state_dict(), 'weights.pt'); then pass --arch."
)
_AGAIN = "Download or copy the file again."

# What torch.save wrote before 1.6, as a pickled integer, behind the pickle's own protocol mark.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_TORCH_MEMBER = re.compile(r"(?:[^/]+/)?(?:data\.pkl|data/\d+)")
# The safetensors library's own limit on a header.
_MAX_HEADER = 100_000_000
_MAX_NAME = 1000

_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def kind_of(data: bytes) -> Kind | None:
    """Tell by content what PyTorch or safetensors wrote, or ``None`` for anything else.

    Archives that only running code could open are recognised too, so that they are refused with a reason.
    """
    # First, since a header of 640 bytes looks like the start of a pickle.
    if _safetensors_header_end(data) is not None:
        return "safetensors"
    if data.startswith(archive.MAGIC):
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
        names = [entry.filename for entry in archive.entries(data)[0]]
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


def parse(data: bytes, name: str) -> ParsedWeights:
    """Find the tensors in a file of weights.

    Args:
        data: The file.
        name: What messages call it.

    Raises:
        UnsafeModelError: The file holds code, or objects that only code from somewhere could rebuild.
        ArtifactError: The file is truncated, broken or no file of weights.
    """
    kind = kind_of(data)
    if kind == "torchscript":
        raise UnsafeModelError(
            f"{name} is a TorchScript archive.",
            why="It carries its own program, and loading it runs code from the file.",
            hint=_EXPORT,
        )
    if kind == "pickle":
        raise UnsafeModelError(
            f"{name} is a plain pickle, not written by torch.save in its default form.",
            why="Unpickling it would run code from the file.",
            hint=_EXPORT,
        )
    if kind not in _READERS:
        raise ArtifactError(f"{name} holds no weights of PyTorch or safetensors.", hint=_AGAIN)
    read, writer = _READERS[kind]
    try:
        return read(data)
    except pickles.Refused as refusal:
        raise UnsafeModelError(
            f"{name} holds more than weights: {_printable(refusal)}.",
            why="It is a pickled model or another object; opening it would run code from the file.",
            hint=_EXPORT,
        ) from refusal
    except ArtifactError as error:
        said = "" if "broken" in error.what else error.what.removeprefix("The archive")
        what = f"{name}{said}" if said else f"{name} is damaged or truncated."
        raise type(error)(what, why=error.why, hint=error.hint or _AGAIN) from error
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        # A damaged header derails its reader in any of these ways.
        raise ArtifactError(
            f"{name} is damaged, truncated or not {writer}.",
            why=f"The safe reader stopped: {_printable(error)}.",
            hint=_AGAIN,
        ) from error


def _printable(error: Exception) -> str:
    # It quotes the file, which could write escape sequences to a terminal.
    return "".join(char if char.isprintable() else "?" for char in " ".join(str(error).split()))[:200]


def _read_zip(data: bytes) -> ParsedWeights:
    members = archive.members(data)

    def piece(name: str) -> archive.Member:
        if name not in members:
            raise ValueError(f"the archive has no member '{name}'"[:200])
        return members[name]

    if "byteorder" in members:
        _little_endian(data[piece("byteorder").start : piece("byteorder").stop] == b"little")
    program = piece("data.pkl")
    content, _ = pickles.read(io.BytesIO(data[program.start : program.stop]))

    def place(storage: Storage) -> Span:
        member = piece(f"data/{storage.key}")
        return _within(storage, member.start, member.stop)

    return _parsed(content, place)


def _read_legacy(data: bytes) -> ParsedWeights:
    # Five pickles (a magic number, the version, the machine, the content, the names of the storages), then the
    # storages in that order, each behind its number of elements.
    stream = io.BytesIO(data)
    (_magic, _), (_version, _), (machine, _) = (pickles.read(stream) for _ in range(3))
    _little_endian(not isinstance(machine, dict) or machine.get("little_endian", True) is True)
    content, storages = pickles.read(stream)
    keys, _ = pickles.read(stream)
    if not isinstance(keys, list) or set(map(str, keys)) != storages.keys() or len(keys) != len(storages):
        raise ValueError("the names of the storages do not fit the tensors")
    spans: dict[str, tuple[int, int]] = {}
    at = stream.tell()
    for key in keys:
        storage = storages[str(key)]
        if data[at : at + 8] != struct.pack("<q", storage.whole):
            raise ValueError(f"the storage '{key}' is cut off"[:200])
        spans[storage.key] = at + 8, at + 8 + storage.whole * ITEM_SIZES[storage.dtype]
        at = spans[storage.key][1]
    if at > len(data):
        raise ValueError("the last storages are cut off")
    return _parsed(content, lambda storage: _within(storage, *spans[storage.key]))


def _little_endian(answer: bool) -> None:
    if not answer:
        raise UnsupportedModelError(
            "The archive was written on a big-endian machine.", hint="Load and save it again on an ordinary one."
        )


def _within(storage: Storage, start: int, stop: int) -> Span:
    size = ITEM_SIZES[storage.dtype]
    if storage.whole * size > stop - start:
        raise ValueError(f"the storage '{storage.key}' has {stop - start} bytes, too few"[:200])
    return Span(start, start + storage.whole * size)


def _parsed(content: Any, place: Callable[[Storage], Span]) -> ParsedWeights:
    states = []
    for where, tensors in find_state_dicts(content):
        specs = {key: _spec(leaf, place) for key, leaf in tensors.items()}
        if not all(_is_name(str(key)) for key in (*where, *specs)):
            raise ValueError("a tensor has an impossible name")
        states.append(StateDict(where, specs))
    return ParsedWeights("tensor" if isinstance(content, Leaf) else type(content).__name__, tuple(states))


def _is_name(name: str) -> bool:
    return len(name) <= _MAX_NAME and name.isprintable()


def _spec(leaf: Leaf, place: Callable[[Storage], Span]) -> TensorSpec:
    if leaf.storage is None:
        return TensorSpec(leaf.dtype, leaf.shape, leaf.stride, leaf.offset, Span(0, 0))
    first = leaf.storage.first * ITEM_SIZES[leaf.storage.dtype] // ITEM_SIZES[leaf.dtype]
    return TensorSpec(leaf.dtype, leaf.shape, leaf.stride, first + leaf.offset, place(leaf.storage))


def _read_safetensors(data: bytes) -> ParsedWeights:
    begin = _safetensors_header_end(data) or 0
    header = json.loads(data[8:begin], object_pairs_hook=_without_repeats)
    header.pop("__metadata__", None)
    tensors = {name: _safetensor(name, entry, begin, len(data)) for name, entry in header.items()}
    spans = sorted((spec.storage.start, spec.storage.stop) for spec in tensors.values())
    # As the library demands: no gap to hide anything in, no two tensors in one place.
    ends = [begin, *(stop for _, stop in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != len(data):
        raise ValueError("its tensors overlap, leave gaps or are cut off")
    return ParsedWeights("safetensors file", (StateDict((), tensors),) if tensors else ())


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("its header has one name twice")
    return result


def _safetensor(name: str, entry: Any, begin: int, end: int) -> TensorSpec:
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if dtype not in _SAFETENSORS:
        raise ValueError(f"'{name}' is of the unknown type {dtype}")
    if not _is_name(name) or len(shape) > pickles.MAX_DIMENSIONS or len(offsets) != 2:
        raise ValueError(f"'{name[:100]}' is no tensor")
    if not all(type(number) is int and 0 <= number <= end for number in (*shape, *offsets)):
        raise ValueError(f"'{name}' has impossible sizes")
    kind = _SAFETENSORS[dtype]
    if prod(shape) * ITEM_SIZES[kind] != offsets[1] - offsets[0]:
        raise ValueError(f"'{name}' has {offsets[1] - offsets[0]} bytes for the shape {shape}"[:200])
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return TensorSpec(kind, tuple(shape), stride, 0, Span(begin + offsets[0], begin + offsets[1]))


_READERS: dict[Kind | None, tuple[Callable[[bytes], ParsedWeights], str]] = {
    "zip": (_read_zip, "what torch.save writes by default"),
    "legacy": (_read_legacy, "what torch.save writes by default"),
    "safetensors": (_read_safetensors, "a safetensors file"),
}
