"""What a taken-over reader might do. Run in the sandbox by ``test_sandbox``, and nowhere else."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from backdoorscan.errors import UnknownNameError, UnsafeModelError

RESULT = 4
"""Where the sandbox expects the result: what a forger would write to."""


@dataclass(frozen=True)
class Point:
    x: int
    array: Any = None


@dataclass
class Loose:
    x: int


class Colour(Enum):
    RED = "red"


def same(value):
    return value


def environment():
    return dict(os.environ), sys.stdin.read()


def modules():
    return sorted(sys.modules)


def refuse():
    raise UnsafeModelError("what", why="why", hint="hint")


def refuse_name():
    raise UnknownNameError("layer", "Convv", ["Conv", "Dense"])


def fail():
    return {}["key"]


def allocate():
    held = []
    while True:
        held.append(b"x" * 2**24)


def allocate_array(count):
    return np.ones(count).sum()


def loop():
    while True:
        pass


def sleep():
    time.sleep(100)


def nest():
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


def segfault():
    ctypes.string_at(0)


def abort():
    os.abort()


def end():
    os._exit(0)


def leave():
    sys.exit(3)


def write_file(path):
    Path(path).write_text("written")


def read_file(path):
    return Path(path).read_text()


def remove_file(path):
    Path(path).unlink()


def connect(port):
    with socket.create_connection(("127.0.0.1", port), timeout=5) as channel:
        channel.sendall(b"secret")


def fork(path):
    if os.fork() == 0:
        os.setsid()
        time.sleep(0.5)
        Path(path).write_text("written")
        os._exit(0)


def run(command):
    return subprocess.run(command, check=True, capture_output=True).stdout


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def print_much():
    print("noise" * 1000, flush=True)
    os.write(2, b"noise")


def not_plain(kind):
    return {"function": same, "object": object(), "loose": Loose(1), "text array": np.array(["a"]), "type": int}[kind]


def forge(head, places, body, lengths=None):
    """Write a result of one's own and end at once."""
    head, places = (text.encode() if isinstance(text, str) else json.dumps(text).encode() for text in (head, places))
    sizes = lengths or (len(head), len(places))
    start = b"".join(size.to_bytes(8, "little") for size in sizes) + head + places
    os.pwrite(RESULT, start + bytes(-len(start) % 64) + body, 0)
    os._exit(0)
