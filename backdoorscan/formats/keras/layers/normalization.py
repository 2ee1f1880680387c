"""Normalisation layers with weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from backdoorscan.formats.keras.calls import LayerCall, Value

_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}


def _affine(call: LayerCall, module: nn.Module, file_shape: tuple[int, ...]) -> None:
    """Scale and offset where the layer has them; what it lacks must not become a weight."""
    if call.fields.flag("scale", True):
        call.weight("weight", "gamma", file_shape)
    else:
        module.register_parameter("weight", None)
    if call.fields.flag("center", True):
        call.weight("bias", "beta", file_shape)
    else:
        module.register_parameter("bias", None)


def _only_axis(call: LayerCall, value: Value) -> int:
    axes = call.fields.integers("axis", -1)
    if len(axes) != 1:
        raise call.fields.unsupported(f"It normalises over the axes {axes}.")
    return call.axis(value, axes[0])


def _on_axis(call: LayerCall, value: Value, axis: int, module: nn.Module) -> Value:
    """Call a module that wants its channels in the second place."""
    dim = call.dim(len(value.shape), axis)
    if dim == 1:
        return call.module(value, module, value.shape)
    moved = call.module(call.method(value, "transpose", 1, dim), module, value.shape)
    return call.method(moved, "transpose", 1, dim)


def _batch_normalization(call: LayerCall, value: Value) -> Value:
    axis = _only_axis(call, value)
    if len(value.shape) not in _BATCH_NORMS:
        raise call.fields.unsupported(f"Its input has the shape {value.shape}.")
    size = call.size(value, axis)
    # Keras says how much of the old average stays, torch how much of the new one comes in.
    momentum = 1 - call.fields.number("momentum", 0.99)
    epsilon = call.fields.number("epsilon", 1e-3)
    module = _BATCH_NORMS[len(value.shape)](size, eps=epsilon, momentum=momentum, device="meta")
    _affine(call, module, (size,))
    call.weight("running_mean", "moving_mean", (size,), trainable=False)
    call.weight("running_var", "moving_variance", (size,), trainable=False)
    return _on_axis(call, value, axis, module)


def _layer_normalization(call: LayerCall, value: Value) -> Value:
    rank = len(value.shape)
    axes = sorted({call.axis(value, axis) for axis in call.fields.integers("axis", -1)})
    if axes != list(range(axes[0], rank + 1)) or call.fields.flag("rms_scaling", False):
        raise call.fields.unsupported(f"It normalises over the axes {axes} of {value.shape}.")
    shape = [call.size(value, axis) for axis in axes]
    module = nn.LayerNorm(shape, eps=call.fields.number("epsilon", 1e-3), device="meta")
    _affine(call, module, tuple(shape))
    return call.from_file_order(call.module(call.to_file_order(value), module, value.shape))


def _group_normalization(call: LayerCall, value: Value) -> Value:
    axis = _only_axis(call, value)
    size, groups = call.size(value, axis), call.fields.integer("groups", 32)
    groups = size if groups == -1 else groups
    if groups < 1 or size % groups:
        raise call.fields.unsupported(f"{size} channels do not divide into {groups} groups.")
    module = nn.GroupNorm(groups, size, eps=call.fields.number("epsilon", 1e-3), device="meta")
    _affine(call, module, (size,))
    return _on_axis(call, value, axis, module)


LAYERS: Mapping[str, Callable[[LayerCall, Value], Value]] = {
    "BatchNormalization": _batch_normalization,
    "BatchNormalizationV1": _batch_normalization,
    "BatchNormalizationV2": _batch_normalization,
    "SyncBatchNormalization": _batch_normalization,
    "LayerNormalization": _layer_normalization,
    "GroupNormalization": _group_normalization,
}
