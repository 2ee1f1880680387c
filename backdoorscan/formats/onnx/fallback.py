"""onnx2torch, where it is installed, for files with an operator that this reader lacks.

What it makes is compared with onnxruntime like everything else. It keeps less of a file than this reader does: it works
for the number of images that the file's own constants allow, some weights become constants, and those are written back
only whose array in the file can be told by its content.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from backdoorscan import graph
from backdoorscan.artifact import Artifact
from backdoorscan.errors import BackdoorscanError, UnsupportedModelError
from backdoorscan.formats.building.network import BuiltNetwork
from backdoorscan.formats.building.values import Origin, to_tensor
from backdoorscan.formats.onnx.parse import ParsedOnnx
from backdoorscan.formats.onnx.reference import renamed
from backdoorscan.formats.onnx.verify import before_ending, compare, excerpt_of
from backdoorscan.formats.sandbox import run_apart
from backdoorscan.plugin.loader import Layout


def installed() -> str | None:
    """The converter's name and version, or ``None`` where it is not installed."""
    if importlib.util.find_spec("onnx2torch") is None:
        return None
    return f"onnx2torch {importlib.metadata.version('onnx2torch')}"


def convert(artifact: Artifact, parsed: ParsedOnnx, layout: Layout) -> BuiltNetwork | None:
    """Build a classifier with onnx2torch, and compare it with onnxruntime.

    Args:
        artifact: The file.
        parsed: What it says; files with control flow or with open sizes are not tried.
        layout: Its order of axes.

    Returns:
        The network, or ``None`` where the converter cannot read the file either, or gets it wrong.
    """
    size = tuple(side for side in parsed.input.shape if side is not None)
    inner = any(attribute.g is not None for node in parsed.nodes for attribute in node.attributes.values())
    if len(size) < len(parsed.input.shape) or inner:
        return None
    name = str(artifact.path)
    data = run_apart(renamed, artifact.data, artifact.parts, excerpt_of(parsed, [parsed.output]), name=name)
    try:
        network = _traced(_converted(data))
        if layout == "NHWC":
            _take_channels_first(network)
        built = _built(network, parsed, size, layout)
        compare(artifact, parsed, built)
    except BackdoorscanError:
        return None
    except Exception:  # whatever a converter of unknown files raises: the reader's own error says what to do
        return None
    return built


def _converted(data: bytes) -> fx.GraphModule:
    from backdoorscan.formats.weights.zoo import import_torchvision  # only this converter needs it

    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx2torch import convert as convert_model  # type: ignore[import-not-found]

        network: fx.GraphModule = convert_model(onnx.load_model_from_string(data))
    return network.eval()


class _Tracer(fx.Tracer):
    """Looks into the converter's own layers, so that the graph has ordinary ones alone."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m.__module__.startswith("torch.nn")


def _traced(network: fx.GraphModule) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return fx.GraphModule(network, _Tracer().trace(network)).eval()
        except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError):
            return network  # some of its layers look at the values


def _take_channels_first(network: fx.GraphModule) -> None:
    (entry,) = (node for node in network.graph.nodes if node.op == "placeholder")
    with network.graph.inserting_after(entry):
        last = network.graph.call_function(torch.permute, (entry, (0, 2, 3, 1)))
    entry.replace_all_uses_with(last, lambda user: user is not last)
    network.recompile()


def _built(network: fx.GraphModule, parsed: ParsedOnnx, size: tuple[int, ...], layout: Layout) -> BuiltNetwork:
    image = torch.zeros(2 * (parsed.input.batch or 1), *size)
    with torch.no_grad():
        scores = network(image.permute(0, 3, 1, 2) if layout == "NHWC" else image)
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(image):
        raise UnsupportedModelError("The model does not return one row of scores per image.")
    last = graph.output_node(network)
    return BuiltNetwork(
        network=network,
        size=size,
        layout=layout,
        num_classes=math.prod(scores.shape[1:]),
        origins=dict(_origins(network, parsed.arrays)),
        nodes={parsed.output: last, **_logits(network, last, parsed)},
    )


def _logits(network: fx.GraphModule, last: fx.Node, parsed: ParsedOnnx) -> Mapping[str, fx.Node]:
    """What a final activation is made from, to be compared too: in the file and in the network."""
    name = before_ending(parsed)
    ends_alike = isinstance(graph.layer(network, last), nn.Softmax | nn.LogSoftmax | nn.Sigmoid)
    makers = {node.outputs[0]: node for node in parsed.nodes}
    if ends_alike and parsed.output in makers and makers[parsed.output].inputs[0] == name:
        return {name: last.all_input_nodes[0]}
    return {}


def _origins(network: fx.GraphModule, arrays: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, Origin]]:
    """Which array of the file each tensor is: the only one of its content, as it is or transposed."""
    known: dict[tuple[tuple[int, ...], bytes], list[Origin]] = {}
    for name, array in arrays.items():
        tensor = to_tensor(np.array(array))
        turned = [Origin(name, (("permute", (1, 0)),))] if tensor.ndim == 2 else []
        for origin in (Origin(name), *turned):
            value = tensor.permute(1, 0) if origin.steps else tensor
            known.setdefault(_content(value), []).append(origin)
    for key, tensor in network.state_dict().items():
        found = known.get(_content(tensor), [])
        if len(found) == 1 and tensor.numel() > 1:
            yield key, found[0]


def _content(tensor: Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes()
