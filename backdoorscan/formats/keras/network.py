"""The second stage: an architecture and its arrays to a ``torch.fx.GraphModule`` in NCHW.

A value of Keras rank 3 (height, width, channels) is kept as (batch, channels, height, width); values of any other
rank keep the file's order of axes. Layers of nested models become submodules (``inner.conv``) of one flat graph,
so that everything that walks the graph sees every layer.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.keras.calls import LayerCall, Value, check_training
from backdoorscan.formats.keras.layers import call_layer
from backdoorscan.formats.keras.parse import StoredWeight
from backdoorscan.formats.keras.spec import Call, Fields, LayerSpec, ModelSpec, Ref, Shape
from backdoorscan.formats.keras.weights import Slot, WeightSource

_MAX_NODES = 20_000
_MAX_VALUE_SIZE = 2**28
_RESERVED = set(dir(fx.GraphModule(nn.Module(), fx.Graph()))) | {"x"}


@dataclass(frozen=True)
class BuiltNetwork:
    """A network and where its tensors came from.

    Attributes:
        network: In eval mode.
        input_shape: In the file's order of axes, without the batch.
        output_shape: Likewise.
        channels_first: Whether the file itself puts channels first.
        origins: For every tensor that the file stores: where it waits in the network, and its array.
    """

    network: fx.GraphModule
    input_shape: Shape
    output_shape: Shape
    channels_first: bool
    origins: Mapping[str, tuple[Slot, StoredWeight]]


def build(model: ModelSpec, source: WeightSource, keras_major: int) -> BuiltNetwork:
    """Build a classifier.

    Args:
        model: The architecture.
        source: The arrays.
        keras_major: Keras 2 and 3 mean different functions by some names.

    Raises:
        UnsupportedModelError: The model holds something that can't be represented exactly.
        ArtifactError: Architecture and arrays do not fit together.
    """
    builder = NetworkBuilder(keras_major, _channels_first(model))
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise UnsupportedModelError(
            f"The model has {len(model.inputs)} inputs and {len(model.outputs)} outputs.",
            hint="backdoorscan reads classifiers: one image in, one score per class out. Save that part alone.",
        )
    shape = model.layers[model.inputs[0].layer].input_shape if model.inputs[0].layer in model.layers else None
    if shape is None or len(shape) > 3:
        raise UnsupportedModelError(
            "The model does not say which images it takes." if shape is None else f"The model takes inputs of {shape}.",
            why="backdoorscan reads images of two or three axes, or flat inputs.",
            hint="Call the model once (or give its first layer an input_shape) and save it again.",
        )
    image = Value(builder.graph.placeholder("x"), shape)
    (result,) = builder.run(model, (), [image])
    if len(result.shape) == 3 and result.shape.count(1) >= 2:
        result = Value(builder.graph.call_method("flatten", (result.node, 1)), (_product(result.shape),))
    if len(result.shape) != 1:
        raise UnsupportedModelError(
            f"The model returns values of the shape {result.shape}.",
            hint="backdoorscan reads classifiers: one image in, one score per class out.",
        )
    builder.graph.output(result.node)
    origins = _fill(builder, model, source)
    network = fx.GraphModule(builder.root, builder.graph)
    return BuiltNetwork(network.eval(), shape, result.shape, builder.channels_first, origins)


def _product(shape: Shape) -> int | None:
    total = 1
    for size in shape:
        if size is None:
            return None
        total *= size
    return total


def _all_layers(model: ModelSpec, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], LayerSpec]]:
    for layer in model.layers.values():
        yield (*path, layer.name), layer
        if layer.model:
            yield from _all_layers(layer.model, (*path, layer.name))


def _channels_first(model: ModelSpec) -> bool:
    formats = {
        layer.fields.raw("data_format"): layer
        for _, layer in _all_layers(model)
        # Flatten stores the default of the author's installation, whatever the network does.
        if layer.class_name != "Flatten"
    }
    if "channels_first" in formats and "channels_last" in formats:
        raise formats["channels_first"].fields.unsupported("Other layers of the model put the channels last.")
    return "channels_first" in formats


def _fill(builder: NetworkBuilder, model: ModelSpec, source: WeightSource) -> dict[str, tuple[Slot, StoredWeight]]:
    """Give every waiting tensor its array."""
    position = {path: index for index, (path, _) in enumerate(_all_layers(model))}
    slots = sorted(builder.slots.values(), key=lambda slot: position[slot.path])
    origins: dict[str, tuple[Slot, StoredWeight]] = {}
    for slot, weight in zip(slots, source.match(slots), strict=True):
        owner, _, name = slot.target.rpartition(".")
        module = builder.root.get_submodule(owner)
        tensor = torch.from_numpy(slot.to_network(weight.array))
        setattr(module, name, nn.Parameter(tensor) if name in dict(module.named_parameters(recurse=False)) else tensor)
        origins[slot.target] = (slot, weight)
    for module in builder.root.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.num_batches_tracked = torch.tensor(0)
    return origins


class NetworkBuilder:
    """Grows the graph, call by call.

    Args:
        keras_major: Which Keras wrote the file.
        channels_first: Whether the file puts channels first.
    """

    def __init__(self, keras_major: int, channels_first: bool) -> None:
        self.keras_major = keras_major
        self.channels_first = channels_first
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.slots: dict[str, Slot] = {}
        self._names: dict[tuple[str, ...], str] = {}
        self._taken: set[str] = set()

    def run(
        self, model: ModelSpec, path: tuple[str, ...], inputs: Sequence[Value], trainable: bool = True
    ) -> list[Value]:
        """Add one call of a model to the graph and return its outputs."""
        for name in model.layers:
            self.name((*path, name))
        values = dict(zip(model.inputs, inputs, strict=True))
        stack = list(reversed(model.outputs))
        waiting: set[Ref] = set()
        while stack:
            ref = stack[-1]
            if ref in values:
                stack.pop()
                continue
            layer, call = _find_call(model, ref)
            missing = [needed for needed in call.refs() if needed not in values]
            if not missing:
                results = self._call(layer, call, (*path, layer.name), values, trainable and layer.trainable)
                values.update({Ref(ref.layer, ref.node, index): value for index, value in enumerate(results)})
                if ref not in values:
                    raise _broken(f"its layer '{ref.layer}' has no output {ref.tensor}")
                continue
            if ref in waiting:
                raise _broken(f"its layer '{ref.layer}' depends on itself")
            waiting.add(ref)
            stack.extend(reversed(missing))
        return [values[ref] for ref in model.outputs]

    def _call(
        self, layer: LayerSpec, call: Call, path: tuple[str, ...], values: Mapping[Ref, Value], trainable: bool
    ) -> list[Value]:
        if len(self.graph.nodes) > _MAX_NODES:
            raise UnsafeModelError(
                f"The model was refused: it makes more than {_MAX_NODES} steps.",
                why="Networks that others use make a few thousand at most.",
                hint="Do not use this file.",
            )
        arguments = [_resolved(item, values) for item in call.args]
        kwargs = {key: _resolved(value, values) for key, value in call.kwargs.items()}
        step = LayerCall(self, layer.fields, path, trainable)
        if layer.model is not None:
            check_training(step, kwargs)
            inputs = _flat_values(arguments)
            if len(inputs) != len(layer.model.inputs):
                raise layer.fields.unsupported(
                    f"It is a model of {len(layer.model.inputs)} inputs that is called with {len(inputs)}."
                )
            return self.run(layer.model, path, inputs, trainable)
        result = call_layer(step, arguments, kwargs)
        if any(size is not None and size < 1 for size in result.shape):
            raise layer.fields.unsupported(f"Its output would be empty: {result.shape}.")
        if (_product(result.shape) or 0) > _MAX_VALUE_SIZE:
            raise UnsafeModelError(
                f"The model was refused: the output of layer '{layer.name}' is larger than the memory allows.",
                why=f"Its shape is {result.shape}.",
                hint="Do not use this file.",
            )
        return [result]

    def name(self, path: tuple[str, ...], suffix: str = "") -> str:
        """The module name for a layer (or something beside it): an identifier that is free in its model."""
        key = (*path, suffix) if suffix else path
        if key not in self._names:
            prefix = f"{self.name(path[:-1])}." if len(path) > 1 else ""
            plain = re.sub(r"[^0-9A-Za-z_]", "_", path[-1] + suffix) or "layer"
            if plain[0].isdigit() or plain in _RESERVED or keyword.iskeyword(plain):
                plain = f"layer_{plain}"
            name, number = prefix + plain, 1
            while name in self._taken:
                number += 1
                name = f"{prefix}{plain}_{number}"
            self._names[key] = name
            self._taken.add(name)
        return self._names[key]

    def install(self, path: tuple[str, ...], suffix: str, module: nn.Module, fields: Fields) -> str:
        """Put a module into the tree; a layer that is called again finds the one it made before."""
        name = self.name(path, suffix)
        owner_name, _, last = name.rpartition(".")
        owner = self.root
        for part in owner_name.split(".") if owner_name else []:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        existing = owner._modules.get(last)
        if existing is None:
            owner.add_module(last, module)
        elif repr(existing) != repr(module):
            if any(True for _ in module.parameters()):
                raise fields.unsupported("It is shared between inputs of different sizes that it pads differently.")
            return self.install(path, f"{suffix}_again", module, fields)
        return name


def _find_call(model: ModelSpec, ref: Ref) -> tuple[LayerSpec, Call]:
    layer = model.layers.get(ref.layer)
    if layer is None or not 0 <= ref.node < len(layer.calls) or layer.class_name == "InputLayer":
        raise _broken(f"there is no output {ref.node} of a layer '{ref.layer}'")
    return layer, layer.calls[ref.node]


def _broken(why: str) -> ArtifactError:
    return ArtifactError(f"The architecture is broken: {why}.", hint="Save the model again with Keras.")


def _resolved(item: Any, values: Mapping[Ref, Value]) -> Any:
    if isinstance(item, Ref):
        return values[item]
    if isinstance(item, list | tuple):
        return [_resolved(child, values) for child in item]
    if isinstance(item, dict):
        return {key: _resolved(child, values) for key, child in item.items()}
    return item


def _flat_values(item: Any) -> list[Value]:
    if isinstance(item, Value):
        return [item]
    if isinstance(item, dict):
        item = list(item.values())
    return [value for child in item for value in _flat_values(child)] if isinstance(item, list) else []
