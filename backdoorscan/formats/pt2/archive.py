"""The zip archive around an exported program, as PyTorch writes it: plain members, one folder, nothing compressed."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from backdoorscan.errors import ArtifactError, UnsafeModelError

ZIP_MAGIC = b"PK\x03\x04"
_AGAIN = "Download or copy the file again."
_MAX_MEMBERS = 100_000
_MAX_NAME = 4096
_DESCRIPTOR_FLAG = 8
_ENCRYPTED_FLAG = 1


@dataclass(frozen=True)
class Member:
    """One file in the archive.

    Attributes:
        header: Where its local header starts.
        entry: Where its entry in the table of contents starts.
        start: Where its bytes start.
        size: How many they are.
        crc: Their checksum.
        described: Whether the checksum stands behind the bytes, not in the local header.
    """

    header: int
    entry: int
    start: int
    size: int
    crc: int
    described: bool


@dataclass(frozen=True)
class Archive:
    """The members of an archive by their name inside its one folder.

    Attributes:
        data: The whole file.
        members: Where each member is.
    """

    data: bytes = field(repr=False)
    members: Mapping[str, Member] = field(repr=False)

    def read(self, name: str) -> memoryview:
        """The bytes of a member, whose checksum is right.

        Raises:
            ArtifactError: It is missing or damaged.
        """
        member = self.members.get(name)
        if member is None:
            raise ArtifactError(f"The archive lacks '{name}'.", hint=_AGAIN)
        content = memoryview(self.data)[member.start : member.start + member.size]
        if zlib.crc32(content) != member.crc:
            raise ArtifactError(f"'{name}' in the archive is damaged.", why="Its checksum is wrong.", hint=_AGAIN)
        return content


def open_archive(data: bytes) -> Archive:
    """Read the table of contents.

    Another reader must not find other contents in the file than this one, so what is ambiguous is refused: names that
    differ in case only, local headers that contradict the table of contents, members that overlap, bytes before the
    archive or a comment behind it.

    Raises:
        ArtifactError: It is broken.
        UnsafeModelError: It is made to mislead or to exhaust.
    """
    try:
        # zipfile looks the table up and reads its 64-bit fields; it never gets to read a member.
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            infos, entry, comment = file.infolist(), file.start_dir, file.comment
        members: dict[str, Member] = {}
        roots: set[str] = set()
        if len(infos) > _MAX_MEMBERS or comment or not infos:
            raise _misleading(f"It has {len(infos):,} members and a comment of {len(comment)} bytes.")
        for info in infos:
            name_size, extra_size, comment_size = struct.unpack_from("<HHH", data, entry + 28)
            raw = data[entry + 46 : entry + 46 + name_size]
            root, _, name = _name(info, raw).partition("/")
            roots.add(root)
            if name in members:
                raise _misleading(f"It has two members '{name[:100]}'.")
            members[name] = _member(data, info, entry, raw)
            entry += 46 + name_size + extra_size + comment_size
    except (zipfile.BadZipFile, struct.error, ValueError, OSError, NotImplementedError, OverflowError) as error:
        raise ArtifactError("The zip archive is broken.", why=str(error), hint=_AGAIN) from error
    if len({name.casefold() for name in members}) < len(members) or len(roots) != 1:
        raise _misleading("Its members' names are ambiguous.")
    end = 0
    for member in sorted(members.values(), key=lambda member: member.header):
        if member.header < end:
            raise _misleading("Its members overlap.")
        end = member.start + member.size
    if min(member.header for member in members.values()) != 0:
        raise _misleading("There is something before its first member.")
    return Archive(data, members)


def _name(info: zipfile.ZipInfo, raw: bytes) -> str:
    name = raw.decode("utf-8")
    parts = name.split("/")
    printable = name.isprintable() and "\\" not in name and len(name) <= _MAX_NAME
    if not printable or len(parts) < 2 or not all(part not in ("", ".", "..") for part in parts) or ":" in parts[0]:
        raise _misleading(f"A member is called {info.orig_filename[:100]!r}.")
    return name


def _member(data: bytes, info: zipfile.ZipInfo, entry: int, raw: bytes) -> Member:
    magic, flags, method, name_size, extra_size = struct.unpack_from("<4s2xHH16xHH", data, info.header_offset)
    start = info.header_offset + 30 + name_size + extra_size
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or flags & _ENCRYPTED_FLAG:
        raise _misleading("Its members are compressed or encrypted, which torch.export.save never does.")
    if data[entry : entry + 4] != b"PK\x01\x02" or magic != ZIP_MAGIC or start + info.file_size > len(data):
        raise zipfile.BadZipFile("its table of contents does not fit its members")
    named = info.header_offset + 30
    if data[named : named + name_size] != raw or flags != info.flag_bits or method != info.compress_type:
        raise _misleading(f"A member calls itself otherwise than '{raw.decode()[:100]}', as which it is listed.")
    return Member(info.header_offset, entry, start, info.file_size, info.CRC, bool(flags & _DESCRIPTOR_FLAG))


def _misleading(why: str) -> UnsafeModelError:
    return UnsafeModelError(
        "The archive was refused: it is not as PyTorch writes them.", why=why, hint="Do not use this file."
    )


def replaced(archive: Archive, contents: Mapping[str, bytes]) -> bytes:
    """A copy in which members have other bytes of the same number; everything else is as it was.

    Args:
        archive: The original.
        contents: New bytes by the members' names.

    Raises:
        ArtifactError: The archive keeps a checksum where this writer does not find it.
    """
    copy = bytearray(archive.data)
    for name, content in contents.items():
        member = archive.members[name]
        if len(content) != member.size:
            raise ArtifactError(f"'{name}' cannot change its size from {member.size} to {len(content)} bytes.")
        places = [member.entry + 16, member.header + 14]
        end = member.start + member.size
        if member.described:
            signed = copy[end : end + 4] == b"PK\x07\x08"
            places[1] = end + 4 if signed else end
        for place in places:
            if copy[place : place + 4] != struct.pack("<I", member.crc):
                raise ArtifactError(f"The checksum of '{name}' is not where a zip archive has it.", hint=_AGAIN)
            copy[place : place + 4] = struct.pack("<I", zlib.crc32(content))
        copy[member.start : end] = content
    return bytes(copy)
