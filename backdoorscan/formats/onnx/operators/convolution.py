"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.nn import functional

from backdoorscan.formats.building.values import Const, Operand, Value
from backdoorscan.formats.keras.modules import same_padding
from backdoorscan.formats.onnx.calls import NodeCall

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_CHANNEL_FIRST = "Its input is no batch of images with channels."


@dataclass(frozen=True)
class Window:
    """How a kernel slides.

    Attributes:
        kernel: Its size.
        stride: Step between two windows.
        dilation: Distance of the kernel's elements.
        before: Rows added before, by axis.
        after: Rows added behind, by axis.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def symmetric(self) -> bool:
        """Whether as much is added before as behind."""
        return self.before == self.after

    @property
    def padding(self) -> list[int]:
        """What is added, in the order of ``functional.pad``."""
        pairs = list(zip(self.before, self.after, strict=True))
        return [size for pair in reversed(pairs) for size in pair]


def window(call: NodeCall, value: Value, kernel: Sequence[int] | None) -> Window:
    """Read the settings of a sliding window.

    Args:
        call: The node.
        value: Its input.
        kernel: Size of the kernel where the weights tell it; else it is a setting.

    Raises:
        UnsupportedModelError: The settings are contradictory.
    """
    axes = len(value.shape) - 2
    if axes < 1:
        raise call.unsupported(_CHANNEL_FIRST)
    size = call.sizes("kernel_shape", axes) if kernel is None or "kernel_shape" in call.node.attributes else None
    if kernel is not None and size not in (None, tuple(kernel)):
        raise call.unsupported(f"Its kernel is {list(kernel)}, not {list(size or ())}.")
    size = size or tuple(kernel or ())
    stride, dilation = call.sizes("strides", axes), call.sizes("dilations", axes)
    pads = call.integers("pads") or [0] * (2 * axes)
    mode = call.text("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        both = [
            same_padding(length, d * (k - 1) + 1, s)
            for length, k, s, d in zip(value.shape[2:], size, stride, dilation, strict=True)
        ]
        few, many = tuple(pair[0] for pair in both), tuple(pair[1] for pair in both)
        before, after = (few, many) if mode == "SAME_UPPER" else (many, few)
    elif mode in ("NOTSET", "VALID", ""):
        if mode == "VALID":
            pads = [0] * (2 * axes)
        before, after = tuple(pads[:axes]), tuple(pads[axes:])
    else:
        raise call.unsupported(f"Its setting 'auto_pad' is '{mode[:40]}'.")
    if len(before) != axes or len(after) != axes or min((*before, *after)) < 0:
        raise call.unsupported(f"Its setting 'pads' is {pads}.")
    return Window(size, stride, dilation, before, after)


def padded(call: NodeCall, value: Value, slide: Window, fill: float = 0.0) -> Value:
    """Add the window's padding as a step of its own."""
    if not any(slide.padding):
        return value
    return cast(Value, call.call(functional.pad, value, tuple(slide.padding), value=fill))


def _tensors(call: NodeCall, weight: Const, channels: int) -> dict[str, Const]:
    tensors = {"weight": weight}
    bias = call.constant(2) if call.optional(2) is not None else call.bias_behind(channels, len(weight.shape), 1)
    if bias is not None:
        tensors["bias"] = bias
    return tensors


def _conv(call: NodeCall) -> Operand:
    value, weight, groups = call.operand(0), call.constant(1), call.integer("group", 1)
    axes = len(weight.shape) - 2
    if not isinstance(value, Value) or len(value.shape) != axes + 2 or axes not in _CONVOLUTIONS:
        raise call.unsupported(_CHANNEL_FIRST)
    slide = window(call, value, weight.shape[2:])
    filters, channels = weight.shape[0], weight.shape[1] * groups
    if groups < 1 or filters % groups or value.shape[1] != channels:
        raise call.unsupported(f"{value.shape[1]} channels, {filters} filters and {groups} groups do not fit together.")
    tensors = _tensors(call, weight, filters)
    if not slide.symmetric:
        value = padded(call, value, slide)
    module = _CONVOLUTIONS[axes](
        channels,
        filters,
        slide.kernel,  # type: ignore[arg-type]
        slide.stride,  # type: ignore[arg-type]
        slide.before if slide.symmetric else 0,  # type: ignore[arg-type]
        slide.dilation,  # type: ignore[arg-type]
        groups,
        bias="bias" in tensors,
        device="meta",
    )
    return call.module(value, module, tensors)


def _conv_transpose(call: NodeCall) -> Operand:
    value, weight, groups = call.operand(0), call.constant(1), call.integer("group", 1)
    axes = len(weight.shape) - 2
    if not isinstance(value, Value) or len(value.shape) != axes + 2 or axes not in _TRANSPOSED:
        raise call.unsupported(_CHANNEL_FIRST)
    automatic = call.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID", "")
    if automatic or "output_shape" in call.node.attributes:
        raise call.unsupported("It gives its padding by the size of its output.")
    slide = window(call, value, weight.shape[2:])
    extra = tuple(call.integers("output_padding") or [0] * axes)
    if not slide.symmetric or len(extra) != axes or min(extra) < 0:
        raise call.unsupported("Its padding is not the same on both sides.")
    filters = weight.shape[1] * groups
    tensors = _tensors(call, weight, filters)
    module = _TRANSPOSED[axes](
        weight.shape[0],
        filters,
        slide.kernel,  # type: ignore[arg-type]
        slide.stride,  # type: ignore[arg-type]
        slide.before,  # type: ignore[arg-type]
        extra,  # type: ignore[arg-type]
        groups,
        bias="bias" in tensors,
        dilation=slide.dilation,  # type: ignore[arg-type]
        device="meta",
    )
    return call.module(value, module, tensors)


OPERATORS: Mapping[str, Callable[[NodeCall], Operand]] = {"Conv": _conv, "ConvTranspose": _conv_transpose}
