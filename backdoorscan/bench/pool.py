"""Work in several processes, each with one compute thread."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def run_all(function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[T]:
    """The results of ``function(*each)`` in the order of ``arguments``, computed as they are read or ahead.

    Args:
        function: Of a module, so that another process finds it.
        arguments: One tuple per call.
        jobs: Processes; with 1 everything runs in this one.

    Raises:
        Exception: Whatever ``function`` raises; work that was not begun is dropped.
    """
    if jobs == 1 or len(arguments) < 2:
        yield from (function(*each) for each in arguments)
        return
    # A fresh interpreter: a fork of a process in which torch has computed can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(function, *each) for each in arguments]
        try:
            yield from (future.result() for future in futures)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
