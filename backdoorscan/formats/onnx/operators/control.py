"""``If``: both branches become part of the network, and every image gets the values of the one it chooses.

The file's condition is one for a batch. Images are read one by one here, as what a classifier says of an image must
not depend on those beside it; the comparison with onnxruntime runs files with one image at a time for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from backdoorscan.formats.building.values import Const, Operand, Value
from backdoorscan.formats.onnx.calls import NodeCall


def _if(call: NodeCall) -> list[Operand]:
    condition = call.operand(0)
    if isinstance(condition, Const):
        if condition.tensor.numel() != 1:
            raise call.unsupported("Its condition is no single truth value.")
        return call.branch("then_branch" if bool(condition.tensor) else "else_branch")
    if condition.meta.numel() != condition.shape[0] or not call.one_by_one:
        raise call.unsupported("Its condition is not one for every image.")
    both = zip(call.branch("then_branch"), call.branch("else_branch"), strict=True)
    return [_chosen(call, condition, yes, no) for yes, no in both]


def _chosen(call: NodeCall, condition: Value, yes: Operand, no: Operand) -> Operand:
    singles = {operand.single for operand in (yes, no) if isinstance(operand, Value)} or {True}
    if len(singles) != 1:
        raise call.unsupported("Its branches give a value for one image and one for many.")
    (single,) = singles
    rank = max(len(operand.shape) + (single and isinstance(operand, Const)) for operand in (yes, no))
    for_each = call.call(torch.reshape, condition, (-1, *[1] * (rank - 1)))
    result = call.call(torch.where, for_each, yes, no)
    return Value(result.node, result.meta, single=single) if isinstance(result, Value) else result


OPERATORS: Mapping[str, Callable[[NodeCall], list[Operand]]] = {"If": _if}
