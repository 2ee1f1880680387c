"""What libraries need in order to be loaded in the sandbox."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def somewhere() -> Iterator[None]:
    """Stand in a folder that exists: MKL does not load from one that is gone, as that of the sandbox is."""
    try:
        Path.cwd()
    except FileNotFoundError:
        # Where the sandbox already holds, nothing may be opened to read.
        here = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))
        os.chdir("/")
        try:
            yield
        finally:
            os.fchdir(here)
            os.close(here)
    else:
        yield


def without_drawing() -> None:
    """Have Keras go on without Matplotlib, which is not to be imported where it has nowhere to keep its fonts."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
