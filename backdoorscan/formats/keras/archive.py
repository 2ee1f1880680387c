"""Reads and rewrites the zip of a Keras 3 ``.keras`` file in memory; nothing is ever extracted to disk.

Only what Keras itself writes is read: a plain zip from the first byte to the last. Whatever two readers could
understand differently (members that overlap, a name that stands twice, a name in two spellings) is refused.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError

CONFIG = "config.json"
METADATA = "metadata.json"
WEIGHTS = "model.weights.h5"

_LOCAL = b"PK\x03\x04"
_LOCAL_FORMAT = "<4s5H3I2H"
_ENTRY = b"PK\x01\x02"
_ENTRY_FORMAT = "<4s6H3I5H2I"
_END = b"PK\x05\x06"
_END_FORMAT = "<4s4H2IH"
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _STREAMED = 0x1, 0x8
_MAX_MEMBERS = 1000
_MAX_MEMBER = 2 * 2**30
# Weights hardly compress and an architecture is small, so these bounds leave honest files alone.
_MAX_EXPANSION = 32
_FREE_EXPANSION = 64 * 2**20
_HINT_BROKEN = "Download or copy the file again; it may be cut off."
_HINT_UNTRUSTED = "Do not use this file; ask its publisher for a plain copy."


class _Entry(NamedTuple):
    """One entry of the central directory, in the order of its fields."""

    signature: bytes
    made_by: int
    needs: int
    flags: int
    method: int
    time: int
    date: int
    crc: int
    packed: int
    size: int
    name_length: int
    extra_length: int
    comment_length: int
    disk: int
    internal: int
    external: int
    offset: int


@dataclass(frozen=True)
class _Member:
    """A file in the archive.

    Attributes:
        entry: What the central directory says of it.
        tail: Its name, extra field and comment, as bytes of the central directory.
        start: Where its packed bytes begin.
    """

    entry: _Entry
    tail: bytes
    start: int

    @property
    def raw_name(self) -> bytes:
        return self.tail[: self.entry.name_length]

    @property
    def end(self) -> int:
        return self.start + self.entry.packed


def is_archive(data: bytes) -> bool:
    """Whether ``data`` is, or begins as, the zip that Keras 3 writes."""
    if not data.startswith(_LOCAL):
        return False
    first = data[30 : 30 + int.from_bytes(data[26:28], "little")]
    if first in {name.encode() for name in (CONFIG, METADATA, WEIGHTS)}:
        return True
    try:
        return CONFIG in _members(data, "")
    except ArtifactError:
        return False


def is_also_archive(data: bytes) -> bool:
    """Whether some reader could take ``data``, whatever it begins with, for a zip."""
    return zipfile.is_zipfile(io.BytesIO(data))


def read_members(data: bytes, name: str) -> dict[str, bytes]:
    """The contents of the members that make a model: ``CONFIG``, ``METADATA`` and ``WEIGHTS``, as far as present.

    Args:
        data: The file's bytes.
        name: What to call the file in errors.

    Raises:
        UnsafeModelError: A member would exhaust the memory, or the archive is made to mislead.
        ArtifactError: The archive is broken.
    """
    members = _members(data, name)
    return {key: _unpacked(data, members[key], key, name) for key in (CONFIG, METADATA, WEIGHTS) if key in members}


def with_members(data: bytes, contents: Mapping[str, bytes]) -> bytes:
    """The archive with the contents of some members replaced; all others keep their packed bytes.

    Args:
        data: An archive that ``read_members`` has read.
        contents: New contents of members that it holds.
    """
    members = _members(data, "The archive")
    offsets = [member.entry.offset for member in members.values()]
    pieces: list[bytes] = []
    directory = b""
    position = 0
    # What streaming programs write behind a member belongs to it: it ends where the next one begins.
    for (name, member), end in zip(members.items(), [*offsets[1:], _directory(data)[1]], strict=True):
        entry = member.entry._replace(offset=position)
        if name in contents:
            entry, piece = _packed(entry, member.raw_name, contents[name])
        else:
            piece = data[member.entry.offset : end]
        pieces.append(piece)
        directory += struct.pack(_ENTRY_FORMAT, *entry) + member.tail
        position += len(piece)
    end_record = struct.pack(_END_FORMAT, _END, 0, 0, len(members), len(members), len(directory), position, 0)
    return b"".join([*pieces, directory, end_record])


def _packed(entry: _Entry, raw_name: bytes, content: bytes) -> tuple[_Entry, bytes]:
    """A member with its local header, and its entry in the central directory."""
    packed = content
    if entry.method == _DEFLATED:
        packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        packed = packer.compress(content) + packer.flush()
    entry = entry._replace(
        flags=entry.flags & ~_STREAMED, crc=zlib.crc32(content), packed=len(packed), size=len(content)
    )
    header = struct.pack(_LOCAL_FORMAT, _LOCAL, *entry[2:10], len(raw_name), 0)
    return entry, header + raw_name + packed


def _directory(data: bytes) -> tuple[int, int, int]:
    """How many entries the central directory has, where it begins and where it ends."""
    size = struct.calcsize(_END_FORMAT)
    if len(data) < size or data[-size:-18] != _END:
        raise ValueError("it does not end as a zip archive does")
    _, disk, first_disk, here, count, length, start, comment = struct.unpack(_END_FORMAT, data[-size:])
    if disk or first_disk or comment or here != count or start + length != len(data) - size:
        raise ValueError("its central directory is not where it should be")
    return count, start, start + length


def _members(data: bytes, name: str) -> dict[str, _Member]:
    """All members by name, in the order of their bytes.

    Raises:
        ArtifactError: See ``read_members``.
    """
    try:
        return _read_directory(data, name)
    # A number of the file that points nowhere surfaces as one of these.
    except (ValueError, struct.error) as error:
        raise ArtifactError(f"{name} is a broken zip archive.", why=str(error), hint=_HINT_BROKEN) from error


def _read_directory(data: bytes, name: str) -> dict[str, _Member]:
    count, position, end = _directory(data)
    if count > _MAX_MEMBERS:
        raise _unsafe(name, f"it holds {count} files", "Keras writes three, and a few more for tables of words.")
    directory = position
    members: list[tuple[str, _Member]] = []
    for _ in range(count):
        entry = _Entry(*struct.unpack_from(_ENTRY_FORMAT, data, position))
        position += struct.calcsize(_ENTRY_FORMAT)
        length = entry.name_length + entry.extra_length + entry.comment_length
        if entry.signature != _ENTRY or position + length > end:
            raise ValueError("its central directory is cut off")
        member = _Member(entry, data[position : position + length], _start(data, entry))
        position += length
        member_name = member.raw_name.decode("utf-8")
        _check(member, member_name, name)
        _check_local(data, member)
        members.append((member_name, member))
    if position != end:
        raise ValueError("its central directory holds more than it says")
    members.sort(key=lambda pair: pair[1].entry.offset)
    free = 0
    for index, (member_name, member) in enumerate(members):
        if member.entry.offset < free or (index == 0 and member.entry.offset) or member.end > directory:
            raise _unsafe(name, f"its file {member_name!r} lies over another one", "No zip program writes that.")
        free = member.end
    found = dict(members)
    if len(found) < len(members):
        raise _unsafe(name, "it holds two files of one name", "Programs differ in which of them they read.")
    return found


def _start(data: bytes, entry: _Entry) -> int:
    name_length, extra_length = struct.unpack_from("<2H", data, entry.offset + 26)
    return entry.offset + struct.calcsize(_LOCAL_FORMAT) + int(name_length) + int(extra_length)


def _check_local(data: bytes, member: _Member) -> None:
    """The name before the bytes must be that of the directory: readers differ in which of them they believe."""
    place = member.entry.offset + struct.calcsize(_LOCAL_FORMAT)
    length = int.from_bytes(data[place - 4 : place - 2], "little")
    if not data.startswith(_LOCAL, member.entry.offset) or data[place : place + length] != member.raw_name:
        raise ValueError(f"its directory names a file {member.raw_name!r} that is not there")


def _check(member: _Member, member_name: str, name: str) -> None:
    entry = member.entry
    parts = member_name.split("/")
    if not member_name or ".." in parts or parts[0].endswith(":") or not parts[0] or set(member_name) & {"\\", "\0"}:
        raise _unsafe(name, f"its file {member_name!r} leaves the archive", "Unpacking it could overwrite other files.")
    if entry.flags & _ENCRYPTED:
        raise _unsafe(name, f"its file {member_name!r} is encrypted", "Nobody can say what is in it.")
    if entry.method not in (_STORED, _DEFLATED):
        raise UnsupportedModelError(
            f"{name} cannot be read: its file '{member_name}' is compressed by method {entry.method}.",
            hint="Save the model again with Keras.",
        )
    if entry.size > _MAX_MEMBER or entry.packed > _MAX_MEMBER:
        raise _unsafe(name, f"its file {member_name!r} is {entry.size:,} bytes large", "That would fill the memory.")
    if entry.size > max(_FREE_EXPANSION, _MAX_EXPANSION * entry.packed):
        raise _unsafe(
            name,
            f"its file {member_name!r} expands from {entry.packed:,} to {entry.size:,} bytes",
            "Weights hardly compress; this would fill the memory with values that are not in the file.",
        )


def _unpacked(data: bytes, member: _Member, member_name: str, name: str) -> bytes:
    entry = member.entry
    content = data[member.start : member.end]
    failure = ""
    if entry.method == _DEFLATED:
        try:
            # Whatever the size in the file says, no more than that and one byte is ever made.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, entry.size + 1)
        except zlib.error as error:
            failure = str(error)
    if len(content) != entry.size or zlib.crc32(content) != entry.crc:
        failure = failure or "Its size or its checksum is not what the archive says."
    if failure:
        raise ArtifactError(f"{name} is damaged: its file '{member_name}'.", why=failure, hint=_HINT_BROKEN)
    return content


def _unsafe(name: str, what: str, why: str) -> UnsafeModelError:
    return UnsafeModelError(f"{name} was refused: {what}.", why=why, hint=_HINT_UNTRUSTED)
