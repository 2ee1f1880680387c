"""Copies of files of weights in which some tensors have one row more. No torch here, and it runs apart."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backdoorscan.errors import UnsupportedModelError
from backdoorscan.formats.weights import archive
from backdoorscan.formats.weights.checkpoint import kind_of

_WHOLE = ("BININT", "BININT1", "BININT2", "LONG1")
_PUTS = ("BINPUT", "LONG_BINPUT")
_GETS = ("BINGET", "LONG_BINGET")


def extended(data: bytes, contents: Mapping[int, bytes], rows: int, name: str) -> bytes:
    """A copy of a file in which some tensors have one row more.

    Args:
        data: The file.
        contents: Their new numbers by where their storages begin, which nothing else lies in.
        rows: How many rows they have in the file.
        name: What messages call the file.

    Raises:
        UnsupportedModelError: The file is written in a way that it cannot be done in.
        ArtifactError: It is broken.
    """
    kind = kind_of(data)
    if kind == "zip":
        return _extended_zip(data, contents, rows, name)
    if kind == "safetensors":
        return _extended_safetensors(data, contents)
    raise _refusal(name, "torch wrote it in its form of before 1.6.", "Load and save it again with torch.")


def _refusal(name: str, why: str, hint: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} cannot be written with one class more.", why=why, hint=hint)


def _extended_safetensors(data: bytes, contents: Mapping[int, bytes]) -> bytes:
    begin = 8 + int(struct.unpack("<Q", data[:8])[0])
    header = json.loads(data[8:begin])
    entries = sorted(
        (entry for key, entry in header.items() if key != "__metadata__"), key=lambda entry: entry["data_offsets"]
    )
    pieces, end = [], 0
    for entry in entries:
        start, stop = (begin + offset for offset in entry["data_offsets"])
        piece = contents.get(start, data[start:stop]) if stop > start else b""
        if len(piece) > stop - start:
            entry["shape"][0] += 1
        entry["data_offsets"] = [end, end + len(piece)]
        end += len(piece)
        pieces.append(piece)
    text = json.dumps(header, separators=(",", ":")).encode()
    # As the library does it: the numbers begin where any of their types may.
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *pieces])


def _extended_zip(data: bytes, contents: Mapping[int, bytes], rows: int, name: str) -> bytes:
    members = archive.members(data)
    new = {key: contents[m.start] for key, m in members.items() if m.start < m.stop and m.start in contents}
    program = members["data.pkl"]
    keys = {member.removeprefix("data/") for member in new}
    new["data.pkl"] = _extended_pickle(data[program.start : program.stop], keys, rows, name)
    return archive.rewritten(data, new)


@dataclass(frozen=True)
class _Step:
    """An instruction of a pickle, without those that only remember or recall constants."""

    name: str
    value: Any
    start: int
    stop: int


def _extended_pickle(program: bytes, keys: set[str], rows: int, name: str) -> bytes:
    """The pickle in which the tensors in some storages have one row more.

    ``torch.save`` writes a tensor as its storage (... key, device, number of elements), the offset in it, and the
    sizes. Two numbers in this are to change, and no other byte.
    """
    steps = _steps(program)
    places = [at for at, step in enumerate(steps) if step.name == "BINPERSID" and steps[at - 4].value in keys]
    if sorted(steps[at - 4].value for at in places) != sorted(keys):
        raise _refusal(
            name,
            "The head shares its memory with other tensors in the file.",
            "Save it with tensors of their own (clone them) and repair that.",
        )
    changes: list[tuple[_Step, int]] = []
    for at in places:
        count, size = steps[at - 2], next(step for step in steps[at + 2 :] if step.name != "MARK")
        if not (count.name in _WHOLE and size.name in _WHOLE and size.value == rows):
            raise _refusal(name, "Its tensors are not written as torch.save does it.", "Save it again with torch.save.")
        changes += [(count, count.value // rows * (rows + 1)), (size, rows + 1)]
    copy = bytearray(program)
    for step, value in sorted(changes, key=lambda change: change[0].start, reverse=True):
        copy[step.start : step.stop] = _whole(value)
    return bytes(copy)


def _steps(program: bytes) -> Sequence[_Step]:
    instructions = list(pickletools.genops(io.BytesIO(program)))
    stops = [int(position or 0) for _, _, position in instructions[1:]] + [len(program)]
    steps: list[_Step] = []
    memo: dict[Any, Any] = {}
    for (code, value, position), stop in zip(instructions, stops, strict=True):
        if code.name in _PUTS:
            memo[value] = steps[-1].value
        else:
            steps.append(_Step(code.name, memo.get(value) if code.name in _GETS else value, int(position or 0), stop))
    return steps


def _whole(value: int) -> bytes:
    """A number as a pickle of torch.save holds it: without the mark of the protocol, and the end."""
    return pickle.dumps(value, protocol=2)[2:-1]
