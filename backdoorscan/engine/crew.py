"""Tasks spread over processes: one that crashes its process takes no other with it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Generic, TypeVar

import torch

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")

Say = Callable[[Any], None]
"""Tells whoever spread the tasks something; plain data."""


@dataclass(frozen=True)
class Died:
    """What becomes of a task whose process ended before it.

    Attributes:
        why: In words.
    """

    why: str


@dataclass
class _Worker(Generic[Task]):
    """A process, the way to it, and the number of the task it works on."""

    process: Any
    pipe: connection.Connection
    task: int


def spread(
    work: Callable[[Shared, Task, Say], Result],
    shared: Shared,
    tasks: Sequence[Task],
    count: int,
    heard: Callable[[int, Any], None],
) -> Iterator[tuple[int, Result | Died]]:
    """Do the tasks in processes of their own, and yield the number and the result of each as it comes.

    Args:
        work: A function of a module, which does not raise.
        shared: What every task needs; each process gets a copy once.
        tasks: Plain data.
        count: Processes at a time, each with one computing thread.
        heard: Told the number of a task and what ``work`` said during it.
    """
    # Forked processes would inherit locks of threads that they do not have.
    spawning = multiprocessing.get_context("spawn")
    waiting = list(enumerate(tasks))[::-1]
    crew: dict[connection.Connection, _Worker[Task]] = {}

    def start() -> None:
        ours, theirs = spawning.Pipe()
        level = logging.getLogger("backdoorscan").getEffectiveLevel()
        process = spawning.Process(target=_serve, args=(theirs, work, shared, level))
        process.start()
        theirs.close()
        worker = crew[ours] = _Worker(process, ours, -1)
        give(worker)

    def give(worker: _Worker[Task]) -> None:
        if waiting:
            worker.task, task = waiting.pop()
            with suppress(OSError):  # it is dead: its pipe says so
                worker.pipe.send_bytes(pickle.dumps(task))
        else:
            del crew[worker.pipe]
            worker.pipe.close()
            worker.process.join()

    try:
        for _ in range(min(count, len(tasks))):
            start()
        while crew:
            for ready in connection.wait(list(crew)):
                worker = crew[ready]  # type: ignore[index]  # of its own pipes it returns some
                try:
                    is_result, message = pickle.loads(worker.pipe.recv_bytes())  # noqa: S301  # from a process of ours
                except (EOFError, OSError):
                    del crew[worker.pipe]
                    worker.process.join()
                    yield worker.task, Died(_ending(worker.process.exitcode))
                    if waiting:
                        start()
                    continue
                if is_result:
                    yield worker.task, message
                    give(worker)
                else:
                    heard(worker.task, message)
    finally:
        for worker in crew.values():
            worker.process.terminate()
        for worker in crew.values():
            worker.process.join()


def _serve(pipe: connection.Connection, work: Callable[[Any, Any, Say], Any], shared: Any, level: int) -> None:
    """Work on what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever spread the tasks
    sys.stdout = sys.stderr
    if level == logging.DEBUG:
        logging.basicConfig(stream=sys.stderr, format="%(message)s")
        logging.getLogger("backdoorscan").setLevel(level)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(is_result: bool, message: Any) -> None:
        pipe.send_bytes(pickle.dumps((is_result, message)))

    while True:
        try:
            task = pickle.loads(pipe.recv_bytes())  # noqa: S301  # from the process that started this one
            send(True, work(shared, task, lambda message: send(False, message)))
        except (EOFError, OSError):
            return


def _end_with_parent() -> None:
    """End this process when the one that spread the tasks has ended, however that came: nobody waits for an answer."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"Its process was ended by {signal.Signals(-code).name}."
    return f"Its process ended with {code}."
