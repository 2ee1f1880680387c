"""What every method is: a frozen dataclass whose fields are its options."""

from __future__ import annotations

import hashlib
import inspect
import math
import time
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import torch

from backdoorscan.errors import UnknownNameError, UsageError
from backdoorscan.findings import Examined
from backdoorscan.images import LabelledImages


def option(default: Any, *, help: str, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A field of a method that users can set.

    The one declaration serves ``-O method.name=value``, the configuration file, ``plugins show`` and the report.

    Args:
        default: Used when the user says nothing.
        help: One line.
        minimum: Smallest value allowed.
        maximum: Largest value allowed.
    """
    return field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True)
class OptionSpec:
    """An option as users meet it.

    Attributes:
        name: The field's name.
        type: Its annotation.
        default: Its default.
        help: One line.
        minimum: Smallest value allowed, or ``None``.
        maximum: Largest value allowed, or ``None``.
    """

    name: str
    type: Any
    default: Any
    help: str
    minimum: float | None
    maximum: float | None

    @property
    def type_name(self) -> str:
        """The type in words."""
        if typing.get_origin(self.type) is Literal:
            return "|".join(map(str, typing.get_args(self.type)))
        if typing.get_origin(self.type) is tuple:
            return f"{typing.get_args(self.type)[0].__name__}, ..."
        return getattr(self.type, "__name__", str(self.type)) if isinstance(self.type, type) else str(self.type)

    def _in_range(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        return (self.minimum is None or value >= self.minimum) and (self.maximum is None or value <= self.maximum)

    def parse(self, value: Any, owner: str) -> Any:
        """Turn what the user wrote (text, or a value from a configuration file) into the option's type.

        Raises:
            UsageError: It is of the wrong type or out of range.
        """
        parsed = _convert(self.type, value)
        if parsed is _INVALID or not all(map(self._in_range, parsed if isinstance(parsed, tuple) else (parsed,))):
            low = "" if self.minimum is None else f" from {self.minimum:g}"
            high = "" if self.maximum is None else f" to {self.maximum:g}"
            raise UsageError(
                f"{owner}.{self.name} = {value!r} is not valid.",
                why=f"It takes {self.type_name}{low}{high}: {self.help}",
                hint=f"The default is {self.default!r}.",
            )
        return parsed


_INVALID = object()


def _convert(kind: Any, value: Any) -> Any:
    """``value`` as ``kind``, or ``_INVALID``."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        results = [_convert(part, value) for part in typing.get_args(kind)]
        return next((r for r in results if r is not _INVALID), _INVALID)
    if typing.get_origin(kind) is Literal:
        return next((choice for choice in typing.get_args(kind) if str(choice) == str(value)), _INVALID)
    if kind is type(None):
        return None if value is None or value == "none" else _INVALID
    if kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(
            str(value).lower(), _INVALID
        )
    if typing.get_origin(kind) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            parts = [parts]
        results = [_convert(typing.get_args(kind)[0], part) for part in parts if part != ""]
        return _INVALID if _INVALID in results else tuple(results)
    if isinstance(value, bool) or kind not in (int, float, str):
        return _INVALID
    if kind is str:
        return value if isinstance(value, str) else _INVALID
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        return _INVALID
    if kind is int:
        return number if isinstance(value, str) or number == value else _INVALID
    return number if math.isfinite(number) else _INVALID


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published method with its options.

    A subclass is a frozen dataclass whose ``option`` fields are what users can set. Its docstring is what
    ``backdoorscan plugins show`` prints.

    Attributes:
        id: The name users type, in kebab-case.
        paper: Where it is published.
    """

    id: ClassVar[str]
    paper: ClassVar[str] = ""

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]

    @classmethod
    def options(cls) -> tuple[OptionSpec, ...]:
        """The options in the order they are declared."""
        hints = typing.get_type_hints(cls)
        return tuple(
            OptionSpec(f.name, hints[f.name], f.default, **f.metadata)
            for f in fields(cls)
            if f.init and f.default is not MISSING and "help" in f.metadata
        )

    @classmethod
    def configured(cls, settings: Mapping[str, Any]) -> Self:
        """An instance with some options set.

        Raises:
            UnknownNameError: An option that the method does not have.
            UsageError: A value of the wrong type or out of range.
        """
        known = {spec.name: spec for spec in cls.options()}
        for name in settings:
            if name not in known:
                raise UnknownNameError(f"option of {cls.id}", name, known)
        return cls(**{name: known[name].parse(value, cls.id) for name, value in settings.items()})

    def settings(self) -> dict[str, Any]:
        """The options with the values in force."""
        return {spec.name: getattr(self, spec.name) for spec in self.options()}


def _ignore(_fraction: float) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class Context:
    """What a method may know about the run it is part of.

    Attributes:
        seed: The run's seed. Methods draw random numbers only from ``generator``.
        labels: The labels to examine, or ``None`` for all.
        progress: Takes the part done, 0 to 1; costs nothing when nobody looks.
        poisoned: Known poisoned images, for repairs that learn from them, or ``None``.
        deadline: ``time.monotonic()`` at which the run has to end, or ``None``.
        earlier: What the detectors before this one found: id -> evidence and judgement.
    """

    seed: int = 0
    labels: tuple[int, ...] | None = None
    progress: Callable[[float], None] = _ignore
    poisoned: LabelledImages | None = None
    deadline: float | None = None
    earlier: Mapping[str, Examined] = field(default_factory=dict)

    def generator(self, *purpose: object) -> torch.Generator:
        """Random numbers for one purpose, the same whatever else runs before or beside it."""
        digest = hashlib.sha256(repr((self.seed, *purpose)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    @property
    def out_of_time(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline
