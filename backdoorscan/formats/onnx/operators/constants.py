"""Operators that give constants, or pass a value on as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from backdoorscan.formats.building.batch import BATCH, Images, holds
from backdoorscan.formats.building.values import Const, Operand, Origin, Value, to_tensor
from backdoorscan.formats.onnx.calls import NodeCall
from backdoorscan.formats.onnx.tensors import FLOATS, INTEGERS, decode


def _constant(call: NodeCall) -> Operand:
    attributes = call.node.attributes
    if "value" in attributes:
        name = call.node.outputs[0]
        return Const(to_tensor(decode(attributes["value"].t, name, call.builder.parsed.size)), Origin(name))
    if "value_int" in attributes:
        return Const(torch.tensor(call.integer("value_int", 0)))
    if "value_float" in attributes:
        return Const(torch.tensor(call.number("value_float", 0.0)))
    if "value_ints" in attributes:
        return Const(torch.tensor(call.integers("value_ints"), dtype=torch.int64))
    if "value_floats" in attributes:
        return Const(to_tensor(np.array(attributes["value_floats"].floats, dtype=np.float32)))
    raise call.unsupported("It holds neither numbers nor an array of them.")


def expanded(call: NodeCall, operand: Operand, shape: list[int]) -> Operand:
    """Broadcast to a shape, which may hold the number of images."""
    rank = max(len(shape), len(operand.shape))
    target = [1] * (rank - len(shape)) + shape
    own = [1] * (rank - len(operand.shape)) + list(operand.shape)
    sizes: list[int | Images] = []
    for wanted, size in zip(target, own, strict=True):
        if wanted in (1, size) or (size == BATCH and wanted == call.builder.parsed.input.batch):
            sizes.append(Images(size // BATCH) if holds(size) and isinstance(operand, Const) else size)
        elif size == 1:
            sizes.append(Images(wanted // BATCH) if holds(wanted) else wanted)
        else:
            raise call.unsupported(f"It broadcasts {list(operand.shape)} to {shape}.")
    if isinstance(operand, Value):
        sizes = [-1 if isinstance(size, int) and holds(size) else size for size in sizes]
        if all(size in (-1, before) for size, before in zip(sizes, own, strict=True)) and rank == len(operand.shape):
            return operand
    return call.call(torch.broadcast_to, operand, tuple(sizes))


def _expand(call: NodeCall) -> Operand:
    shape = call.numbers(1)
    if shape is None or any(size < 0 for size in shape):
        raise call.unsupported(f"It broadcasts to {shape}.")
    return expanded(call, call.operand(0), shape)


def _constant_of_shape(call: NodeCall) -> Operand:
    shape = call.numbers(0)
    if shape is None or any(size < 0 for size in shape):
        raise call.unsupported(f"It makes an array of the shape {shape}.")
    value = torch.zeros(())
    if "value" in call.node.attributes:
        value = to_tensor(decode(call.node.attributes["value"].t, str(call.node), 1)).reshape(())
    return expanded(call, Const(value), shape)


def _shape(call: NodeCall) -> Operand:
    shape = call.operand(0).shape
    start, end = call.integer("start", 0), call.integer("end", len(shape))
    return Const(torch.tensor(shape[start:end], dtype=torch.int64))


def _size(call: NodeCall) -> Operand:
    return Const(torch.tensor(call.operand(0).meta.numel()))


def _range(call: NodeCall) -> Operand:
    start, limit, delta = (call.constant(index).tensor for index in range(3))
    if any(part.numel() != 1 for part in (start, limit, delta)) or delta.item() == 0:
        raise call.unsupported("It does not count from one number to another.")
    exact = [part.reshape(()).item() for part in (start, limit, delta)]
    dtype = torch.int64 if all(isinstance(number, int) for number in exact) else torch.float32
    meta = torch.arange(*exact, dtype=dtype, device="meta")
    call.builder.limits.fold(call.node, meta, [])
    return Const(torch.arange(*exact, dtype=dtype))


def _cast(call: NodeCall) -> Operand:
    operand, kind = call.operand(0), call.integer("to", 0)
    is_float, is_integer = operand.meta.is_floating_point(), operand.meta.dtype == torch.int64
    if (kind in FLOATS and is_float) or (kind in INTEGERS and is_integer):
        return operand
    if kind in FLOATS:
        # The only images of whole numbers are inputs in uint8, which the network takes as floats already.
        return call.call(torch.Tensor.to, operand, torch.float32)
    if kind in INTEGERS:
        return call.call(torch.Tensor.to, operand, torch.int64)
    if kind == 9:
        return call.call(torch.ne, operand, 0)
    raise call.unsupported(f"It converts to the element type {kind}.")


def _identity(call: NodeCall) -> Operand:
    return call.operand(0)


def _dropout(call: NodeCall) -> Operand:
    if call.optional(2) is not None and bool(call.constant(2).tensor.any()):
        raise call.unsupported("It is in training mode.", "Export the network in evaluation mode: model.eval().")
    return call.operand(0)


OPERATORS: Mapping[str, Callable[[NodeCall], Operand]] = {
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Shape": _shape,
    "Size": _size,
    "Range": _range,
    "Cast": _cast,
    "CastLike": _identity,
    "Identity": _identity,
    "Dropout": _dropout,
}
