"""Activations: by name, as a layer, and as a layer used by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from backdoorscan.formats.keras.calls import LayerCall, Value
from backdoorscan.formats.keras.modules import (
    ElementwisePReLU,
    Exponential,
    GeneralReLU,
    LegacyHardSigmoid,
    Squareplus,
)
from backdoorscan.formats.keras.spec import Fields

_BY_NAME: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "hard_swish": nn.Hardswish,
    "hard_silu": nn.Hardswish,
    "hard_tanh": nn.Hardtanh,
    "log_sigmoid": nn.LogSigmoid,
    "tanh_shrink": nn.Tanhshrink,
    "hard_shrink": nn.Hardshrink,
    "soft_shrink": nn.Softshrink,
    "squareplus": Squareplus,
    "exponential": Exponential,
}


def layer_activation(call: LayerCall, value: Value) -> Value:
    """What the setting ``activation`` of a layer adds: a module ``<layer>_activation``."""
    return activate(call, value, call.fields.raw("activation", "linear"), "_activation")


def activate(call: LayerCall, value: Value, function: Any, suffix: str = "") -> Value:
    """Add an activation given as Keras stores it: a name, or an object around a name or a layer."""
    if isinstance(function, dict):
        class_name, config = function.get("class_name"), function.get("config")
        if class_name == "function" or isinstance(config, str):
            function = config
        elif isinstance(config, dict) and isinstance(class_name, str) and class_name in _LAYER_MODULES:
            fields = Fields(call.fields.layer, class_name, config)
            return call.module(value, _LAYER_MODULES[class_name](fields, call, value), value.shape, suffix)
        elif isinstance(config, dict) and isinstance(class_name, str):
            function = class_name
    if not isinstance(function, str):
        raise call.fields.wrong("activation", "the name of an activation")
    name = function.lower()
    if name == "linear":
        return value
    if name in ("softmax", "log_softmax"):
        axis = call.dim(len(value.shape), len(value.shape))
        module: nn.Module = nn.Softmax(axis) if name == "softmax" else nn.LogSoftmax(axis)
    elif name == "hard_sigmoid":
        module = _hard_sigmoid(call)
    elif name in _BY_NAME:
        module = _BY_NAME[name]()
    else:
        raise call.fields.unsupported(f"Its activation '{function}' is custom code, or one that this reader lacks.")
    return call.module(value, module, value.shape, suffix)


def _hard_sigmoid(call: LayerCall) -> nn.Module:
    return nn.Hardsigmoid() if call.keras_major >= 3 else LegacyHardSigmoid()


def _optional(fields: Fields, key: str) -> float | None:
    return None if fields.raw(key) is None else fields.number(key)


def _relu(fields: Fields, call: LayerCall, value: Value) -> nn.Module:
    top, slope = _optional(fields, "max_value"), fields.number("negative_slope", 0.0)
    threshold = fields.number("threshold", 0.0)
    if threshold == 0 and top is None:
        return nn.LeakyReLU(slope) if slope else nn.ReLU()
    if threshold == 0 and slope == 0 and top is not None and top > 0:
        return nn.ReLU6() if top == 6 else nn.Hardtanh(0.0, top)
    return GeneralReLU(top, slope, threshold)


def _leaky_relu(fields: Fields, call: LayerCall, value: Value) -> nn.Module:
    # Keras 2 calls it alpha, Keras 3 negative_slope.
    return nn.LeakyReLU(fields.number("negative_slope", fields.number("alpha", 0.3)))


def _softmax(fields: Fields, call: LayerCall, value: Value) -> nn.Module:
    axes = fields.integers("axis", -1)
    if len(axes) != 1:
        raise call.fields.unsupported("Its softmax runs over several axes.")
    return nn.Softmax(call.dim(len(value.shape), call.axis(value, axes[0])))


_LAYER_MODULES: Mapping[str, Callable[[Fields, LayerCall, Value], nn.Module]] = {
    "ReLU": _relu,
    "LeakyReLU": _leaky_relu,
    "ThresholdedReLU": lambda fields, call, value: nn.Threshold(fields.number("theta", 1.0), 0.0),
    "ELU": lambda fields, call, value: nn.ELU(fields.number("alpha", 1.0)),
    "Softmax": _softmax,
}


def _layer(call: LayerCall, value: Value) -> Value:
    module = _LAYER_MODULES[call.fields.class_name](call.fields, call, value)
    return call.module(value, module, value.shape)


def _activation(call: LayerCall, value: Value) -> Value:
    function = call.fields.raw("activation")
    # Linear keeps a module too, so that the layer can be found by its name.
    return call.module(value, nn.Identity(), value.shape) if function == "linear" else activate(call, value, function)


def _prelu(call: LayerCall, value: Value) -> Value:
    shared = {call.axis(value, axis) for axis in call.fields.integers("shared_axes", [])}
    rank = len(value.shape)
    file_shape = tuple(1 if axis in shared else call.size(value, axis) for axis in range(1, rank + 1))
    order = sorted(range(rank), key=lambda index: call.dim(rank, index + 1))
    shape = tuple(file_shape[index] for index in order)
    per_channel = math.prod(shape) == shape[0]
    module = nn.PReLU(shape[0], device="meta") if per_channel else ElementwisePReLU(shape)
    result = call.module(value, module, value.shape)
    call.weight("weight", "alpha", file_shape, tuple(order), (shape[0],) if per_channel else shape)
    return result


LAYERS: Mapping[str, Callable[[LayerCall, Value], Value]] = {
    "Activation": _activation,
    "PReLU": _prelu,
    **dict.fromkeys(_LAYER_MODULES, _layer),
}
