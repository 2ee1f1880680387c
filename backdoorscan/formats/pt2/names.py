"""Names in the network: those of the file wherever a module can have them."""

from __future__ import annotations

import keyword
import re
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

_RESERVED = set(dir(fx.GraphModule(nn.Module(), fx.Graph()))) | {"x"}
_WEIGHT = re.compile(r"(.+?)[._](?:weight|running_mean|running_var)", re.DOTALL)
_MAX_DEPTH = 16
_MAX_PART = 100

Item = TypeVar("Item", bound=nn.Module | Tensor)


def layer_name(tensor: str) -> str:
    """The name of the layer that a tensor such as ``"layer1.0.conv1.weight"`` belongs to."""
    found = _WEIGHT.fullmatch(tensor)
    return found[1] if found else tensor


def attach(root: nn.Module, wanted: str, item: nn.Module | Tensor) -> str:
    """Put a layer or a tensor into the tree of modules, and return the name that it got there.

    Names come from the file: parts that no attribute can have, or that would hide one of the module's own, are changed.

    Args:
        root: The tree.
        wanted: A dotted name.
        item: A module, a parameter, or a tensor that becomes a buffer.
    """
    parts = [_plain(part) for part in wanted.split(".")]
    if len(parts) > _MAX_DEPTH:
        parts = ["_".join(parts)[:_MAX_PART]]
    place, path = root, []
    for part in parts[:-1]:
        part = part if part in place._modules else _free(place, part)
        if part not in place._modules:
            place.add_module(part, nn.Module())
        place = place.get_submodule(part)
        path.append(part)
    leaf = _free(place, parts[-1])
    if isinstance(item, nn.Module):
        place.add_module(leaf, item)
    elif isinstance(item, nn.Parameter):
        place.register_parameter(leaf, item)
    else:
        place.register_buffer(leaf, item)
    return ".".join([*path, leaf])


def _plain(part: str) -> str:
    plain = re.sub(r"[^0-9A-Za-z_]+", "_", part[:_MAX_PART]) or "_"
    return f"{plain}_" if plain in _RESERVED or keyword.iskeyword(plain) else plain


def _free(place: nn.Module, part: str) -> str:
    name, number = part, 1
    while hasattr(place, name):
        name, number = f"{part}_{number}", number + 1
    return name


def counter(stored: Tensor | None) -> Tensor:
    """How many batches a normalisation layer has seen, which inference never reads."""
    return torch.tensor(0) if stored is None else stored
