"""Operations that stand in a graph without a layer: Keras 3's own, and those of tf.keras (TFOpLambda)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from backdoorscan.formats.keras.calls import LayerCall, Value
from backdoorscan.formats.keras.layers.activations import activate
from backdoorscan.formats.keras.layers.merging import broadcast_shape

Operation = Callable[[LayerCall, list[Any], Mapping[str, Any]], Value]


def _without(call: LayerCall, kwargs: Mapping[str, Any], *known: str) -> None:
    """Refuse arguments that would be dropped."""
    for key, value in kwargs.items():
        if key not in (*known, "name") and value is not None:
            raise call.fields.unsupported(f"It is called with {key}={str(value)[:60]}.")


def _operands(call: LayerCall, args: list[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Two operands, of which one may be a constant number; the second may be named."""
    operands = [*args, *(kwargs[key] for key in ("x", "x1", "y", "x2") if kwargs.get(key) is not None)]
    _without(call, kwargs, "x", "x1", "y", "x2")
    numbers = [item for item in operands if not isinstance(item, Value)]
    if len(operands) != 2 or len(numbers) > 1 or not all(_is_number(item) for item in numbers):
        raise call.fields.unsupported("It works on constants other than a single number.")
    return operands


def _is_number(item: Any) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool) and abs(item) < 1e38


def _arithmetic(function: Callable[..., Tensor]) -> Operation:
    def operation(call: LayerCall, args: list[Any], kwargs: Mapping[str, Any]) -> Value:
        operands = _operands(call, args, kwargs)
        values = [item for item in operands if isinstance(item, Value)]
        shape = broadcast_shape(call, values)
        if isinstance(operands[0], Value):
            # Functions of torch want a tensor first; Python's operators on tensors take numbers on either side.
            return call.function(function, *operands, shape=shape)
        if function is torch.sub:
            return call.function(torch.rsub, operands[1], operands[0], shape=shape)
        if function is torch.div:
            inverse = call.function(torch.reciprocal, operands[1], shape=shape)
            return call.function(torch.mul, inverse, operands[0], shape=shape)
        return call.function(function, operands[1], operands[0], shape=shape)

    return operation


def _only_value(call: LayerCall, args: list[Any]) -> Value:
    if len(args) != 1 or not isinstance(args[0], Value):
        raise call.fields.unsupported("It is not called with exactly one value.")
    return args[0]


def _limit(function: Callable[..., Tensor]) -> Operation:
    """Maximum or minimum of a value and a number or another value."""

    def operation(call: LayerCall, args: list[Any], kwargs: Mapping[str, Any]) -> Value:
        operands = _operands(call, args, kwargs)
        values = [item for item in operands if isinstance(item, Value)]
        shape = broadcast_shape(call, values)
        if len(values) == 2:
            return call.function(function, *operands, shape=shape)
        number = next(item for item in operands if not isinstance(item, Value))
        key = "min" if function is torch.maximum else "max"
        return call.function(torch.clamp, values[0], shape=shape, **{key: number})

    return operation


def _activation(name: str) -> Operation:
    def operation(call: LayerCall, args: list[Any], kwargs: Mapping[str, Any]) -> Value:
        _without(call, kwargs)
        return activate(call, _only_value(call, args), name)

    return operation


def _gelu(call: LayerCall, args: list[Any], kwargs: Mapping[str, Any]) -> Value:
    # keras.ops approximates unless told not to; tf.nn does not.
    default = call.fields.class_name == "Gelu"
    approximate = kwargs.get("approximate", call.fields.flag("approximate", default))
    _without(call, kwargs, "approximate")
    value = _only_value(call, args)
    return call.module(value, nn.GELU("tanh" if approximate else "none"), value.shape)


def _softmax(call: LayerCall, args: list[Any], kwargs: Mapping[str, Any]) -> Value:
    _without(call, kwargs, "axis")
    value = _only_value(call, args)
    axis = kwargs.get("axis")
    number = call.fields.integer("axis", -1) if axis is None else axis
    if not isinstance(number, int):
        raise call.fields.unsupported(f"It runs over the axes {str(number)[:60]}.")
    return call.module(value, nn.Softmax(call.dim(len(value.shape), call.axis(value, number))), value.shape)


def _leaky_relu(call: LayerCall, args: list[Any], kwargs: Mapping[str, Any]) -> Value:
    slope = kwargs.get("alpha", kwargs.get("negative_slope"))
    _without(call, kwargs, "alpha", "negative_slope")
    value = _only_value(call, args)
    slope = call.fields.number("negative_slope", 0.2) if slope is None else slope
    if not _is_number(slope):
        raise call.fields.unsupported("Its slope is not a number.")
    return call.module(value, nn.LeakyReLU(slope), value.shape)


