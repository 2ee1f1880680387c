"""What a process gives up before it meets a hostile file: memory, time, files, the network, other processes.

Limits of ``resource`` hold on every Unix. Namespaces and Landlock are there on most Linux systems, and are used where
they are.
"""

from __future__ import annotations

import ctypes
import os
import resource
import stat
import struct
import sys
from collections.abc import Iterable

from backdoorscan.formats.sandbox.limits import Limits

_LINUX = sys.platform == "linux"
_LIBC = ctypes.CDLL(None, use_errno=True) if _LINUX else None

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SIGKILL = 9
_NEW_USER, _NEW_IPC, _NEW_PID, _NEW_NET = 0x10000000, 0x08000000, 0x20000000, 0x40000000
_CAPABILITIES_VERSION = 0x20080522
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
# How many kinds of access to files each version of Landlock knows.
_FILE_ACCESSES = (0, 13, 14, 15, 15, 16)
_FIRST_WITH_NETWORK = 4
_OPEN_FILES = 64


def die_with_parent() -> None:
    """Be killed when the parent ends, which must have one thread: the system goes by that which forked."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def apart_from_others() -> bool:
    """Have the children that follow live in namespaces without a network and without other processes.

    The first child's end is the end of all others.

    Returns:
        Whether the system allows that.
    """
    if _LIBC is None:
        return False
    kinds = _NEW_NET | _NEW_IPC | _NEW_PID
    # Who may do it as he is keeps his rights, to read the program's own files; others need a namespace for users too.
    return bool(_LIBC.unshare(kinds) == 0 or _LIBC.unshare(kinds | _NEW_USER) == 0)


def confine(limits: Limits, readable: Iterable[str]) -> None:
    """Take the limits on; there is no way back.

    Args:
        limits: How much.
        readable: Folders of programs and their libraries, and single files, which may be read still.
    """
    used = _address_space()
    for kind, limit in (
        (resource.RLIMIT_AS, used + limits.memory),
        (resource.RLIMIT_FSIZE, limits.output),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, limits.threads),
        # The first ends it by a signal that tells what happened.
        (resource.RLIMIT_CPU, limits.seconds),
    ):
        hard = resource.getrlimit(kind)[1]
        wanted = limit + 1 if kind == resource.RLIMIT_CPU else limit
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (min(limit, most), most))
    if _LIBC is not None:
        _LIBC.unshare(_NEW_USER)
        _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _only_read(_LIBC, readable)
        nothing = struct.pack("=II", _CAPABILITIES_VERSION, 0), struct.pack("=6I", *[0] * 6)
        _LIBC.capset(*nothing)


def _address_space() -> int:
    """Bytes that this process has mapped already."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 2**30


def _only_read(libc: ctypes.CDLL, readable: Iterable[str]) -> None:
    """No access to files but to read some and those of some folders, and no TCP, where Landlock is at hand."""
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    accesses = (1 << _FILE_ACCESSES[min(version, len(_FILE_ACCESSES) - 1)]) - 1
    rules = struct.pack("=QQ", accesses, 3) if version >= _FIRST_WITH_NETWORK else struct.pack("=Q", accesses)
    ruleset = libc.syscall(_CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), 0)
    if ruleset < 0:
        return
    for path in readable:
        try:
            place = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        is_folder = stat.S_ISDIR(os.fstat(place).st_mode)
        rule = struct.pack("=Qi", _READ_FILE | _READ_FOLDER if is_folder else _READ_FILE, place)
        libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
        os.close(place)
    libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
