"""Operators that make constants, or pass a value on as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from backdoorscan.formats.building.batch import holds
from backdoorscan.formats.building.values import Const, Operand
from backdoorscan.formats.pt2.calls import NodeCall
from backdoorscan.formats.pt2.operators.shaping import expanded


def _identity(call: NodeCall) -> Operand:
    return call.operand("self")


def _copy(call: NodeCall) -> Operand:
    operand = call.operand("self")
    # What is done to the copy in place must not reach the original.
    return Const(operand.tensor.clone()) if isinstance(operand, Const) else operand


def _dropout(call: NodeCall) -> Operand:
    if call.arguments.get("train", True) is not False:
        raise call.unsupported("It is in training mode.", "Export the network in evaluation mode: model.eval().")
    return call.operand("input" if "input" in call.arguments else "self")


def _cast(call: NodeCall) -> Operand:
    operand = call.operand("self")
    wanted = call.operand("other").meta.dtype if "other" in call.arguments else None
    if call.arguments.get("dtype") is not None:
        wanted = call.dtype(call.arguments["dtype"])
    if wanted is None or wanted == operand.meta.dtype:
        return operand
    return call.one(torch.Tensor.to, operand, wanted)


def _full(call: NodeCall) -> Operand:
    value = call.arguments.get("fill_value", 1 if "ones" in call.node.target else 0)
    size, kind = call.integers("size"), call.arguments.get("dtype")
    if kind is not None:
        dtype = call.dtype(kind)
    elif "self" in call.arguments:
        dtype = call.operand("self").meta.dtype
    elif "fill_value" not in call.arguments or isinstance(value, float):
        dtype = torch.float32
    else:
        dtype = torch.bool if isinstance(value, bool) else torch.int64
    if not any(map(holds, size)):
        return call.one(torch.full, tuple(size), value, dtype=dtype)
    return expanded(call, Const(torch.tensor(value, dtype=dtype)), size)


OPERATORS: Mapping[str, Callable[[NodeCall], Any]] = {
    **dict.fromkeys(("alias", "contiguous", "detach", "lift_fresh", "positive"), _identity),
    **dict.fromkeys(("clone", "lift_fresh_copy"), _copy),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "native_dropout"), _dropout),
    **dict.fromkeys(("full", "zeros", "ones", "new_full", "new_zeros", "new_ones"), _full),
}
