"""Dense layers, layers that move values about, and layers that do nothing when a network predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import nn

from backdoorscan.formats.keras.calls import LayerCall, Value
from backdoorscan.formats.keras.layers.activations import layer_activation
from backdoorscan.formats.keras.spec import Shape


def _dense(call: LayerCall, value: Value) -> Value:
    """Works on the last axis of the file's order, whatever the rank."""
    units, bias = call.fields.integer("units"), call.fields.flag("use_bias", True)
    if units < 1 or call.fields.raw("lora_rank") is not None or call.fields.raw("quantization_config") is not None:
        raise call.fields.unsupported("It has no units, or is quantised or adapted (LoRA).")
    features = call.size(value, len(value.shape))
    moved = call.to_file_order(value)
    result = call.module(moved, nn.Linear(features, units, bias=bias, device="meta"), (*value.shape[:-1], units))
    call.weight("weight", "kernel", (features, units), (1, 0))
    if bias:
        call.weight("bias", "bias", (units,))
    return layer_activation(call, call.from_file_order(result))


def _flatten(call: LayerCall, value: Value) -> Value:
    """Flattens in the file's order with channels last, so that the kernel behind keeps its order."""
    rank = len(value.shape)
    moved = call.to_file_order(value)
    if call.fields.raw("data_format") == "channels_first" and rank > 1:
        moved = call.method(moved, "permute", 0, *range(2, rank + 1), 1)
    return call.module(moved, nn.Flatten(), (_product(value.shape),))


def _product(shape: Shape) -> int | None:
    sizes = [size for size in shape if size is not None]
    return math.prod(sizes) if len(sizes) == len(shape) else None


def reshaped(call: LayerCall, value: Value, target: list[int]) -> Value:
    """Reshape in the file's order; one entry of ``target`` may be -1."""
    total = _product(value.shape)
    known = math.prod(size for size in target if size != -1)
    if target.count(-1) > 1 or any(size < -1 or size == 0 for size in target):
        raise call.fields.unsupported(f"It reshapes to {target}.")
    if total is None and -1 not in target:
        raise call.fields.unsupported(f"The file leaves the size of its input open: {value.shape}.")
    if total is not None and (total % known or (-1 not in target and total != known)):
        raise call.fields.unsupported(f"It reshapes {value.shape} to {target}.")
    rest = None if total is None else total // known
    shape = tuple(rest if size == -1 else size for size in target)
    moved = call.to_file_order(value)
    if len(value.shape) != 1:
        moved = call.method(moved, "flatten", 1)
    if len(shape) > 1:
        moved = call.method(moved, "unflatten", 1, tuple(target))
    return call.from_file_order(Value(moved.node, shape))


def _reshape(call: LayerCall, value: Value) -> Value:
    return reshaped(call, value, call.fields.integers("target_shape"))


def permuted(call: LayerCall, value: Value, axes: list[int]) -> Value:
    """Permute in the file's order; the batch, axis 0, stays."""
    if sorted(axes) != list(range(1, len(value.shape) + 1)):
        raise call.fields.unsupported(f"It permutes {value.shape} by {axes}.")
    moved = call.method(call.to_file_order(value), "permute", 0, *axes)
    return call.from_file_order(Value(moved.node, tuple(value.shape[axis - 1] for axis in axes)))


def _permute(call: LayerCall, value: Value) -> Value:
    return permuted(call, value, call.fields.integers("dims"))


def _module(make: Callable[[LayerCall], nn.Module]) -> Callable[[LayerCall, Value], Value]:
    def layer(call: LayerCall, value: Value) -> Value:
        return call.module(value, make(call), value.shape)

    return layer


def _rate(call: LayerCall) -> float:
    rate = call.fields.number("rate", 0.5)
    if not 0 <= rate <= 1:
        raise call.fields.wrong("rate", "between 0 and 1")
    return rate


def _random_crop(call: LayerCall, value: Value) -> Value:
    """Cuts out the middle when a network predicts: nothing, where the size is the input's."""
    height, width, _ = call.image(value)
    if (height, width) != (call.fields.integer("height"), call.fields.integer("width")):
        raise call.fields.unsupported("It also crops when the network predicts.")
    return call.module(value, nn.Identity(), value.shape)


def _identity(_: LayerCall) -> nn.Module:
    return nn.Identity()


# All of these change a value while a network is trained, and only then.
_IDENTITIES = [
    "GaussianNoise",
    "GaussianDropout",
    "AlphaDropout",
    "ActivityRegularization",
    "Identity",
    "RandomFlip",
    "RandomRotation",
    "RandomZoom",
    "RandomTranslation",
    "RandomContrast",
    "RandomBrightness",
    "RandomHeight",
    "RandomWidth",
    "RandomGrayscale",
    "RandomHue",
    "RandomSaturation",
    "RandomSharpness",
    "RandomShear",
    "RandomPosterization",
    "RandomPerspective",
    "RandomColorJitter",
    "RandomColorDegeneration",
    "RandomErasing",
    "RandomElasticTransform",
    "RandomGaussianBlur",
    "RandomInvert",
    "RandAugment",
    "AugMix",
    "CutMix",
    "MixUp",
]

LAYERS: Mapping[str, Callable[[LayerCall, Value], Value]] = {
    "Dense": _dense,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Permute": _permute,
    "Dropout": _module(lambda call: nn.Dropout(_rate(call))),
    "SpatialDropout2D": _module(lambda call: nn.Dropout2d(_rate(call))),
    "RandomCrop": _random_crop,
    **dict.fromkeys(_IDENTITIES, _module(_identity)),
}
