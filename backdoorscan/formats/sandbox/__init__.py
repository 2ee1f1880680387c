"""The sandbox: every function that parses an untrusted file runs in a child process of its own.

    parsed = run_apart(parse, artifact.data, str(artifact.path), name=str(artifact.path))

* ``codec`` carries plain data between processes without pickle;
* ``helper`` is the process that children are forked from, so that each costs milliseconds;
* ``confine`` is what a child gives up before it meets the file.

A child has bounded memory, time and output, no files but those of the program's libraries, no network and no processes
(the last three as far as the system offers it). Whatever happens to it, the program goes on with one clear error.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from backdoorscan import errors
from backdoorscan.errors import ArtifactError
from backdoorscan.formats.sandbox import codec
from backdoorscan.formats.sandbox.limits import Limits

__all__ = ["Limits", "facts", "run_apart"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_START = "import sys; sys.path[:] = {path}; from backdoorscan.formats.sandbox.helper import serve; serve({control})"
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# A process with threads cannot be forked safely; onnxruntime starts some to report on its use.
_SETTINGS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ORT_DISABLE_TELEMETRY"), "1")
# Libraries of the system, and what some of them must read to start.
_SYSTEM = ("/usr/lib", "/lib", "/lib64", "/dev/urandom", "/proc/self/cmdline")
_HINT = "Do not use this file, unless you trust who made it and can have it made again."


def available() -> bool:
    """Whether this platform can run a child that is a copy of its parent; if not, files are read in this process."""
    return hasattr(os, "fork") and hasattr(socket, "send_fds")


def facts() -> dict[str, str]:
    """What a report should say of the sandbox: nothing where there is one."""
    return {} if available() else {"sandbox": "none: this platform has no fork; the file was read without one"}


def run_apart(function: Callable[[*Ts], T], *args: *Ts, name: str, limits: Limits | None = None) -> T:
    """Run a function that meets an untrusted file in a child process, and return what it returns.

    Args:
        function: Of a module's top level; the module must import no torch. It takes and returns plain data:
            see ``codec.write``. Of classes, those that the module defines or imports.
        args: Its arguments.
        name: What to call the file in errors.
        limits: What the child may use; by default in proportion to the arguments.

    Raises:
        BackdoorscanError: The function raised it.
        ArtifactError: The function failed otherwise, took too much of something, or returned no plain data.
    """
    if not available():
        return function(*args)
    returned: T = _HELPER.run(function, args, name, limits)
    return returned


class _Helper:
    """The process that children are forked from; started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()
        if available():
            os.register_at_fork(after_in_child=self._forget)
            atexit.register(self.stop)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], name: str, limits: Limits | None) -> Any:
        with _file() as given, _file() as result:
            codec.write(args, given)
            _seal(given)
            limits = limits or Limits.of(os.fstat(given).st_size)
            request = {
                "module": function.__module__,
                "function": function.__qualname__,
                "path": _path(),
                "readable": [*_path(), sys.prefix, sys.base_prefix, *_SYSTEM],
                "limits": asdict(limits),
            }
            code = self._ask(request, (given, result), limits.deadline)
            if code:
                raise _failure(code, name, limits)
            return _answer(result, function, name)

    def _ask(self, request: dict[str, Any], files: tuple[int, int], deadline: float) -> int:
        """The child's exit code, or -1 where it has not ended in time."""
        with self._lock:
            try:
                channel = self._started()
                channel.settimeout(deadline)
                line = json.dumps(request).encode() + b"\n"
                sent = socket.send_fds(channel, [line], files)
                channel.sendall(line[sent:])
                answer = channel.recv(1)
            except TimeoutError:
                self.stop()
                return -1
            except BaseException:  # also Ctrl-C: nothing may be left running, nor an answer be taken for another's
                self.stop()
                raise
            if not answer:
                self.stop()
                raise RuntimeError(f"the helper process of the sandbox ended when asked for {request['module']}")
            if answer[0] == 105:
                self.stop()
            return answer[0]

    def _started(self) -> socket.socket:
        if self._channel is None or self._process is None or self._process.poll() is not None:
            self.stop()
            self._channel, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603
                    [sys.executable, "-I", "-c", _START.format(path=_path(), control=theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=_SETTINGS | {key: os.environ[key] for key in _KEPT if key in os.environ},
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C is for this process, which then ends the other
                )
        return self._channel

    def stop(self) -> None:
        """End it, and with it the child that is running."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._channel = None

    def _forget(self) -> None:
        """Leave it to the process that this one was forked from."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.returncode = 0  # or Python would warn that nobody waits for it
        self._process = self._channel = None
        self._lock = threading.Lock()


_HELPER = _Helper()


@contextlib.contextmanager
def _file() -> Iterator[int]:
    """A file without a name, in memory where the system offers that."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("backdoorscan", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            yield file
        finally:
            os.close(file)
    else:
        with tempfile.TemporaryFile() as unnamed:
            yield unnamed.fileno()


def _seal(file: int) -> bool:
    """Let nobody change a file any more; whether that worked."""
    if not hasattr(os, "memfd_create"):
        return False
    import fcntl

    try:
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    except OSError:  # a process that the child left behind has it open for writing
        return False
    return True


def _path() -> list[str]:
    """Where modules are found, without the current folder: it may be the file's own."""
    package = str(Path(errors.__file__).parents[1])
    return list(dict.fromkeys([package, *(place for place in sys.path if Path(place).is_absolute())]))


def _answer(file: int, function: Callable[..., Any], name: str) -> Any:
    """What the child returned.

    Raises:
        BackdoorscanError: What it raised.
    """
    sealed = _seal(file)
    size = os.fstat(file).st_size
    # What is not sealed could change or shrink under a mapping of it.
    content = mmap.mmap(file, size, access=mmap.ACCESS_COPY) if sealed and size else bytearray(os.pread(file, size, 0))
    try:
        outcome = codec.read(memoryview(content), codec.plain_classes(sys.modules[function.__module__]))
    except codec.Malformed as error:
        raise _broken(name, f"It did not answer in a way that can be read: {error}.") from error
    match outcome:
        case ("value", value):
            return value
        case ("refused", str(kind), str(what), str(why), str(hint)):
            found = getattr(errors, kind, None)
            if isinstance(found, type) and issubclass(found, errors.BackdoorscanError):
                refusal = found.__new__(found)
                errors.BackdoorscanError.__init__(refusal, what, why=why, hint=hint)
                raise refusal
        case ("failed", str(why)):
            raise _broken(name, f"Its reader met what it does not expect: {why}.")
    raise _broken(name, "It did not answer in a way that can be read.")


def _broken(name: str, why: str) -> ArtifactError:
    return ArtifactError(f"{name} could not be read.", why=why, hint=_HINT)


def _failure(code: int, name: str, limits: Limits) -> ArtifactError:
    # The codes are those of ``helper``, which does not import where there is no fork.
    if code == -1:
        return _broken(name, f"Reading it took more than {limits.deadline:,.0f} s.")
    if code == 102:
        return _broken(name, f"Reading it took more than {limits.memory / 2**20:,.0f} MiB of memory.")
    if code == 103:
        return _broken(name, f"Reading it took more than {limits.seconds:,} s of processor time.")
    if code == 104:
        return _broken(name, f"What is in it takes more than {limits.output / 2**20:,.0f} MiB.")
    if code == 105:
        return _broken(name, "Reading it started other processes.")
    if code > 128:
        return _broken(name, f"Its reader crashed: {signal.strsignal(code - 128) or f'signal {code - 128}'}.")
    return _broken(name, "Its reader ended without an answer.")
