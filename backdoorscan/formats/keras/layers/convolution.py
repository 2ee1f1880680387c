"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from backdoorscan.formats.keras.calls import LayerCall, Value
from backdoorscan.formats.keras.layers.activations import layer_activation
from backdoorscan.formats.keras.modules import SamePad2d, same_padding

_OIHW = (3, 2, 0, 1)
_HINT_SIZE = "Its kernel is larger than its input."


def conv_output(call: LayerCall, size: int | None, kernel: int, stride: int, same: bool) -> int | None:
    """The size behind a sliding window; ``kernel`` includes the dilation."""
    if size is None:
        return None
    result = -(-size // stride) if same else (size - kernel) // stride + 1
    if result < 1:
        raise call.fields.unsupported(_HINT_SIZE)
    return result


def padding_for(
    call: LayerCall, value: Value, kernel: tuple[int, int], stride: tuple[int, int], *, fill: float = 0.0
) -> tuple[Value, tuple[int, int]]:
    """Prepare 'same': the symmetric padding for the layer itself, or a padding of its own in front of it."""
    height, width, channels = call.image(value)
    amounts: list[tuple[int, int]] = []
    for size, k, s in zip((height, width), kernel, stride, strict=True):
        if size is not None:
            amounts.append(same_padding(size, k, s))
        elif s == 1:
            amounts.append(((k - 1) // 2, k // 2))
        else:
            padded = call.image_shape(None, None, channels)
            return call.module(value, SamePad2d(kernel, stride, fill), padded, "_pad"), (0, 0)
    (top, bottom), (left, right) = amounts
    if top == bottom and left == right:
        return value, (top, left)
    padded = call.image_shape(
        None if height is None else height + top + bottom, None if width is None else width + left + right, channels
    )
    module = nn.ConstantPad2d((left, right, top, bottom), fill)
    return call.module(value, module, padded, "_pad"), (0, 0)


def _slide(call: LayerCall, value: Value, filters: int, groups: int, *, bias: bool, suffix: str = "") -> Value:
    """A convolution with this layer's window; its weights are announced by the caller."""
    kernel, stride = call.fields.pair("kernel_size"), call.fields.pair("strides", 1)
    dilation = call.fields.pair("dilation_rate", 1)
    same = call.fields.choice("padding", "valid", "valid", "same") == "same"
    height, width, channels = call.image(value)
    covered = (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1)
    shape = call.image_shape(
        conv_output(call, height, covered[0], stride[0], same),
        conv_output(call, width, covered[1], stride[1], same),
        filters,
    )
    padding = (0, 0)
    if same:
        value, padding = padding_for(call, value, covered, stride)
    if channels % groups or filters % groups:
        raise call.fields.unsupported(f"{channels} channels and {filters} filters do not divide into {groups} groups.")
    module = nn.Conv2d(channels, filters, kernel, stride, padding, dilation, groups=groups, bias=bias, device="meta")
    return call.module(value, module, shape, suffix)


def conv2d(call: LayerCall, value: Value) -> Value:
    """Conv2D."""
    filters, groups = call.fields.integer("filters"), call.fields.integer("groups", 1)
    kernel, bias = call.fields.pair("kernel_size"), call.fields.flag("use_bias", True)
    if filters < 1 or groups < 1:
        raise call.fields.unsupported(f"It has {filters} filters in {groups} groups.")
    channels = call.image(value)[2]
    result = _slide(call, value, filters, groups, bias=bias)
    call.weight("weight", "kernel", (*kernel, channels // groups, filters), _OIHW)
    if bias:
        call.weight("bias", "bias", (filters,))
    return layer_activation(call, result)


def _depthwise(call: LayerCall, value: Value, *, bias: bool, suffix: str = "") -> Value:
    channels, multiplier = call.image(value)[2], call.fields.integer("depth_multiplier", 1)
    if multiplier < 1:
        raise call.fields.wrong("depth_multiplier", "a positive number")
    kernel = call.fields.pair("kernel_size")
    result = _slide(call, value, channels * multiplier, channels, bias=bias, suffix=suffix)
    call.weight(
        "weight",
        ("depthwise_kernel", "kernel"),
        (*kernel, channels, multiplier),
        (2, 3, 0, 1),
        (channels * multiplier, 1, *kernel),
        suffix,
    )
    return result


def depthwise_conv2d(call: LayerCall, value: Value) -> Value:
    """DepthwiseConv2D."""
    bias = call.fields.flag("use_bias", True)
    result = _depthwise(call, value, bias=bias)
    if bias:
        call.weight("bias", "bias", (call.image(result)[2],))
    return layer_activation(call, result)


def separable_conv2d(call: LayerCall, value: Value) -> Value:
    """SeparableConv2D: ``<layer>_depthwise``, then a 1×1 convolution that bears the layer's name."""
    filters, bias = call.fields.integer("filters"), call.fields.flag("use_bias", True)
    if filters < 1:
        raise call.fields.wrong("filters", "a positive number")
    result = _depthwise(call, value, bias=False, suffix="_depthwise")
    height, width, channels = call.image(result)
    point = nn.Conv2d(channels, filters, 1, bias=bias, device="meta")
    result = call.module(result, point, call.image_shape(height, width, filters))
    call.weight("weight", "pointwise_kernel", (1, 1, channels, filters), _OIHW)
    if bias:
        call.weight("bias", "bias", (filters,))
    return layer_activation(call, result)


def _transposed_length(
    call: LayerCall, size: int | None, kernel: int, stride: int, same: bool, extra: int | None
) -> tuple[int | None, int, int]:
    """Output size, rows cut off at both ends, and rows added behind (negative: cut off) of one axis."""
    if not same:
        longer = max(kernel - stride, 0) if extra is None else kernel - stride + extra
    else:
        longer = 0 if extra is None else kernel % 2 - stride + extra
    total = kernel - stride - longer
    before = max(total, 0) // 2
    result = None if size is None else size * stride + longer
    if result is not None and result < 1:
        raise call.fields.unsupported("Its output would be empty.")
    return result, before, 2 * before - total


def conv2d_transpose(call: LayerCall, value: Value) -> Value:
    """Conv2DTranspose: the gradient of a convolution with the same settings."""
    filters, bias = call.fields.integer("filters"), call.fields.flag("use_bias", True)
    kernel, stride = call.fields.pair("kernel_size"), call.fields.pair("strides", 1)
    dilation = call.fields.pair("dilation_rate", 1)
    same = call.fields.choice("padding", "valid", "valid", "same") == "same"
    extra: list[int | None] = [*call.fields.integers("output_padding", [])] or [None, None]
    if len(extra) == 1:
        extra = [extra[0], extra[0]]
    if len(extra) != 2 or min(number or 0 for number in extra) < 0:
        raise call.fields.wrong("output_padding", "one or two numbers")
    if filters < 1 or call.fields.integer("groups", 1) != 1:
        raise call.fields.unsupported("It has groups, or no filters.")
    height, width, channels = call.image(value)
    covered = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    rows = _transposed_length(call, height, covered[0], stride[0], same, extra[0])
    columns = _transposed_length(call, width, covered[1], stride[1], same, extra[1])
    behind = (rows[2], columns[2])
    if any(b >= max(s, d) for b, s, d in zip(behind, stride, dilation, strict=True)):
        raise call.fields.unsupported("Its output padding is not smaller than its stride.")
    module = nn.ConvTranspose2d(
        channels,
        filters,
        kernel,
        stride,
        (rows[1], columns[1]),
        (max(behind[0], 0), max(behind[1], 0)),
        bias=bias,
        dilation=dilation,
        device="meta",
    )
    shape = call.image_shape(rows[0], columns[0], filters)
    result = call.module(value, module, shape)
    call.weight("weight", "kernel", (*kernel, filters, channels), _OIHW)
    if bias:
        call.weight("bias", "bias", (filters,))
    if min(behind) < 0:
        crop = nn.ConstantPad2d((0, min(behind[1], 0), 0, min(behind[0], 0)), 0.0)
        result = call.module(result, crop, shape, "_crop")
    return layer_activation(call, result)


LAYERS: Mapping[str, Callable[[LayerCall, Value], Value]] = {
    "Conv2D": conv2d,
    "Convolution2D": conv2d,
    "DepthwiseConv2D": depthwise_conv2d,
    "SeparableConv2D": separable_conv2d,
    "SeparableConvolution2D": separable_conv2d,
    "Conv2DTranspose": conv2d_transpose,
    "Convolution2DTranspose": conv2d_transpose,
}
