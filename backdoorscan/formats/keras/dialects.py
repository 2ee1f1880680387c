"""Turns any dialect of Keras's architecture JSON (2.0 to 3) into a ``ModelSpec``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.keras.spec import Call, Fields, LayerSpec, ModelSpec, Ref, Shape

_MODELS = {"Model", "Functional", "Sequential"}
_MAX_LAYERS = 10_000
_HINT = "Save the model again with Keras."


def read_model(config: Mapping[str, Any]) -> ModelSpec:
    """Read an architecture.

    Args:
        config: The object with ``class_name`` and ``config``.

    Raises:
        UnsupportedModelError: The model is no Sequential or functional one.
        ArtifactError: The architecture contradicts itself.
    """
    class_name = config["class_name"]
    if class_name not in _MODELS:
        raise UnsupportedModelError(
            f"The model is of the class '{class_name}'.",
            why="Its layers are wired by Python code that is not in the file.",
            hint="Rebuild it as a Sequential or functional Keras model, or export it to ONNX, and scan that.",
        )
    return _model(class_name, config["config"], "model", _Counter())


class _Counter:
    """Bounds the layers of all nested models together."""

    def __init__(self) -> None:
        self._seen = 0

    def add(self) -> None:
        self._seen += 1
        if self._seen > _MAX_LAYERS:
            raise UnsafeModelError(
                f"The model was refused: it has more than {_MAX_LAYERS} layers.", hint="Do not use this file."
            )


def _model(class_name: str, config: Any, name: str, counter: _Counter) -> ModelSpec:
    if class_name == "Sequential":
        return _sequential(config, name, counter)
    if not isinstance(config, dict) or not isinstance(config.get("layers"), list) or "output_layers" not in config:
        raise UnsupportedModelError(
            f"The model '{name}' does not describe its layers.",
            why="Its configuration has no 'layers', as with models wired by Python code.",
            hint="Rebuild it as a Sequential or functional Keras model, or export it to ONNX, and scan that.",
        )
    layers: dict[str, LayerSpec] = {}
    for entry in config["layers"]:
        layer = _layer(entry, f"{name}_layer_{len(layers)}", counter)
        nodes = entry.get("inbound_nodes") or []
        if not isinstance(nodes, list):
            raise _contradiction(layer.name, "'inbound_nodes' is not a list")
        layer.calls = [_call(node, layer.name) for node in nodes] or [Call(())]
        _add(layers, layer)
    inputs = list(_model_refs(config.get("input_layers", []), name))
    outputs = list(_model_refs(config["output_layers"], name))
    _count_first_calls(layers, outputs)
    return ModelSpec(name, layers, inputs, outputs)


def _count_first_calls(layers: Mapping[str, LayerSpec], outputs: Sequence[Ref]) -> None:
    """tf.keras counts the call by which an inner model was built, but does not list it: there the last is beyond."""
    refs = [*outputs, *(ref for layer in layers.values() for call in layer.calls for ref in call.refs())]
    beyond = {ref.layer for ref in refs if ref.layer in layers and ref.node == len(layers[ref.layer].calls)}
    for layer in layers.values():
        if layer.model is not None and layer.name in beyond:
            layer.calls.insert(0, Call(()))


def _sequential(config: Any, name: str, counter: _Counter) -> ModelSpec:
    # Keras 2.0 and 2.1 write a bare list; it has no name and no input layer.
    entries = config if isinstance(config, list) else config.get("layers") if isinstance(config, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ArtifactError(f"The Sequential model '{name}' has no layers.", hint=_HINT)
    built = config.get("build_input_shape") if isinstance(config, dict) else None
    layers: dict[str, LayerSpec] = {}
    stages = [_layer(entry, f"{name}_layer_{index}", counter) for index, entry in enumerate(entries)]
    if stages[0].class_name != "InputLayer":
        first = stages[0]
        shape = first.input_shape or _shape(built) or (_input_shape(first.model) if first.model else None)
        label = f"{first.name}_input"
        stages.insert(0, LayerSpec(label, "InputLayer", Fields(label, "InputLayer", {}), [], None, shape))
    previous: Ref | None = None
    for layer in stages:
        layer.calls = [Call(() if previous is None else (previous,))]
        _add(layers, layer)
        previous = Ref(layer.name, 0, 0)
    return ModelSpec(name, layers, [Ref(stages[0].name, 0, 0)], [Ref(stages[-1].name, 0, 0)])


def _input_shape(model: ModelSpec) -> Shape | None:
    return model.layers[model.inputs[0].layer].input_shape if model.inputs else None


def _add(layers: dict[str, LayerSpec], layer: LayerSpec) -> None:
    if layer.name in layers:
        raise _contradiction(layer.name, "two layers have this name")
    layers[layer.name] = layer


def _contradiction(layer: str, why: str) -> ArtifactError:
    return ArtifactError(f"The description of the layer '{layer}' is broken: {why}.", hint=_HINT)


def _layer(entry: Any, fallback: str, counter: _Counter) -> LayerSpec:
    counter.add()
    if not isinstance(entry, dict) or not isinstance(entry.get("class_name"), str) or "config" not in entry:
        raise _contradiction(fallback, "it lacks 'class_name' or 'config'")
    class_name, config = entry["class_name"], entry["config"]
    values = config if isinstance(config, dict) else {}
    name = entry.get("name") or values.get("name") or fallback
    if not isinstance(name, str):
        raise _contradiction(fallback, "its name is not text")
    fields = Fields(name, class_name, values)
    _check_origin(entry, fields)
    model = _model(class_name, config, name, counter) if class_name in _MODELS else None
    shape = _shape(values.get("batch_input_shape")) or _shape(values.get("batch_shape"))
    return LayerSpec(name, class_name, fields, [], model, shape)


def _check_origin(entry: Mapping[str, Any], fields: Fields) -> None:
    """Refuse what only the author's own Python code could rebuild, even under the name of a standard class.

    Every layer is looked at, called or not: Keras would run the code of each.
    """
    if fields.class_name == "Lambda":
        raise UnsafeModelError(
            f"The model was refused: its layer '{fields.layer}' is a Lambda.",
            why="A Lambda layer is Python code stored in the file, and code from a model file is never run.",
            hint="Rebuild the model with standard layers in its place (e.g. Rescaling), save it, and scan that.",
        )
    module = entry.get("module")
    registered = entry.get("registered_name")
    standard = module is None or (
        isinstance(module, str) and module.split(".")[0] in {"keras", "tensorflow", "tf_keras", "builtins"}
    )
    if not standard or ">" in fields.class_name or (isinstance(registered, str) and ">" in registered):
        raise fields.unsupported(
            "It is a custom class; its code is not in the file, and code would not be run anyway.",
            "Rebuild the model from standard layers, or export it to ONNX, and scan that.",
        )


def _shape(value: Any) -> Shape | None:
    """A shape without its batch, from ``[null, 28, 28, 1]``."""
    if not isinstance(value, list | tuple) or len(value) < 2:
        return None
    sizes = tuple(value[1:])
    if not all(size is None or (isinstance(size, int) and 0 < size < 2**31) for size in sizes):
        return None
    return sizes


def _is_ref(item: Any) -> bool:
    """``["conv", 0, 0]``, in old nodes with a fourth element: the call's other arguments."""
    return (
        isinstance(item, list)
        and len(item) in (3, 4)
        and isinstance(item[0], str)
        and all(isinstance(part, int) for part in item[1:3])
    )


