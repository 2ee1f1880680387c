"""Pooling, padding, cropping and enlarging."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from backdoorscan.formats.keras.calls import LayerCall, Value
from backdoorscan.formats.keras.layers.convolution import conv_output, padding_for
from backdoorscan.formats.keras.modules import SameAvgPool2d, same_padding


def _window(call: LayerCall, value: Value) -> tuple[tuple[int, int], tuple[int, int], bool, Any]:
    """Window, step, whether 'same', and the output's shape."""
    kernel = call.fields.pair("pool_size", 2)
    stride = call.fields.pair("strides", kernel)
    same = call.fields.choice("padding", "valid", "valid", "same") == "same"
    height, width, channels = call.image(value)
    shape = call.image_shape(
        conv_output(call, height, kernel[0], stride[0], same),
        conv_output(call, width, kernel[1], stride[1], same),
        channels,
    )
    return kernel, stride, same, shape


def _max_pooling(call: LayerCall, value: Value) -> Value:
    kernel, stride, same, shape = _window(call, value)
    padding = (0, 0)
    if same:
        value, padding = padding_for(call, value, kernel, stride, fill=float("-inf"))
    return call.module(value, nn.MaxPool2d(kernel, stride, padding), shape)


def _average_pooling(call: LayerCall, value: Value) -> Value:
    kernel, stride, same, shape = _window(call, value)
    if not same:
        return call.module(value, nn.AvgPool2d(kernel, stride), shape)
    height, width, _ = call.image(value)
    if height is not None and width is not None:
        rows, columns = same_padding(height, kernel[0], stride[0]), same_padding(width, kernel[1], stride[1])
        if rows[0] == rows[1] and columns[0] == columns[1]:
            module = nn.AvgPool2d(kernel, stride, (rows[0], columns[0]), count_include_pad=False)
            return call.module(value, module, shape)
    return call.module(value, SameAvgPool2d(kernel, stride), shape)


def _global_pooling(make: Callable[[int], nn.Module]) -> Callable[[LayerCall, Value], Value]:
    def layer(call: LayerCall, value: Value) -> Value:
        channels = call.image(value)[2]
        result = call.module(value, make(1), call.image_shape(1, 1, channels))
        if call.fields.flag("keepdims", False):
            return result
        return call.method(result, "flatten", 1, shape=(channels,))

    return layer


def _borders(call: LayerCall, key: str) -> tuple[int, int, int, int]:
    """Top, bottom, left, right from ``1``, ``[1, 1]`` or ``[[0, 1], [0, 1]]``."""
    value = call.fields.raw(key, 1 if key == "padding" else 0)
    items = [value, value] if isinstance(value, int) else value
    if not isinstance(items, list | tuple) or len(items) != 2:
        raise call.fields.wrong(key, "one, two or four numbers")
    flat: list[int] = []
    for item in items:
        pair = [item, item] if isinstance(item, int) else item
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise call.fields.wrong(key, "one, two or four numbers")
        flat.extend(pair)
    if not all(isinstance(number, int) and 0 <= number < 2**31 for number in flat):
        raise call.fields.wrong(key, "made of whole numbers that are not negative")
    return flat[0], flat[1], flat[2], flat[3]


def _resized(call: LayerCall, value: Value, borders: tuple[int, int, int, int]) -> Any:
    height, width, channels = call.image(value)
    top, bottom, left, right = borders
    shape = call.image_shape(
        None if height is None else height + top + bottom, None if width is None else width + left + right, channels
    )
    if any(size is not None and size < 1 for size in shape):
        raise call.fields.unsupported("Its output would be empty.")
    return shape


def _zero_padding(call: LayerCall, value: Value) -> Value:
    top, bottom, left, right = borders = _borders(call, "padding")
    return call.module(value, nn.ZeroPad2d((left, right, top, bottom)), _resized(call, value, borders))


def _cropping(call: LayerCall, value: Value) -> Value:
    top, bottom, left, right = _borders(call, "cropping")
    shape = _resized(call, value, (-top, -bottom, -left, -right))
    return call.module(value, nn.ZeroPad2d((-left, -right, -top, -bottom)), shape)


def _up_sampling(call: LayerCall, value: Value) -> Value:
    rows, columns = call.fields.pair("size", 2)
    mode = call.fields.choice("interpolation", "nearest", "nearest", "bilinear")
    height, width, channels = call.image(value)
    shape = call.image_shape(
        None if height is None else height * rows, None if width is None else width * columns, channels
    )
    aligned = None if mode == "nearest" else False
    factor = (float(rows), float(columns))
    return call.module(value, nn.Upsample(scale_factor=factor, mode=mode, align_corners=aligned), shape)


LAYERS: Mapping[str, Callable[[LayerCall, Value], Value]] = {
    "MaxPooling2D": _max_pooling,
    "MaxPool2D": _max_pooling,
    "AveragePooling2D": _average_pooling,
    "AvgPool2D": _average_pooling,
    "GlobalAveragePooling2D": _global_pooling(nn.AdaptiveAvgPool2d),
    "GlobalAvgPool2D": _global_pooling(nn.AdaptiveAvgPool2d),
    "GlobalMaxPooling2D": _global_pooling(nn.AdaptiveMaxPool2d),
    "GlobalMaxPool2D": _global_pooling(nn.AdaptiveMaxPool2d),
    "ZeroPadding2D": _zero_padding,
    "Cropping2D": _cropping,
    "UpSampling2D": _up_sampling,
}
