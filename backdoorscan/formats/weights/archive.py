"""The members of a zip archive that ``torch.save`` wrote: uncompressed, so that each is a stretch of the file."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from backdoorscan.errors import ArtifactError, UnsupportedModelError

MAGIC = b"PK\x03\x04"
_CENTRAL = b"PK\x01\x02"
_DESCRIPTOR = b"PK\x07\x08"
_ALIGNMENT = 64
_PADDING = 0x4246  # torch's own kind of extra field


@dataclass(frozen=True)
class Member:
    """A member of the archive.

    Attributes:
        start: Where its content begins in the file, in bytes.
        stop: Where it ends.
        checksums: Where its CRC-32 is noted: in up to three places.
    """

    start: int
    stop: int
    checksums: tuple[int, ...]


def entries(data: bytes) -> tuple[list[zipfile.ZipInfo], int]:
    """The table of contents, and where it begins.

    Raises:
        ArtifactError: There is none.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, struct.error, ValueError, OSError, NotImplementedError, OverflowError) as error:
        raise ArtifactError("The zip archive is broken.", why=str(error)) from error


def members(data: bytes) -> dict[str, Member]:
    """Where each member lies, by its name without the folder that all of them are in.

    Raises:
        UnsupportedModelError: They are compressed or encrypted.
        ArtifactError: The archive is broken: members that overlap, or two of one name.
    """
    table, at = entries(data)
    # What unpacks to more than the file is compressed or overlaps: a few kilobytes could fill the memory.
    unpacked = sum(entry.file_size for entry in table)
    if unpacked > len(data) or any(entry.compress_type != zipfile.ZIP_STORED for entry in table):
        raise UnsupportedModelError(
            "The archive is compressed.",
            why=f"Its {len(data)} bytes unpack to {unpacked}; torch.save never compresses.",
            hint="Save it again with torch.save.",
        )
    found: dict[str, Member] = {}
    for entry in table:
        name = entry.filename.partition("/")[2] or entry.filename
        if name in found:
            raise ArtifactError("The zip archive is broken.", why=f"It has two members '{name}'.")
        found[name] = _member(data, entry, at)
        at += 46 + sum(struct.unpack_from("<3H", data, at + 28))
    spans = sorted((member.start, member.stop) for member in found.values() if member.start < member.stop)
    if any(left[1] > right[0] for left, right in pairwise(spans)):
        raise ArtifactError("The zip archive is broken.", why="Its members overlap.")
    return found


def _member(data: bytes, entry: zipfile.ZipInfo, central: int) -> Member:
    local = entry.header_offset
    if data[local : local + 4] != MAGIC or data[central : central + 4] != _CENTRAL or local + 30 > len(data):
        raise ArtifactError("The zip archive is broken.", why=f"The header of '{entry.filename}' is damaged.")
    if entry.flag_bits & 1:
        raise UnsupportedModelError("The archive is encrypted.", hint="Save it again with torch.save.")
    start = local + 30 + sum(struct.unpack_from("<2H", data, local + 26))
    stop = start + entry.file_size
    if entry.compress_size != entry.file_size or stop > len(data):
        raise ArtifactError("The zip archive is broken.", why=f"'{entry.filename}' is cut off.")
    behind = stop + 4 if data[stop : stop + 4] == _DESCRIPTOR else stop
    # A writer that learns the checksum at the end leaves it out in front and notes it behind the content.
    noted = (local + 14, behind) if entry.flag_bits & 8 else (local + 14,)
    checksum = struct.pack("<I", entry.CRC)
    return Member(start, stop, (central + 16, *(place for place in noted if data[place : place + 4] == checksum)))


def patched(data: bytes, changes: Mapping[int, bytes]) -> bytes:
    """The archive with other content of the same length in some places, and checksums to match.

    Args:
        data: The archive.
        changes: New bytes by their position in the file, each within one member.
    """
    copy = bytearray(data)
    for start, new in changes.items():
        copy[start : start + len(new)] = new
    for member in members(data).values():
        if any(member.start <= start < member.stop for start in changes):
            checksum = struct.pack("<I", zlib.crc32(memoryview(copy)[member.start : member.stop]))
            for place in member.checksums:
                copy[place : place + 4] = checksum
    return bytes(copy)


def rewritten(data: bytes, contents: Mapping[str, bytes]) -> bytes:
    """The archive with other contents, of any length, for some members; the others keep theirs, and their order.

    Contents begin at multiples of 64 bytes, as torch places them so that they can be mapped into memory.

    Args:
        data: The archive.
        contents: New contents by the names that ``members`` gives.
    """
    places = members(data)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for entry in sorted(entries(data)[0], key=lambda entry: entry.header_offset):
            name = entry.filename.partition("/")[2] or entry.filename
            info = zipfile.ZipInfo(entry.filename, entry.date_time)
            info.create_system, info.external_attr = entry.create_system, entry.external_attr
            before = buffer.tell() + 30 + len(entry.filename.encode()) + 4
            padding = -before % _ALIGNMENT
            info.extra = struct.pack("<2H", _PADDING, padding) + b"Z" * padding
            place = places[name]
            archive.writestr(info, contents.get(name, data[place.start : place.stop]))
            # The padding belongs before the content alone, not into the table of contents.
            info.extra = b""
    return buffer.getvalue()
