"""Architectures by their names in timm and torchvision, made to fit the file: its classes and its channels."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from backdoorscan.errors import UsageError
from backdoorscan.formats.weights.contents import StateDict
from backdoorscan.formats.weights.names import fits

ZOOS = ("timm", "torchvision")
"""What may stand before the colon in place of a file or a package."""

_SHOWN = 5
# Declares what torchvision's compiled part would bring, for as long as the process lives.
_declared: list[torch.library.Library] = []


def build(zoo: str, name: str, states: Sequence[StateDict], fixed: Mapping[str, Any]) -> nn.Module:
    """Build a network of timm or torchvision without its published weights.

    Args:
        zoo: One of ``ZOOS``.
        name: The network's name there, e.g. ``"resnet18"``.
        states: What the file holds: the number of classes and of input channels are taken from the state dict that
            fits the network best.
        fixed: Other settings to build it with.

    Raises:
        UsageError: The package is not installed, or has no such network.
    """
    make = _timm(name) if zoo == "timm" else _torchvision(name, states)
    network = make(dict(fixed))
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    found = fits(states, shapes, {})[0].shapes
    head, first = _head(network), _first(network)
    classes = found.get(head, shapes[head])[0]
    channels = found.get(first, shapes[first])[1:2] if first else ()
    settings = dict(fixed)
    if classes != shapes[head][0]:
        settings["num_classes"] = classes
    widened = bool(channels) and channels != shapes[first][1:2]
    if widened and zoo == "timm":
        settings["in_chans"] = channels[0]
    if settings != fixed:
        network = make(settings)
    if widened and zoo == "torchvision":
        _widen(network, first, channels[0])
    return network


def _head(network: nn.Module) -> str:
    """The weight of the last layer."""
    return [f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]


def _first(network: nn.Module) -> str:
    """The weight of the first convolution, or an empty name."""
    return next((f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)), "")


def _widen(network: nn.Module, weight: str, channels: int) -> None:
    """Let the first convolution take another number of channels, as people do by hand; the file has its weights."""
    owner, _, leaf = weight.removesuffix(".weight").rpartition(".")
    holder = network.get_submodule(owner)
    layer: Any = holder.get_submodule(leaf)
    wide = nn.Conv2d(
        channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
    )
    setattr(holder, leaf, wide)


def _timm(name: str) -> Callable[[dict[str, Any]], nn.Module]:
    timm = _import("timm")
    # A plain name only: timm would download for one such as "hf-hub:user/model".
    if not re.fullmatch(r"\w+(\.\w+)?", name, re.ASCII) or not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return lambda settings: _made(f"timm:{name}", lambda: timm.create_model(name, pretrained=False, **settings))


def _torchvision(name: str, states: Sequence[StateDict]) -> Callable[[dict[str, Any]], nn.Module]:
    models = _import("torchvision").models
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    fixed: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        # They start with slow random weights and with side branches that many files leave out.
        branches = any("aux" in key.lower() for state in states for key in state.tensors)
        fixed |= {"init_weights": False, "aux_logits": branches}
    return lambda settings: _made(f"torchvision:{name}", lambda: models.get_model(name, **fixed, **settings))


def _made(arch: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except Exception as error:  # somebody else's code, which may refuse sizes in any way
        raise UsageError(f"--arch {arch} fails.", why=f"{type(error).__name__}: {error}") from error


def _unknown(zoo: str, name: str, known: Sequence[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, n=_SHOWN, cutoff=0.5)
    hint = f"Did you mean {', '.join(near)}?" if near else f"See the list of models in the documentation of {zoo}."
    return UsageError(f"{zoo} has no classifier '{name}'.", hint=hint)


def _import(package: str) -> ModuleType:
    """Import timm or torchvision.

    Raises:
        UsageError: It is not installed, or is broken.
    """
    try:
        import_torchvision()
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--arch {package}: needs the package {error.name}.",
            hint=f"Install it: pip install 'backdoorscan[{package}]'.",
        ) from error
    except Exception as error:
        raise UsageError(
            f"The package {package} cannot be imported.",
            why=f"{type(error).__name__}: {error}",
            hint="Install builds of torch and torchvision that belong together.",
        ) from error


def import_torchvision() -> ModuleType:
    """Import torchvision, even a build whose compiled part does not fit this torch.

    That of PyPI is built for CUDA: beside a torch for CPUs its operators are missing, and the import fails over one
    of them, although no classifier needs any.

    Raises:
        ImportError: It is not installed.
        RuntimeError: It is broken in another way.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        return importlib.import_module("torchvision")
