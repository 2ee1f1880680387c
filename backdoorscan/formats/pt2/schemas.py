"""What PyTorch itself says of an ATen operator: its arguments, and which of them it shares or changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import BuiltinFunctionType
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

_TARGET = re.compile(r"torch\.ops\.aten\.(\w{1,60})\.(\w{1,60})", re.ASCII)
# In evaluation mode they hand on what they are given, which their schema does not say.
_PASSING = {"dropout", "feature_dropout", "alpha_dropout", "native_dropout"}


def split_target(target: str) -> tuple[str, str] | None:
    """Name and overload of an ATen operator, or ``None`` for any other target."""
    found = _TARGET.fullmatch(target)
    return (found[1], found[2]) if found else None


def overload(target: str) -> OpOverload | None:
    """The ATen operator of that name, or ``None`` where there is none."""
    names = split_target(target)
    packet = getattr(torch.ops.aten, names[0], None) if names else None
    found = getattr(packet, names[1], None) if names and isinstance(packet, OpOverloadPacket) else None
    return found if isinstance(found, OpOverload) else None


def changes(target: str) -> bool:
    """Whether the operator works in place: on its first argument."""
    found = overload(target)
    return found is not None and any(
        a.alias_info is not None and a.alias_info.is_write for a in found._schema.arguments
    )


def aliases(target: str) -> bool:
    """Whether the result may look at the memory of the first argument."""
    found, names = overload(target), split_target(target)
    shared = found is not None and any(result.alias_info is not None for result in found._schema.returns)
    return shared or (names is not None and names[0] in _PASSING)


def functional(name: str) -> str:
    """The name of the operator that makes a new tensor where this one works in place."""
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def python_function(found: OpOverload, name: str) -> Any:
    """``torch.relu`` for ``aten.relu``: what graphs usually have; the operator itself where torch has no such function.

    Functions that torch defines in Python may take other arguments, so they do not count.
    """
    plain = getattr(torch, name, None)
    return plain if isinstance(plain, BuiltinFunctionType) else found


def bind(found: OpOverload, named: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of a call; those in the middle that are left out get their defaults.

    Raises:
        TypeError: The operator has no such argument, or needs one more.
    """
    arguments = found._schema.arguments
    unknown = named.keys() - {argument.name for argument in arguments}
    if unknown:
        raise TypeError(f"it has no argument '{min(unknown)[:50]}'")
    positional: list[Any] = []
    plain = [argument for argument in arguments if not argument.kwarg_only]
    last = max((index for index, argument in enumerate(plain) if argument.name in named), default=-1)
    for argument in plain[: last + 1]:
        if argument.name not in named and not argument.has_default_value():
            raise TypeError(f"its argument '{argument.name}' is missing")
        positional.append(named.get(argument.name, argument.default_value))
    keywords = {
        argument.name: named[argument.name] for argument in arguments if argument.kwarg_only and argument.name in named
    }
    return positional, keywords