def _model_refs(item: Any, name: str) -> Iterator[Ref]:
    """The references in ``input_layers`` or ``output_layers``: flat, a list of them, nested, or by key."""
    if _is_ref(item):
        yield Ref(item[0], item[1], item[2])
    elif isinstance(item, list | dict):
        for child in item.values() if isinstance(item, dict) else item:
            yield from _model_refs(child, name)
    else:
        raise ArtifactError(f"The inputs or outputs of the model '{name}' are broken.", hint=_HINT)


def _call(node: Any, layer: str) -> Call:
    if isinstance(node, dict):
        args = node.get("args")
        kwargs = node.get("kwargs") or {}
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise _contradiction(layer, "a call lacks its arguments")
        return Call(tuple(_new_argument(item) for item in args), {k: _new_argument(v) for k, v in kwargs.items()})
    if isinstance(node, list):
        return _old_call(node, layer)
    raise _contradiction(layer, "a call is neither a list nor an object")


def _new_argument(item: Any) -> Any:
    """An argument as Keras 3 writes it."""
    if isinstance(item, dict):
        if item.get("class_name") == "__keras_tensor__":
            config = item.get("config")
            history = config.get("keras_history") if isinstance(config, dict) else None
            if isinstance(history, list) and _is_ref(history):
                return Ref(history[0], history[1], history[2])
        return {key: _new_argument(value) for key, value in item.items()}
    if isinstance(item, list):
        return [_new_argument(child) for child in item]
    return item


def _old_call(node: list[Any], layer: str) -> Call:
    """A call as Keras 2 writes it: a list of references, the first of which carries the other arguments."""
    entries = [node] if _is_ref(node) or (node and node[0] == "_CONSTANT_VALUE") else node
    values: list[Any] = []
    kwargs: dict[str, Any] = {}
    for entry in entries:
        if isinstance(entry, list) and len(entry) >= 3 and entry[0] == "_CONSTANT_VALUE":
            values.append(entry[2])
        elif _is_ref(entry):
            values.append(Ref(entry[0], entry[1], entry[2]))
        else:
            raise _contradiction(layer, "a call refers to no layer")
        if len(entry) == 4:
            if not isinstance(entry[3], dict):
                raise _contradiction(layer, "a call's arguments are not an object")
            kwargs.update({key: _old_argument(value) for key, value in entry[3].items()})
    return Call((values[0] if len(values) == 1 else values,), kwargs)


def _old_argument(item: Any) -> Any:
    if _is_ref(item):
        return Ref(item[0], item[1], item[2])
    if isinstance(item, list):
        return [_old_argument(child) for child in item]
    return item
