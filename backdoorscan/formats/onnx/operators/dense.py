"""Matrix products: dense layers where one side is an array of the file, functions elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from backdoorscan.formats.building.values import Const, Operand, Value
from backdoorscan.formats.onnx.calls import NodeCall


def _linear(call: NodeCall, value: Value, weight: Const, bias: Const | None) -> Value:
    """``weight`` is (outputs, inputs)."""
    outputs, inputs = weight.shape
    if value.shape[-1] != inputs:
        raise call.unsupported(f"Its weights take {inputs} numbers, not {value.shape[-1]}.")
    module = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    return call.module(value, module, {"weight": weight} if bias is None else {"weight": weight, "bias": bias})


def _gemm(call: NodeCall) -> Operand:
    left, right, offset = call.operand(0), call.operand(1), call.optional(2)
    alpha, beta = call.number("alpha", 1.0), call.number("beta", 1.0)
    turned = bool(call.integer("transB", 0))
    if len(left.shape) != 2 or len(right.shape) != 2:
        raise call.unsupported("It multiplies what is no matrix.")
    flat = offset is None or (isinstance(offset, Const) and offset.shape in _bias_shapes(right, turned))
    plain = alpha == 1.0 and (beta == 1.0 or offset is None) and not call.integer("transA", 0)
    if plain and flat and isinstance(left, Value) and isinstance(right, Const):
        weight = right if turned else right.permuted((1, 0))
        if isinstance(offset, Const):
            return _linear(call, left, weight, offset.reshaped((weight.shape[0],)))
        return _linear(call, left, weight, call.bias_behind(weight.shape[0], 2, 1))
    if call.integer("transA", 0):
        left = call.call(torch.t, left)
    if turned:
        right = call.call(torch.t, right)
    product = call.call(torch.matmul, left, right)
    if alpha != 1.0:
        product = call.call(torch.mul, product, alpha)
    if offset is None:
        return product
    return call.call(torch.add, product, offset if beta == 1.0 else call.call(torch.mul, offset, beta))


def _bias_shapes(right: Operand, turned: bool) -> tuple[tuple[int, ...], ...]:
    """The shapes of a bias that gives every output one number."""
    outputs = right.shape[0 if turned else 1]
    return (outputs,), (1, outputs)


def _matmul(call: NodeCall) -> Operand:
    left, right = call.operand(0), call.operand(1)
    if isinstance(left, Value) and isinstance(right, Const) and len(right.shape) == 2 and len(left.shape) > 1:
        weight = right.permuted((1, 0))
        rank = len(left.shape)
        return _linear(call, left, weight, call.bias_behind(weight.shape[0], rank, rank - 1))
    return call.call(torch.matmul, left, right)


def _einsum(call: NodeCall) -> Operand:
    equation = call.text("equation", "")
    if len(equation) > 100:
        raise call.unsupported("Its equation is longer than any that networks use.")
    return call.call(torch.einsum, equation, *[call.operand(index) for index in range(len(call.operands))])


def _attention(call: NodeCall) -> Operand:
    """Scaled dot-product attention of tensors (batch, heads, sequence, features)."""
    query, key, value = (call.operand(index) for index in range(3))
    heads = call.integer("q_num_heads", 0) or call.integer("kv_num_heads", 0)
    more = any(call.optional(index) is not None for index in range(3, len(call.operands)))
    ranks = {len(operand.shape) for operand in (query, key, value)}
    if more or heads or ranks != {4} or query.shape[1] != key.shape[1] or call.number("softcap", 0.0):
        raise call.unsupported("It has a mask, a cache, or heads that are not an axis of their own.")
    options: dict[str, Any] = {"is_causal": bool(call.integer("is_causal", 0))}
    if "scale" in call.node.attributes:
        options["scale"] = call.number("scale", 0.0)
    return call.call(functional.scaled_dot_product_attention, query, key, value, **options)


OPERATORS: Mapping[str, Callable[[NodeCall], Operand]] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "Attention": _attention,
}
