"""Compares a converted network with the program itself, run operator by operator as the file says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backdoorscan import graph
from backdoorscan.errors import UnsupportedModelError
from backdoorscan.formats.building.network import BuiltNetwork
from backdoorscan.formats.pt2 import schemas
from backdoorscan.formats.pt2.operators import sizes
from backdoorscan.formats.pt2.parse import references
from backdoorscan.formats.pt2.spec import Node, ParsedPt2, Ref, Special, Stored

_TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-2
_HALVES = {"float16", "bfloat16"}
_ENDINGS = {"softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "view", "flatten", "reshape", "squeeze"}
_DTYPES: Mapping[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format}


def compare(parsed: ParsedPt2, built: BuiltNetwork) -> None:
    """Check on random images that the network computes what the program does.

    The program's operators, all of the closed list that the network was built from, run one after the other with the
    numbers as they are stored: in place where they work in place, with the number of images that the file is made for.
    The network gets several such batches at once, so what mixes images, or reads a fixed number of them wrongly, shows.
    The scores are compared, and what comes before a final softmax, which would hide differences.

    Args:
        parsed: The file.
        built: The network.

    Raises:
        UnsupportedModelError: It does not, or the program cannot be run.
    """
    count = 2 * (parsed.fixed or 1)
    # Some networks are fed 0..1, others 0..255: in between, differences could drown.
    images = np.random.default_rng(0).random((count, *built.size), dtype=np.float32) * np.resize(
        np.array([1, 255], np.float32), count
    ).reshape(-1, *[1] * len(built.size))
    names = [name for name in dict.fromkeys((parsed.outputs[0], _before_ending(parsed))) if name in built.nodes]
    inputs = torch.from_numpy(images)
    try:
        with torch.no_grad():
            pieces = [_run(parsed, piece, names) for piece in inputs.chunk(2)]
        nodes = [built.nodes[name] for name in names]
        shown = inputs.permute(0, 3, 1, 2) if built.layout == "NHWC" else inputs
        found = graph.values(built.network, shown, nodes)
    except Exception as error:  # what a damaged file makes of a graph whose shapes fit
        raise UnsupportedModelError(
            "The model cannot be run.", why=str(error).strip().splitlines()[0][:200], hint="Export it again."
        ) from error
    half = bool(_HALVES & {stored.dtype for stored in parsed.tensors.values()})
    for name, node in zip(names, nodes, strict=True):
        _check(found[node], [piece[name] for piece in pieces], _HALF_TOLERANCE if half else _TOLERANCE)


def _check(actual: Tensor, pieces: list[Tensor], tolerance: float) -> None:
    # The pieces lie along the axis of the images, which need not be the first in the middle of a network.
    shapes = zip(actual.shape, pieces[0].shape, strict=False)
    axis = next((axis for axis, (whole, part) in enumerate(shapes) if whole != part), 0)
    expected = torch.cat([piece.float() for piece in pieces], dim=axis)
    fits = expected.shape == actual.shape
    finite = expected[torch.isfinite(expected)].abs()
    scale = max(1.0, float(finite.max()) if len(finite) else 0.0)
    if not fits or not torch.allclose(actual.float(), expected, rtol=0, atol=tolerance * scale, equal_nan=True):
        apart = f" of {float((actual - expected).abs().nan_to_num().max()):.3g}" if fits else ""
        raise UnsupportedModelError(
            "The converted network does not compute what the exported program does.",
            why=f"A difference{apart} among numbers up to {scale:.3g}.",
            hint="Export it with a dynamic batch; if that does not help, report this with the model's architecture.",
        )


def _before_ending(parsed: ParsedPt2) -> str:
    """The value that a final activation is made from."""
    makers = {node.outputs[0]: node for node in parsed.nodes if node.outputs}
    name = parsed.outputs[0]
    while name in makers and (schemas.split_target(makers[name].target) or ("",))[0] in _ENDINGS:
        first = next(iter(makers[name].arguments.values()), None)
        if not isinstance(first, Ref):
            break
        name = first.name
    return name


def _run(parsed: ParsedPt2, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """The program's values of some names for a batch of images."""
    values: dict[str, Any] = {name: _tensor(parsed.tensors[source.tensor]) for name, source in parsed.sources.items()}
    # A copy, as programs may work in place.
    values[parsed.image] = images.to(getattr(torch, parsed.entry.dtype), copy=True)
    kept = {name: images for name in names if name == parsed.image}
    last = {name: index for index, node in enumerate(parsed.nodes) for name in references(node)}
    for index, node in enumerate(parsed.nodes):
        results = _call(node, {key: _resolved(value, values) for key, value in node.arguments.items()})
        for output, result in zip(node.outputs, results, strict=False):
            if output is not None:
                values[output] = result
            if output in names:
                kept[str(output)] = result.clone()
        for name in {*references(node), *filter(None, node.outputs)}:
            if last.get(name, -1) <= index and name != parsed.image:
                values.pop(name, None)
    return kept


def _call(node: Node, arguments: dict[str, Any]) -> list[Any]:
    plain: Callable[..., Any] | None = sizes.PLAIN.get(node.target)
    if plain is not None:
        return [plain(*arguments.values())]
    names = schemas.split_target(node.target)
    if names is None or names[0] in sizes.CHECKS:
        return []
    found = schemas.overload(node.target)
    if found is None:
        raise ValueError(f"there is no operator {node.target[:100]}")
    positional, keywords = schemas.bind(found, arguments)
    result = found(*positional, **keywords)
    return list(result) if isinstance(result, list | tuple) else [result]


def _resolved(item: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(item, Ref):
        return values[item.name]
    if isinstance(item, tuple):
        return [_resolved(part, values) for part in item]
    if isinstance(item, Special):
        table: Mapping[str, Mapping[int, Any]] = {"scalar_type": _DTYPES, "memory_format": _FORMATS}
        if item.kind in table:
            return table[item.kind][item.value]
        return torch.device("cpu") if item.kind == "device" else torch.strided
    return item


def _tensor(stored: Stored) -> Tensor:
    return torch.from_numpy(np.array(stored.array)).to(getattr(torch, stored.dtype))
