"""Figures as text, text that is safe to show, and the command line that repeats a run."""

from __future__ import annotations

import math
import shlex
import unicodedata
from collections.abc import Mapping, Sequence

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories of characters that change what is shown around them or are not shown: controls, bidi marks."""


def visible(text: str, *, lines: bool = False) -> str:
    r"""``text`` with control, direction and unpaired surrogate characters written as ``\x1b``, ``\u202e``.

    Paths, messages and file contents come from others; shown raw they could move the cursor or reverse the reading.

    Args:
        text: Anything.
        lines: Whether it may have several lines.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if unicodedata.category(character) not in _UNSEEN or (lines and character == "\n")
        else _escaped(character)
        for character in text
    )


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def number(value: object, form: str) -> str:
    """``value`` in the given format, or a dash where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return format(value, form)


def percent(rate: object) -> str:
    """A rate of 0 to 1 in per cent, or a dash."""
    return number(rate, ".2%")


def probability(value: object) -> str:
    """A p-value with two digits that matter."""
    return number(value, ".2g")


def plain(value: object, longest: int = 300) -> str:
    """Any scalar as text of at most ``longest`` characters."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def size(shape: object) -> str:
    """A shape as ``3×32×32``."""
    return "×".join(map(str, shape)) if isinstance(shape, Sequence) and not isinstance(shape, str) else plain(shape)


def feeding(model: Mapping[str, object]) -> str:
    """How the images were scaled before the model saw them."""
    span = model.get("input_range")
    if not isinstance(span, Sequence) or len(span) != 2:
        return "–"
    text = f"{number(span[0], 'g')}..{number(span[1], 'g')}"
    mean, std = _numbers(model.get("mean")), _numbers(model.get("std"))
    if mean:
        text += f", mean {mean}, std {std}"
    if model.get("input_range_found"):
        return text + " (found on the clean images)"
    return text + (" (assumed)" if model.get("input_range_assumed") else " (given)")


def _numbers(values: object) -> str:
    if not isinstance(values, Sequence) or isinstance(values, str):
        return ""
    return ",".join(number(value, "g") for value in values)


def command(
    verb: str,
    model: Mapping[str, object],
    images: Mapping[str, object] | None,
    poisoned: Mapping[str, object] | None,
    flags: Sequence[str],
    settings: Mapping[str, Mapping[str, object]],
) -> str:
    """The command line that repeats a run, one option per line.

    Args:
        verb: ``scan``, ``repair`` or ``evaluate``.
        model: Facts about the file.
        images: The clean images.
        poisoned: The poisoned images.
        flags: Options of the command, each a flag with its value.
        settings: Options of methods: id -> name -> value.
    """
    parts = [shlex.join(["backdoorscan", verb, _path(model.get("path", "MODEL"))])]
    if isinstance(model.get("arch"), str):
        parts.append(shlex.join(["--arch", str(model["arch"])]))
    if model.get("trusted"):
        parts.append("--trust")
    if images is not None and images.get("path", "DATA") is not None:
        parts.append(shlex.join(["--valid", str(images.get("path", "DATA"))]))
        if verb != "evaluate" and images.get("count"):
            parts.append(f"--limit {given_count(images)}")
    if poisoned is not None:
        parts.append(shlex.join(["--poisoned", str(poisoned.get("path", "DATA"))]))
    if model.get("input_range_found") is False:
        parts += _feeding_flags(model)
    parts += flags
    for identifier, options in settings.items():
        parts += [shlex.join(["-O", f"{identifier}.{name}={_value(value)}"]) for name, value in options.items()]
    return " \\\n  ".join(visible(part) for part in parts)


def given_count(images: Mapping[str, object]) -> int:
    """How many of a report's images the user gave; the others were made from the model."""
    count, made = images.get("count"), images.get("made", 0)
    return count - made if isinstance(count, int) and isinstance(made, int) else 0


def _feeding_flags(model: Mapping[str, object]) -> list[str]:
    flags = [
        (f"--{name.replace('_', '-')}", _numbers(model.get(name)))
        for name in ("input_range", "mean", "std")
        if model.get(name)
    ]
    return [shlex.join([flag, text]) for flag, text in flags if text]


def _path(path: object) -> str:
    """A path that cannot be taken for an option."""
    text = str(path)
    return f"./{text}" if text.startswith("-") else text


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def ranges(labels: Sequence[int]) -> str:
    """Labels as ``0-9,33``, the way ``--labels`` takes them."""
    runs: list[list[int]] = []
    for label in sorted(set(labels)):
        if runs and label == runs[-1][1] + 1:
            runs[-1][1] = label
        else:
            runs.append([label, label])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def finite_json(value: object) -> object:
    """``value`` without NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