def _reduction(function: Callable[..., Tensor]) -> Operation:
    """Mean or maximum over axes other than the batch."""

    def operation(call: LayerCall, args: list[Any], kwargs: Mapping[str, Any]) -> Value:
        _without(call, kwargs, "axis", "keepdims")
        value = _only_value(call, args)
        axes = kwargs.get("axis")
        axes = call.fields.integers("axis", []) if axes is None else axes if isinstance(axes, list) else [axes]
        keep = bool(kwargs.get("keepdims", call.fields.flag("keepdims", False)))
        if not axes or not all(isinstance(axis, int) for axis in axes):
            raise call.fields.unsupported("It reduces over the batch.")
        gone = {call.axis(value, axis) for axis in axes}
        sizes = list(enumerate(value.shape, start=1))
        kept = tuple(1 if axis in gone else size for axis, size in sizes)
        moved = call.to_file_order(value)
        shape = kept if keep else tuple(size for axis, size in sizes if axis not in gone)
        return call.from_file_order(call.function(function, moved, tuple(sorted(gone)), keep, shape=shape))

    return operation


def _cast(call: LayerCall, args: list[Any], kwargs: Mapping[str, Any]) -> Value:
    """To a floating-point type: nothing to do, as all values are float32."""
    _without(call, kwargs, "dtype")
    target = kwargs.get("dtype", call.fields.raw("dtype"))
    if target not in ("float16", "bfloat16", "float32", "float64"):
        raise call.fields.unsupported(f"It casts to {str(target)[:40]}.")
    return _only_value(call, args)


def _no_operation(call: LayerCall, args: list[Any], kwargs: Mapping[str, Any]) -> Value:
    _without(call, kwargs)
    return _only_value(call, args)


_NAMED = {
    "Relu": "relu",
    "Relu6": "relu6",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "Silu": "silu",
    "Selu": "selu",
    "HardSigmoid": "hard_sigmoid",
    "HardSilu": "hard_silu",
    "Mish": "mish",
    "Exp": "exponential",
}

_FUNCTIONS: Mapping[str, Operation] = {
    "math.add": _arithmetic(torch.add),
    "__operators__.add": _arithmetic(torch.add),
    "math.subtract": _arithmetic(torch.sub),
    "__operators__.sub": _arithmetic(torch.sub),
    "math.multiply": _arithmetic(torch.mul),
    "__operators__.mul": _arithmetic(torch.mul),
    "math.truediv": _arithmetic(torch.div),
    "math.divide": _arithmetic(torch.div),
    "realdiv": _arithmetic(torch.div),
    "math.maximum": _limit(torch.maximum),
    "math.minimum": _limit(torch.minimum),
    "math.reduce_mean": _reduction(torch.mean),
    "math.reduce_max": _reduction(torch.amax),
    "math.sigmoid": _activation("sigmoid"),
    "math.tanh": _activation("tanh"),
    "math.softplus": _activation("softplus"),
    "math.exp": _activation("exponential"),
    "nn.relu": _activation("relu"),
    "nn.relu6": _activation("relu6"),
    "nn.elu": _activation("elu"),
    "nn.selu": _activation("selu"),
    "nn.silu": _activation("silu"),
    "nn.leaky_relu": _leaky_relu,
    "nn.gelu": _gelu,
    "nn.softmax": _softmax,
    "cast": _cast,
    "identity": _no_operation,
    "stop_gradient": _no_operation,
}


def _tensorflow(call: LayerCall, args: list[Any], kwargs: Mapping[str, Any]) -> Value:
    function = call.fields.raw("function", call.fields.raw("node_def", ""))
    operation = _FUNCTIONS.get(function) if isinstance(function, str) else None
    if operation is None:
        raise call.fields.unsupported(f"It calls the TensorFlow function '{str(function)[:60]}'.")
    return operation(call, args, kwargs)


OPERATIONS: Mapping[str, Operation] = {
    "Add": _arithmetic(torch.add),
    "Subtract": _arithmetic(torch.sub),
    "Multiply": _arithmetic(torch.mul),
    "Divide": _arithmetic(torch.div),
    "TrueDivide": _arithmetic(torch.div),
    "Maximum": _limit(torch.maximum),
    "Minimum": _limit(torch.minimum),
    "Mean": _reduction(torch.mean),
    "Amax": _reduction(torch.amax),
    "Max": _reduction(torch.amax),
    "Gelu": _gelu,
    "LeakyRelu": _leaky_relu,
    "Cast": _cast,
    "StopGradient": _no_operation,
    "TFOpLambda": _tensorflow,
    **{class_name: _activation(name) for class_name, name in _NAMED.items()},
}
