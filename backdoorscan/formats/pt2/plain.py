"""A program as JSON of our own, its tensors in a file of weights: what ``docs/formats.md`` describes. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backdoorscan.errors import ArtifactError, UnsafeModelError
from backdoorscan.formats.pt2.parse import references
from backdoorscan.formats.pt2.spec import Argument, Meta, Node, ParsedPt2, Ref, Source, Special

SCHEMA = "backdoorscan.graph/1"

_MAX_JSON = 2**26
_MAX_STEPS = 2**17
_MAX_RANK = 16
_KINDS = ("parameter", "buffer", "constant")
_BATCH = 2
_HINT = "Give the .json file that `backdoorscan convert` wrote beside the weights."


@dataclass(frozen=True)
class PlainGraph:
    """A program without its numbers.

    Attributes:
        program: Its tensors are missing.
        shapes: Of the tensors that it takes, by their names in the file of weights.
    """

    program: ParsedPt2
    shapes: Mapping[str, tuple[int, ...]]


def write(program: ParsedPt2) -> tuple[bytes, tuple[str, ...]]:
    """Describe a program.

    Returns:
        The JSON, and the names of the tensors that it takes; one that has several in the program has the first here.
    """
    first: dict[Any, str] = {}
    names = {
        source.tensor: first.setdefault(program.tensors[source.tensor].place, source.tensor)
        for source in program.sources.values()
    }
    data = {
        "schema": SCHEMA,
        "image": {"name": program.image, **_described(program.entry)},
        "scores": program.outputs[0],
        "tensors": {
            name: {
                "key": names[source.tensor],
                "kind": source.kind,
                **_described(program.metas[name]),
            }
            for name, source in program.sources.items()
        },
        "steps": [_step(node, program.metas) for node in program.nodes],
    }
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    return text.encode(), tuple(dict.fromkeys(names.values()))


def _described(meta: Meta) -> dict[str, Any]:
    shape = [None if is_open else size for size, is_open in zip(meta.sizes, meta.open, strict=True)]
    return {"dtype": meta.dtype, "shape": shape}


def _step(node: Node, metas: Mapping[str, Meta]) -> dict[str, Any]:
    results = [
        None if name is None else {"name": name, **(_described(metas[name]) if name in metas else {})}
        for name in node.outputs
    ]
    return {
        "name": node.name,
        "operator": node.target,
        "arguments": {name: _plain(value) for name, value in node.arguments.items()},
        "results": results,
    }


def _plain(argument: Argument) -> Any:
    if isinstance(argument, Ref):
        return {"value": argument.name}
    if isinstance(argument, Special):
        return {"special": argument.kind, "number": argument.value}
    if isinstance(argument, tuple):
        return [_plain(item) for item in argument]
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"float": str(argument)}
    return argument


def parse(data: bytes, name: str) -> PlainGraph:
    """Read a description.

    Args:
        data: The JSON.
        name: What to call the file in errors.

    Raises:
        ArtifactError: It is no such description, or a damaged one.
        UnsafeModelError: It would exhaust the memory.
    """
    if len(data) > _MAX_JSON:
        raise UnsafeModelError(f"{name} has {len(data):,} bytes.", why="No real network needs as many.", hint=_HINT)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name} is not JSON.", why=str(error)[:200], hint=_HINT) from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ArtifactError(f"{name} is no graph of a network.", why=f'It lacks "schema": "{SCHEMA}".', hint=_HINT)
    try:
        return _parsed(content)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{name}: The graph is damaged.", why=f"{type(error).__name__}: {str(error)[:200]}", hint=_HINT
        ) from error


def _parsed(content: Mapping[str, Any]) -> PlainGraph:
    if len(content["steps"]) > _MAX_STEPS:
        raise ValueError(f"{len(content['steps']):,} steps")
    metas: dict[str, Meta] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    sources: dict[str, Source] = {}
    for name, tensor in content["tensors"].items():
        key, kind, metas[name] = _text(tensor["key"]), tensor["kind"], _meta(tensor)
        shape = tuple(size for size in metas[name].sizes if size is not None)
        if kind not in _KINDS or len(shape) != len(metas[name].sizes) or shapes.setdefault(key, shape) != shape:
            raise ValueError(f"the tensor '{name[:100]}' contradicts itself or another one")
        sources[name] = Source(kind, key)
    image = _text(content["image"]["name"])
    entry = _meta(content["image"])
    metas[image] = Meta(entry.dtype, (_BATCH, *entry.sizes[1:]), entry.open)
    nodes = tuple(_node(step, metas) for step in content["steps"])
    scores = _text(content["scores"])
    _check_order(image, sources, nodes, scores)
    program = ParsedPt2(
        nodes=nodes, sources=sources, image=image, outputs=(scores,), metas=metas, tensors={}, torch_version=""
    )
    return PlainGraph(program, shapes)


def _node(step: Mapping[str, Any], metas: dict[str, Meta]) -> Node:
    outputs: list[str | None] = []
    for result in step["results"]:
        outputs.append(None if result is None else _text(result["name"]))
        if result is not None and "shape" in result:
            metas[result["name"]] = _meta(result)
    arguments = {_text(name): _argument(value) for name, value in step["arguments"].items()}
    return Node(_text(step["name"])[:200], _text(step["operator"]), arguments, tuple(outputs))


def _check_order(image: str, sources: Mapping[str, Source], nodes: tuple[Node, ...], scores: str) -> None:
    """Every value is made once, before it is used: so the graph has no cycle."""
    known = {image, *sources}
    if image in sources:
        raise ValueError("the image is a tensor of the file")
    for node in nodes:
        own = [name for name in node.outputs if name is not None]
        if not known.issuperset(references(node)):
            raise ValueError(f"the step {node} uses what is not there yet")
        if known.intersection(own) or len(set(own)) != len(own):
            raise ValueError(f"the step {node} makes a value a second time")
        known.update(own)
    if scores not in known:
        raise ValueError("nothing makes the scores")


def _argument(value: Any) -> Argument:
    if isinstance(value, list):
        return tuple(_argument(item) for item in value)
    if not isinstance(value, dict):
        if value is None or isinstance(value, bool | float | str):
            return value
        return _number(value)
    if value.keys() == {"value"}:
        return Ref(_text(value["value"]))
    if value.keys() == {"float"}:
        return float(_text(value["float"]))
    if value.keys() != {"special", "number"}:
        raise ValueError(f"an argument with {', '.join(map(str, value))[:100]}")
    return Special(_text(value["special"]), _number(value["number"]))


def _meta(described: Mapping[str, Any]) -> Meta:
    shape = described["shape"]
    if not isinstance(shape, list) or len(shape) > _MAX_RANK:
        raise ValueError("a shape that is none")
    sizes = tuple(None if size is None else _number(size) for size in shape)
    if any(size is not None and size < 0 for size in sizes):
        raise ValueError("a negative size")
    return Meta(_text(described["dtype"]), sizes, tuple(size is None for size in sizes))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of a text")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise TypeError(f"{str(value)[:50]} instead of a whole number")
    return value
