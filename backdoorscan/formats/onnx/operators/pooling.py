"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backdoorscan.formats.building.values import Operand, Value
from backdoorscan.formats.onnx.calls import NodeCall
from backdoorscan.formats.onnx.operators.convolution import Window, padded, window

_MAXIMUM = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def _window(call: NodeCall) -> tuple[Value, Window, bool]:
    value = call.operand(0)
    if not isinstance(value, Value) or not 3 <= len(value.shape) <= 5:
        raise call.unsupported("Its input is no batch of images with channels.")
    return value, window(call, value, None), bool(call.integer("ceil_mode", 0))


def _fits(slide: Window) -> bool:
    """Whether torch's own padding serves: the same on both sides, and at most half a window."""
    return slide.symmetric and all(2 * pad <= size for pad, size in zip(slide.before, slide.kernel, strict=True))


def _max_pool(call: NodeCall) -> Operand:
    value, slide, ceil = _window(call)
    function = _MAXIMUM[len(slide.kernel)]
    if _fits(slide):
        return call.call(function, value, slide.kernel, slide.stride, slide.before, slide.dilation, ceil)
    moved = padded(call, value, slide, -math.inf)
    return call.call(function, moved, slide.kernel, slide.stride, 0, slide.dilation, ceil)


def average_inside(x: Tensor, padding: tuple[int, ...], kernel: Any, stride: Any, ceil: bool) -> Tensor:
    """Average pooling in which what was padded does not count.

    Args:
        x: (N, C, ...).
        padding: As ``functional.pad`` takes it.
        kernel: Size of a window.
        stride: Step between two windows.
        ceil: Whether a last window may reach over the end.
    """
    pool = _AVERAGE[x.ndim - 2]
    inside = functional.pad(torch.ones_like(x[:1, :1]), padding)
    return pool(functional.pad(x, padding), kernel, stride, 0, ceil) / pool(inside, kernel, stride, 0, ceil)


def _average_pool(call: NodeCall) -> Operand:
    value, slide, ceil = _window(call)
    if any(size != 1 for size in slide.dilation):
        raise call.unsupported("It is dilated.")
    counted = bool(call.integer("count_include_pad", 0))
    function = _AVERAGE[len(slide.kernel)]
    if _fits(slide):
        return call.call(function, value, slide.kernel, slide.stride, slide.before, ceil, counted)
    if counted:
        return call.call(function, padded(call, value, slide), slide.kernel, slide.stride, 0, ceil)
    return call.call(average_inside, value, tuple(slide.padding), slide.kernel, slide.stride, ceil)


def _global(function: Callable[..., Tensor]) -> Callable[[NodeCall], Operand]:
    def operator(call: NodeCall) -> Operand:
        value = call.operand(0)
        return call.call(function, value, dim=tuple(range(2, len(value.shape))), keepdim=True)

    return operator


OPERATORS: Mapping[str, Callable[[NodeCall], Operand]] = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
}
