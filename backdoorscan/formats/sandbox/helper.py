"""The process that children are forked from: it has imported the readers, and nothing of the user's.

Where the system allows it, it is the first process of a namespace, so that nothing a hostile file starts outlives it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import mmap
import os
import select
import signal
import socket
import sys
import tempfile
from typing import Any, NoReturn

from backdoorscan.errors import BackdoorscanError
from backdoorscan.formats.sandbox import codec
from backdoorscan.formats.sandbox.confine import apart_from_others, confine, die_with_parent
from backdoorscan.formats.sandbox.limits import Limits

CRASHED, NO_MEMORY, NO_TIME, NO_ROOM, LEFT_OTHERS = 101, 102, 103, 104, 105
"""What is answered where the child returned nothing; from 128 on: the signal that killed it."""

_ARGUMENTS, _RESULT = 3, 4
_MAX_FILE = 2**16


def serve(control: int) -> NoReturn:
    """Answer requests until the program on the other end is gone.

    Args:
        control: A stream socket. A request is a line of JSON with two file descriptors: the arguments, and where the
            result goes. The answer is one byte: 0 for a result.
    """
    _go_nowhere()
    if apart_from_others():
        if first := os.fork():
            os.close(control)
            os.waitpid(first, 0)
            os._exit(0)
        die_with_parent()
    with socket.socket(fileno=control) as channel:
        while True:
            _answer(channel)


def _go_nowhere() -> None:
    """Leave the user's folder for one that is gone: empty, and nothing can be put into it."""
    try:
        os.chdir(folder := tempfile.mkdtemp())
        os.rmdir(folder)  # noqa: PTH106
    except OSError:  # nothing can be written anywhere
        os.chdir("/")


def _answer(channel: socket.socket) -> None:
    line = b""
    files: list[int] = []
    while not line.endswith(b"\n"):
        received, more, _, _ = socket.recv_fds(channel, 2**16, 2)
        if not received:
            os._exit(0)
        line, files = line + received, files + more
    request = json.loads(line)
    sys.path[:] = request["path"]
    # Read once, here: the children that follow find it in place.
    importlib.import_module(request["module"])
    gc.freeze()
    child, ended = _start(request, *files)
    if channel.fileno() in select.select([channel.fileno(), ended], [], [])[0]:
        os.killpg(child, signal.SIGKILL)
        os._exit(0)
    os.close(ended)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # while its number is still its own
    _, status = os.waitpid(child, 0)
    for file in files:
        os.close(file)
    if _has_children():
        code = LEFT_OTHERS
    elif not os.WIFSIGNALED(status):
        code = os.WEXITSTATUS(status)
    elif os.WTERMSIG(status) == signal.SIGXCPU:
        code = NO_TIME
    else:
        code = 128 + os.WTERMSIG(status)
    channel.sendall(bytes([code]))


def _start(request: dict[str, Any], arguments: int, result: int) -> tuple[int, int]:
    """A child that meets the file, and a pipe that closes when it ends."""
    ended, held = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os._exit(_work(request, arguments, result, held))
        finally:
            os._exit(CRASHED)
    os.close(held)
    return child, ended


def _has_children() -> bool:
    """Whether the first process of a namespace has inherited what its last child started."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _work(request: dict[str, Any], arguments: int, result: int, held: int) -> int:
    """Meet the file."""
    os.setsid()
    die_with_parent()
    limits = Limits(**request["limits"])
    nothing = os.open(os.devnull, os.O_RDWR)
    # Copies first: the numbers may overlap.
    kept = [os.dup(file) for file in (nothing, nothing, nothing, arguments, result, held)]
    for place, file in enumerate(kept):
        os.dup2(file, place)
    os.closerange(len(kept), _MAX_FILE)
    module = importlib.import_module(request["module"])
    confine(limits, request["readable"])
    try:
        outcome = _outcome(module, request["function"])
        try:
            codec.write(outcome, _RESULT)
        except (TypeError, ValueError, RecursionError) as error:
            codec.write(_failed(error), _RESULT)
    except MemoryError:
        return NO_MEMORY
    except OSError:
        return NO_ROOM
    return 0


def _outcome(module: Any, function: str) -> tuple[Any, ...]:
    """What the function returns or raises, with a word that says which."""
    try:
        content = memoryview(mmap.mmap(_ARGUMENTS, 0, access=mmap.ACCESS_COPY))
        values = codec.read(content, codec.plain_classes(module))
        return "value", getattr(module, function)(*values)
    except BackdoorscanError as error:
        return "refused", type(error).__name__, error.what, error.why, error.hint
    except MemoryError:
        raise
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> tuple[str, str]:
    return "failed", f"{type(error).__name__}: {str(error)[:300]}"
