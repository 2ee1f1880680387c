"""Scaling that is part of a model; its constants are buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backdoorscan.formats.keras.calls import LayerCall, Value
from backdoorscan.formats.keras.modules import Normalize, Rescale
from backdoorscan.formats.keras.spec import Fields


def _numbers(fields: Fields, key: str, default: Any) -> Tensor:
    """A setting that is a number or (nested) lists of them, as a tensor."""
    value = fields.raw(key, default)
    if isinstance(value, dict):
        # Serialised arrays and scalars: {"class_name": "__numpy__", "config": {"value": …}} or {"value": …}.
        inner = value.get("config", value)
        value = inner.get("value") if isinstance(inner, dict) else None
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        raise fields.wrong(key, "a number or a list of numbers") from None
    return torch.from_numpy(array.copy())


def _along_last(call: LayerCall, value: Value, numbers: Tensor) -> Tensor:
    """One number, or one for each entry of the file's last axis, ready to broadcast."""
    rank = len(value.shape)
    if numbers.numel() == 1:
        return numbers.reshape(())
    if numbers.ndim != 1 or numbers.numel() != value.shape[-1]:
        raise call.fields.unsupported(f"Its constants have the shape {tuple(numbers.shape)}.")
    shape = [1] * (rank + 1)
    shape[call.dim(rank, rank)] = -1
    return numbers.reshape(shape)


def _rescaling(call: LayerCall, value: Value) -> Value:
    scale = _along_last(call, value, _numbers(call.fields, "scale", 1.0))
    offset = _along_last(call, value, _numbers(call.fields, "offset", 0.0))
    return call.module(value, Rescale(scale, offset), value.shape)


def _normalization(call: LayerCall, value: Value) -> Value:
    axes = [] if "axis" in call.fields.values and call.fields.raw("axis") is None else call.fields.integers("axis", -1)
    if len(axes) > 1:
        raise call.fields.unsupported(f"It keeps the axes {axes} apart.")
    axis = call.axis(value, axes[0]) if axes else 0
    shape = (call.size(value, axis),) if axes else ()
    dim = call.dim(len(value.shape), axis)
    invert = call.fields.flag("invert", False)
    if call.fields.raw("mean") is None:
        empty = torch.empty(shape, device="meta")
        result = call.module(value, Normalize(empty, torch.empty_like(empty), dim, invert), value.shape)
        call.weight("mean", "mean", shape, trainable=False)
        call.weight("variance", "variance", shape, trainable=False)
        return result
    constants = []
    for key in ("mean", "variance"):
        numbers = _numbers(call.fields, key, 1.0)
        if numbers.numel() not in (1, *shape):
            raise call.fields.unsupported(f"Its constants have the shape {tuple(numbers.shape)}.")
        constants.append(numbers.reshape(-1 if numbers.numel() > 1 else ()))
    return call.module(value, Normalize(constants[0], constants[1], dim, invert), value.shape)


LAYERS: Mapping[str, Callable[[LayerCall, Value], Value]] = {
    "Rescaling": _rescaling,
    "Normalization": _normalization,
}
