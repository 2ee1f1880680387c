"""The sandbox of conversions: helper processes of their own, which may have torch in them, and wider limits."""

from __future__ import annotations

import os
import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from backdoorscan.errors import UnsafeModelError
from backdoorscan.formats import sandbox
from backdoorscan.formats.sandbox import Limits

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# One per module: no library meets another's.
_HELPERS: defaultdict[str, sandbox._Helper] = defaultdict(sandbox._Helper)


def convert_apart(function: Callable[[*Ts], bytes], *args: *Ts, name: str, size: int) -> bytes:
    """Run a conversion in the sandbox.

    Args:
        function: Of a module's top level; the sandbox imports that module before it limits itself.
        args: Its arguments: plain data.
        name: What to call the file in errors.
        size: Bytes of the file.

    Raises:
        UnsafeModelError: This platform has no sandbox.
        BackdoorscanError: The function raised it.
        ArtifactError: The conversion failed otherwise, or took too much of something.
    """
    if not sandbox.available():
        raise UnsafeModelError(
            f"{name} was not converted.",
            why="That runs code from the file, and this platform has no sandbox for it.",
            hint="Convert it to ONNX or .pt2 yourself where you trust it, or use Linux or macOS.",
        )
    plain = Limits.of(size)
    # Running and tracing a network takes many times what reading it does.
    limits = Limits(10 * plain.seconds, 2 * plain.memory, 2**28 + 2 * size, 10 * plain.deadline, threads=256)
    converted = _HELPERS[function.__module__].run(function, args, name, limits)
    if not isinstance(converted, bytes):
        raise UnsafeModelError(f"{name}: what its conversion returned is no file.", hint="Do not use this file.")
    return converted


def confinement() -> str:
    """What code in the sandbox cannot reach on this system, found out by trying there."""
    files, network = sandbox.run_apart(_within_reach, name="the sandbox")
    lacking = [what for what, reached in (("files of the user", files), ("the network", network)) if reached]
    return f"within reach of the file's code: {', '.join(lacking)}" if lacking else "no files, no network"


def _within_reach() -> tuple[bool, bool]:
    """Whether files and networks can be reached from here."""
    try:
        os.scandir("/").close()
        files = True
    except OSError:
        files = False
    return files, any(name != "lo" for _, name in socket.if_nameindex())


@contextmanager
def findable(folder: Path | None) -> Iterator[None]:
    """Have the modules in a folder found, in the sandbox too, behind those of all others."""
    if folder is None:
        yield
        return
    place = str(folder)
    sys.path.append(place)
    try:
        yield
    finally:
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(place)]
