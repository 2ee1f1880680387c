"""Activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from backdoorscan.formats.building.values import Const, Operand, Value
from backdoorscan.formats.onnx.calls import NodeCall
from backdoorscan.formats.onnx.operators.shaping import flattened, reshape_to


def _plain(function: Callable[[Tensor], Tensor]) -> Callable[[NodeCall], Operand]:
    return lambda call: call.call(function, call.operand(0))


def _leaky_relu(call: NodeCall) -> Operand:
    return call.call(functional.leaky_relu, call.operand(0), call.number("alpha", 0.01))


def _elu(call: NodeCall) -> Operand:
    return call.call(functional.elu, call.operand(0), call.number("alpha", 1.0))


def _celu(call: NodeCall) -> Operand:
    return call.call(functional.celu, call.operand(0), call.number("alpha", 1.0))


def _selu(call: NodeCall) -> Operand:
    """ELU times a constant; the usual ones are torch's own."""
    alpha, scale = call.number("alpha", 1.67326319217681884765625), call.number("gamma", 1.05070102214813232421875)
    return call.call(torch.mul, call.call(functional.elu, call.operand(0), alpha), scale)


def _hard_sigmoid(call: NodeCall) -> Operand:
    alpha, beta = call.number("alpha", 0.2), call.number("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return call.call(functional.hardsigmoid, call.operand(0))
    line = call.call(torch.add, call.call(torch.mul, call.operand(0), alpha), beta)
    return call.call(torch.clamp, line, 0.0, 1.0)


def _gelu(call: NodeCall) -> Operand:
    return call.call(functional.gelu, call.operand(0), approximate=call.text("approximate", "none"))


def _swish(call: NodeCall) -> Operand:
    alpha = call.number("alpha", 1.0)
    if alpha == 1.0:
        return call.call(functional.silu, call.operand(0))
    gate = call.call(torch.sigmoid, call.call(torch.mul, call.operand(0), alpha))
    return call.call(torch.mul, call.operand(0), gate)


def _thresholded_relu(call: NodeCall) -> Operand:
    return call.call(functional.threshold, call.operand(0), call.number("alpha", 1.0), 0.0)


def _limit(call: NodeCall, key: str, index: int) -> float | None:
    if call.opset < 11:
        return call.number(key, math.nan) if key in call.node.attributes else None
    if call.optional(index) is None:
        return None
    bound = call.constant(index).tensor
    if bound.numel() != 1:
        raise call.unsupported("Its bounds are no single numbers.")
    return float(bound)


def _clip(call: NodeCall) -> Operand:
    low, high = _limit(call, "min", 1), _limit(call, "max", 2)
    if low is None and high is None:
        return call.operand(0)
    return call.call(torch.clamp, call.operand(0), low, high)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """PReLU with a slope that broadcasts against ``x``."""
    return torch.where(x >= 0, x, slope * x)


def _prelu(call: NodeCall) -> Operand:
    value, slope = call.operand(0), call.constant(1)
    if not isinstance(value, Value):
        return call.call(prelu, value, slope)
    channels = value.shape[1] if len(value.shape) > 1 else 1
    each = (channels, *[1] * (len(value.shape) - 2))
    if slope.shape in (each, (1, *each)) or slope.tensor.numel() == 1:
        count = slope.tensor.numel()
        return call.module(value, nn.PReLU(count, device="meta"), {"weight": slope.reshaped((count,))})
    return call.call(prelu, value, slope)


def _softmax(function: Callable[..., Tensor]) -> Callable[[NodeCall], Operand]:
    def operator(call: NodeCall) -> Operand:
        value = call.operand(0)
        rank = len(value.shape)
        axis = call.axis(call.integer("axis", 1 if call.opset < 13 else -1), rank)
        if call.opset >= 13 or axis == rank - 1 or isinstance(value, Const):
            return call.call(function, value, dim=axis)
        # Until opset 12 all axes from this one on count as one.
        flat = call.call(function, flattened(call, value, axis), dim=1)
        return reshape_to(call, flat, value.shape)

    return operator


OPERATORS: Mapping[str, Callable[[NodeCall], Operand]] = {
    "Relu": _plain(functional.relu),
    "Sigmoid": _plain(torch.sigmoid),
    "Tanh": _plain(torch.tanh),
    "Softplus": _plain(functional.softplus),
    "Softsign": _plain(functional.softsign),
    "HardSwish": _plain(functional.hardswish),
    "Mish": _plain(functional.mish),
    "LeakyRelu": _leaky_relu,
    "Elu": _elu,
    "Celu": _celu,
    "Selu": _selu,
    "HardSigmoid": _hard_sigmoid,
    "Gelu": _gelu,
    "Swish": _swish,
    "ThresholdedRelu": _thresholded_relu,
    "Clip": _clip,
    "PRelu": _prelu,
    "Softmax": _softmax(functional.softmax),
    "LogSoftmax": _softmax(functional.log_softmax),
}
