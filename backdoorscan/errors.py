"""Every error a user can meet, as one tree.

    BackdoorscanError                  exit code 2: no trustworthy answer
    ├── UsageError                     an option, a value or a combination that cannot work
    │   └── UnknownNameError           a name nobody registered, with the nearest ones
    ├── ArtifactError                  a model file that cannot be opened or parsed
    │   ├── UnsupportedModelError      well-formed, but it holds something the reader lacks
    │   └── UnsafeModelError           refused: opening it would run code or read other files
    ├── ImagesError                    images or labels that cannot be used
    ├── ConventionError                no way to feed the images makes the model better than chance
    ├── PluginError                    a plugin that was asked for cannot be used
    │   └── MethodError                a detector or a repairer failed on this model
    ├── OutputError                    a result that cannot be written
    └── Interrupted                    exit code 130: the user pressed Ctrl-C, and the work can go on later

Each carries *what* happened, *why*, and a *hint* what to do. ``cli.main`` is the only place where one of
them becomes an exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What a pipeline reads. One table, for every command and every output format."""

    OK = 0
    """Clean; or repaired and verified."""
    FOUND = 1
    """A backdoor was found; or a repair left it in or broke its budget."""
    ERROR = 2
    """No trustworthy answer: usage, unreadable or unsafe file, a failed method, a bug."""
    INCONCLUSIVE = 3
    """Nothing applicable could be run, or the evidence lies between the thresholds."""
    INTERRUPTED = 130
    """Stopped by the user."""


class BackdoorscanError(Exception):
    """The root of the tree.

    Args:
        what: One line: what happened, naming the file, layer or option.
        why: One line: the reason, where it is not obvious from ``what``.
        hint: One line: what the user can do about it.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.ERROR

    what: str
    why: str
    hint: str

    def __init__(self, what: str, *, why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.hint = hint

    def __setattr__(self, name: str, value: object) -> None:
        # They quote names out of files that strangers made, which may hold escape codes and line ends.
        if name in ("what", "why", "hint"):
            value = "".join(
                character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(value)
            )
        super().__setattr__(name, value)

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.hint) if part)


class UsageError(BackdoorscanError):
    """An option, a value or a combination of options that cannot work."""


class UnknownNameError(UsageError):
    """A name that nobody registered, with the nearest known ones.

    Args:
        kind: What the name should have been, e.g. ``"detector"``.
        name: The name as the user typed it.
        known: All names of that kind.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind = kind
        self.name = name
        self.known = sorted(known)
        near = difflib.get_close_matches(name, self.known, n=1, cutoff=0.5)
        hint = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(self.known) or 'none'}."
        super().__init__(f"There is no {kind} '{name}'.", hint=hint)


class ArtifactError(BackdoorscanError):
    """A model file that is missing, unreadable or broken."""


class UnsupportedModelError(ArtifactError):
    """A well-formed model that holds something its reader cannot represent exactly."""


class UnsafeModelError(ArtifactError):
    """A model file that was refused because opening it would run code from it or read other files."""


class ImagesError(BackdoorscanError):
    """Images or labels that are missing, malformed or do not fit the model."""


class ConventionError(BackdoorscanError):
    """No way of feeding the clean images makes the model better than chance."""


class PluginError(BackdoorscanError):
    """A plugin that was asked for cannot be loaded or used."""


class MethodError(PluginError):
    """A detector or a repairer that failed on this model."""


class OutputError(BackdoorscanError):
    """A result that could not be written."""


class Interrupted(BackdoorscanError):
    """Stopped by the user, with what is done so far kept."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERRUPTED
