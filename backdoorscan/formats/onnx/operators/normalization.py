"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional

from backdoorscan.formats.building.values import Operand, Value
from backdoorscan.formats.onnx.calls import NodeCall

_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def _value(call: NodeCall) -> Value:
    value = call.operand(0)
    if not isinstance(value, Value):
        raise call.unsupported("Its input does not depend on the image.")
    return value


def _batch_normalization(call: NodeCall) -> Operand:
    value = _value(call)
    if call.integer("training_mode", 0) or not call.integer("spatial", 1) or len(value.shape) not in _BATCH_NORMS:
        raise call.unsupported(
            "It is in training mode, or normalises every position by itself.",
            "Export the network in evaluation mode: model.eval().",
        )
    # ONNX says how much of the old average stays, torch how much of the new one comes in.
    momentum, epsilon = 1 - call.number("momentum", 0.9), call.number("epsilon", 1e-5)
    module = _BATCH_NORMS[len(value.shape)](value.shape[1], epsilon, momentum, device="meta").eval()
    names = ("weight", "bias", "running_mean", "running_var")
    return call.module(value, module, {name: call.constant(index + 1) for index, name in enumerate(names)})


def _instance_normalization(call: NodeCall) -> Operand:
    value = _value(call)
    if len(value.shape) not in _INSTANCE_NORMS:
        raise call.unsupported(f"Its input has {len(value.shape)} axes.")
    module = _INSTANCE_NORMS[len(value.shape)](
        value.shape[1], call.number("epsilon", 1e-5), affine=True, device="meta"
    ).eval()
    return call.module(value, module, {"weight": call.constant(1), "bias": call.constant(2)})


def _layer_normalization(call: NodeCall) -> Operand:
    value = _value(call)
    axis = call.axis(call.integer("axis", -1), len(value.shape))
    shape = value.shape[axis:]
    epsilon, tensors = call.number("epsilon", 1e-5), {"weight": call.constant(1)}
    if call.optional(2) is not None:
        tensors["bias"] = call.constant(2)
    if all(const.shape == shape for const in tensors.values()):
        return call.module(value, nn.LayerNorm(shape, epsilon, bias="bias" in tensors, device="meta"), tensors)
    normal = call.call(functional.layer_norm, value, shape, eps=epsilon)
    scaled = call.call(torch.mul, normal, tensors["weight"])
    return call.call(torch.add, scaled, tensors["bias"]) if "bias" in tensors else scaled


def _group_normalization(call: NodeCall) -> Operand:
    value, groups = _value(call), call.integer("num_groups", 0)
    if groups < 1 or value.shape[1] % groups or call.opset < 21:
        raise call.unsupported("Its groups do not divide its channels, or share their scales.")
    module = nn.GroupNorm(groups, value.shape[1], call.number("epsilon", 1e-5), device="meta")
    return call.module(value, module, {"weight": call.constant(1), "bias": call.constant(2)})


def _local_response(call: NodeCall) -> Operand:
    size = call.integer("size", 0)
    if size < 1:
        raise call.unsupported(f"It looks at {size} channels.")
    alpha, beta, bias = call.number("alpha", 1e-4), call.number("beta", 0.75), call.number("bias", 1.0)
    return call.call(functional.local_response_norm, _value(call), size, alpha, beta, bias)


def _lp_normalization(call: NodeCall) -> Operand:
    value = _value(call)
    axis = call.axis(call.integer("axis", -1), len(value.shape))
    return call.call(functional.normalize, value, float(call.integer("p", 2)), axis)


OPERATORS: Mapping[str, Callable[[NodeCall], Operand]] = {
    "BatchNormalization": _batch_normalization,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "GroupNormalization": _group_normalization,
    "LRN": _local_response,
    "LpNormalization": _lp_normalization,
}
