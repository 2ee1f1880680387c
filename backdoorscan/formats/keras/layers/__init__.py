"""The table of layer classes: one small function for each, or an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from backdoorscan.formats.keras.calls import LayerCall, Value, check_training
from backdoorscan.formats.keras.layers import (
    activations,
    convolution,
    core,
    merging,
    normalization,
    operations,
    pooling,
    preprocessing,
)

_LAYERS: Mapping[str, Callable[[LayerCall, Value], Value]] = {
    **activations.LAYERS,
    **convolution.LAYERS,
    **core.LAYERS,
    **normalization.LAYERS,
    **pooling.LAYERS,
    **preprocessing.LAYERS,
}


def call_layer(call: LayerCall, args: list[Any], kwargs: Mapping[str, Any]) -> Value:
    """Add one call of a layer to the graph.

    Args:
        call: The layer.
        args: Its arguments; values of the graph are ``Value``, all else are constants of the file.
        kwargs: Its named arguments.

    Raises:
        UnsupportedModelError: There is no exact equivalent.
    """
    class_name = call.fields.class_name
    # Keras 3 stores an operation such as `x * 2.0` under the class name of the merge layer. Only the layer takes
    # one list of values.
    if class_name in merging.LAYERS and len(args) == 1 and isinstance(args[0], list):
        check_training(call, kwargs)
        if not args[0] or not all(isinstance(item, Value) for item in args[0]):
            raise call.fields.unsupported("It takes a constant among its inputs.")
        return merging.LAYERS[class_name](call, args[0])
    if class_name in operations.OPERATIONS:
        return operations.OPERATIONS[class_name](call, args, kwargs)
    function = _LAYERS.get(class_name)
    if function is None:
        raise call.fields.unsupported(f"'{class_name}' is a custom class, or a layer that this reader lacks.")
    check_training(call, kwargs)
    if len(args) != 1 or not isinstance(args[0], Value):
        raise call.fields.unsupported("It is not called with exactly one value.")
    return function(call, args[0])
