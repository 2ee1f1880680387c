"""Operators with weights, which become layers; with weights that are computed they stay functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from backdoorscan.formats.building.values import Const, Value
from backdoorscan.formats.pt2.calls import NodeCall

_TRAINING = "Export the network in evaluation mode: model.eval()."
_CONVOLUTIONS: Mapping[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED: Mapping[int, type[nn.Module]] = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
_NORMS: Mapping[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _is_const(*tensors: Any) -> bool:
    return all(tensor is None or isinstance(tensor, Const) for tensor in tensors)


def _convolution(call: NodeCall) -> Any:
    value, weight, bias = call.operand("input"), call.operand("weight"), call.arguments.get("bias")
    rank = len(weight.shape)
    transposed = "transpose" in call.node.target or call.arguments.get("transposed") is True
    plain = isinstance(value, Value) and len(value.shape) == rank and rank in _CONVOLUTIONS
    if not plain or not isinstance(weight, Const) or not _is_const(bias):
        return call.plain()
    padding: Any = call.arguments.get("padding", 0)
    padding = padding if isinstance(padding, str) else _sizes(call, "padding", 0, rank - 2)
    groups = call.integer("groups", 1)
    settings: dict[str, Any] = {
        "kernel_size": weight.shape[2:],
        "stride": _sizes(call, "stride", 1, rank - 2),
        "padding": padding,
        "dilation": _sizes(call, "dilation", 1, rank - 2),
        "groups": groups,
        "bias": bias is not None,
        "device": "meta",
    }
    if transposed:
        settings["output_padding"] = _sizes(call, "output_padding", 0, rank - 2)
        module = _TRANSPOSED[rank](weight.shape[0], weight.shape[1] * groups, **settings)
    else:
        module = _CONVOLUTIONS[rank](weight.shape[1] * groups, weight.shape[0], **settings)
    return call.module(value, module, {"weight": weight, "bias": bias})  # type: ignore[arg-type]


def _sizes(call: NodeCall, name: str, default: int, count: int) -> tuple[int, ...]:
    value = call.integers(name) if name in call.arguments else [default]
    value = value * count if len(value) == 1 else value
    if len(value) != count:
        raise call.unsupported(f"Its argument '{name}' is {value}.")
    return tuple(value)


def _dense(call: NodeCall, value: Any, weight: Any, bias: Any) -> Any:
    """``weight`` is (outputs, inputs)."""
    fits = isinstance(value, Value) and isinstance(weight, Const) and _is_const(bias) and len(weight.shape) == 2
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        return call.plain()
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return call.module(value, module, {"weight": weight, "bias": bias})


def _linear(call: NodeCall) -> Any:
    return _dense(call, call.operand("input"), call.operand("weight"), call.arguments.get("bias"))


def _addmm(call: NodeCall) -> Any:
    right = call.operand("mat2")
    if isinstance(right, Const) and call.arguments.get("alpha", 1) == call.arguments.get("beta", 1) == 1:
        return _dense(call, call.operand("mat1"), right.permuted((1, 0)), call.operand("self"))
    return call.plain()


def _mm(call: NodeCall) -> Any:
    left, right = call.operand("self"), call.arguments.get("mat2", call.arguments.get("other"))
    if isinstance(right, Const) and len(right.shape) == 2 and len(left.shape) > 1:
        return _dense(call, left, right.permuted((1, 0)), None)
    return call.plain()


def _batch_norm(call: NodeCall) -> Any:
    value, names = call.operand("input"), ("weight", "bias", "running_mean", "running_var")
    tensors = {name: call.arguments.get(name) for name in names}
    if call.arguments.get("training", "no_training" not in call.node.target) or tensors["running_mean"] is None:
        raise call.unsupported("It is in training mode.", _TRAINING)
    if not isinstance(value, Value) or len(value.shape) not in _NORMS or not _is_const(*tensors.values()):
        return call.plain()
    affine = tensors["weight"] is not None
    if affine != (tensors["bias"] is not None):
        raise call.unsupported("It has a scale without an offset, or the other way round.")
    epsilon, momentum = float(call.arguments.get("eps", 1e-5)), float(call.arguments.get("momentum", 0.1))
    module = _NORMS[len(value.shape)](value.shape[1], epsilon, momentum, affine=affine, device="meta").eval()
    return _first(call, call.module(value, module, tensors))


def _layer_norm(call: NodeCall) -> Any:
    value, shape = call.operand("input"), tuple(call.integers("normalized_shape"))
    weight, bias = call.arguments.get("weight"), call.arguments.get("bias")
    epsilon = float(call.arguments.get("eps", 1e-5))
    if not isinstance(value, Value) or not _is_const(weight, bias) or weight is None:
        return _first(call, call.call(functional.layer_norm, value, shape, weight, bias, epsilon))
    module = nn.LayerNorm(shape, epsilon, bias=bias is not None, device="meta")
    return _first(call, call.module(value, module, {"weight": weight, "bias": bias}))


def _group_norm(call: NodeCall) -> Any:
    value, weight, bias = call.operand("input"), call.arguments.get("weight"), call.arguments.get("bias")
    groups = call.integer("num_groups" if "num_groups" in call.arguments else "group", 0)
    epsilon = float(call.arguments.get("eps", 1e-5))
    if not isinstance(value, Value) or groups < 1 or not _is_const(weight, bias) or weight is None or bias is None:
        return _first(call, call.call(functional.group_norm, value, groups, weight, bias, epsilon))
    module = nn.GroupNorm(groups, value.shape[1], epsilon, device="meta")
    return _first(call, call.module(value, module, {"weight": weight, "bias": bias}))


def _first(call: NodeCall, result: Any) -> Any:
    """Decomposed operators return what training needs too; nothing uses it in evaluation."""
    return [result, *[None] * (len(call.node.outputs) - 1)]


def _attention(call: NodeCall) -> Any:
    if float(call.arguments.get("dropout_p", 0.0)) != 0.0:
        raise call.unsupported("It is in training mode.", _TRAINING)
    names = {"attn_mask", "is_causal", "scale", "enable_gqa"}
    options = {name: value for name, value in call.arguments.items() if name in names and value is not None}
    query, key, value = (call.operand(name) for name in ("query", "key", "value"))
    return _first(call, call.call(functional.scaled_dot_product_attention, query, key, value, **options))


def _softmax(call: NodeCall) -> Any:
    return call.call(torch.softmax, call.operand("self"), call.integer("dim", -1))


def _log_softmax(call: NodeCall) -> Any:
    return call.call(torch.log_softmax, call.operand("self"), call.integer("dim", -1))


OPERATORS: Mapping[str, Callable[[NodeCall], Any]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("mm", "matmul"), _mm),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), _layer_norm),
    **dict.fromkeys(("group_norm", "native_group_norm"), _group_norm),
    **dict.fromkeys(("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"), _attention),
    "_softmax": _softmax,
    "_log_softmax": _log_softmax,
}
