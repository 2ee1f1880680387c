"""The first stage: from bytes to nodes and arrays, without torch and without evaluating anything.

Not read at all: expressions of sizes and guards, which ``torch.export.load`` evaluates as Python. The example inputs,
which it unpickles, are of no use here; they are looked through, so that a file that would run code there is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backdoorscan.errors import ArtifactError, BackdoorscanError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.pt2.archive import ZIP_MAGIC, Archive, open_archive
from backdoorscan.formats.pt2.spec import Argument, Meta, Node, ParsedPt2, Ref, Source, Special, Stored
from backdoorscan.formats.weights import checkpoint

AGAIN = "Export it again: torch.export.save(torch.export.export(model.eval(), ...), 'model.pt2')."
_MARKS = ("archive_format", "models/model.json", "serialized_exported_program.json")
_MODEL = re.compile(r"models/([^/]+)\.json")
_EXAMPLES = "data/sample_inputs/"
_MAX_JSON = 2**26
_MAX_NODES = 2**17
_MAX_RANK = 16
_MAX_EXTRA = 2**20
# Elements that tensors may have beyond those stored: torch keeps a tensor that repeats its numbers as the few it has.
_SPARE = 2**22
_DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    12: "bool",
    13: "bfloat16",
}
_SPECIAL = ("scalar_type", "memory_format", "layout")


def is_pt2(data: bytes) -> bool:
    """Whether ``torch.export.save`` wrote it, also where it is damaged or of an old kind."""
    if not data.startswith(ZIP_MAGIC):
        return False
    try:
        members = open_archive(data).members
    except ArtifactError:
        # The table of contents may be lost or lie; the names are in front of the members too.
        return b"/archive_format" in data or b"/models/model.json" in data
    return any(mark in members for mark in _MARKS)


def parse(data: bytes, name: str) -> ParsedPt2:
    """Read an exported program.

    Args:
        data: The file's bytes.
        name: What to call the file in errors.

    Raises:
        ArtifactError: The file is broken.
        UnsafeModelError: Reading it would run code or exhaust the memory.
        UnsupportedModelError: It is of a kind that this reader lacks.
    """
    try:
        return _parsed(open_archive(data))
    except BackdoorscanError as error:
        error.what = f"{name}: {error.what}"
        raise
    except Exception as error:  # a damaged description derails its reader in any way there is
        raise ArtifactError(
            f"{name}: The description of the program is damaged.",
            why=f"{type(error).__name__}: {str(error)[:200]}",
            hint="Download or copy the file again.",
        ) from error


def extra(data: bytes, key: str) -> str | None:
    """A text among the archive's extra files, or ``None``."""
    archive = open_archive(data)
    member = archive.members.get(f"extra/{key}")
    if member is None or member.size > _MAX_EXTRA:
        return None
    return bytes(archive.read(f"extra/{key}")).decode("utf-8", "replace")


def _parsed(archive: Archive) -> ParsedPt2:
    members = archive.members
    if any(name.startswith("data/aotinductor/") for name in members):
        raise UnsafeModelError(
            "The archive holds compiled machine code.", why="Loading it would run the code.", hint=AGAIN
        )
    models = [found[1] for found in map(_MODEL.fullmatch, members) if found]
    if len(models) != 1 or f"data/weights/{models[0]}_weights_config.json" not in members:
        raise UnsupportedModelError(
            f"The archive holds {len(models)} programs with weights that can be read as data.",
            why="It was written by an old release of PyTorch, or holds several programs.",
            hint="Export the program by itself with PyTorch 2.9 or later.",
        )
    (model,) = models
    if "byteorder" in members and bytes(archive.read("byteorder")) != b"little":
        raise UnsupportedModelError("The archive's numbers are not in the usual order of bytes.", hint=AGAIN)
    for name in members:
        if name.startswith(_EXAMPLES) and members[name].size:
            _check_example(archive, name)
    program = _json(archive, f"models/{model}.json")
    graph, signature = program["graph_module"]["graph"], program["graph_module"]["signature"]
    if len(graph["nodes"]) > _MAX_NODES:
        raise UnsafeModelError(f"The program has {len(graph['nodes']):,} nodes.", hint="Do not use this file.")
    metas = {str(name): _meta(meta) for name, meta in graph["tensor_values"].items()}
    sources, image = _inputs(signature["input_specs"])
    tensors = _tensors(archive, "weights", model) | _tensors(archive, "constants", model)
    if not metas[image].sizes:
        raise UnsupportedModelError("The program takes a single number.", hint="backdoorscan reads image classifiers.")
    for name, source in sources.items():
        if source.tensor not in tensors or name not in metas:
            raise ArtifactError(f"The archive lacks the tensor '{source.tensor[:100]}'.", hint=AGAIN)
    parsed = ParsedPt2(
        nodes=tuple(_node(node) for node in graph["nodes"]),
        sources=sources,
        image=image,
        outputs=_outputs(signature["output_specs"]),
        metas=metas,
        tensors=tensors,
        torch_version=str(program.get("torch_version", ""))[:50],
    )
    _check_order(parsed)
    return parsed


def _check_example(archive: Archive, name: str) -> None:
    """Refuse example inputs that are more than tensors, with the machine that cannot call anything."""
    try:
        checkpoint.parse(bytes(archive.read(name)), f"'{name[:100]}'")
    except ArtifactError as error:
        raise UnsafeModelError(
            "The example inputs are no plain tensors.",
            why=f"{error.what} torch.export.load would unpickle it, which runs what code there is in it.",
            hint=AGAIN,
        ) from error


def _json(archive: Archive, name: str) -> Any:
    content = archive.read(name)
    if len(content) > _MAX_JSON:
        raise UnsafeModelError(
            f"'{name}' has {len(content):,} bytes of description.",
            why="No real network needs as many.",
            hint="Do not use this file.",
        )
    return json.loads(bytes(content))


def _inputs(specs: list[dict[str, Any]]) -> tuple[dict[str, Source], str]:
    sources: dict[str, Source] = {}
    images: list[str] = []
    for spec in specs:
        ((kind, content),) = spec.items()
        if kind == "user_input":
            images.append(_text(content["arg"]["as_tensor"]["name"]) if "as_tensor" in content["arg"] else "")
        elif kind in ("parameter", "buffer"):
            sources[_text(content["arg"]["name"])] = Source(kind, _text(content[f"{kind}_name"]))  # type: ignore[arg-type]
        elif kind == "tensor_constant":
            sources[_text(content["arg"]["name"])] = Source("constant", _text(content["tensor_constant_name"]))
        elif kind != "constant_input":
            raise UnsupportedModelError(f"The program takes a {kind[:50]}, which is no tensor.", hint=AGAIN)
    if len(images) != 1 or not images[0] or images[0] in sources:
        raise UnsupportedModelError(
            f"The program takes {len(images)} inputs.", why="backdoorscan reads networks with one image in.", hint=AGAIN
        )
    return sources, images[0]


def _outputs(specs: list[dict[str, Any]]) -> tuple[str, ...]:
    names: list[str] = []
    for spec in specs:
        ((kind, content),) = spec.items()
        if kind in ("buffer_mutation", "parameter_mutation"):
            raise UnsupportedModelError(
                "The program changes its own weights when it runs.",
                why="It was exported in training mode.",
                hint="Export the network in evaluation mode: model.eval().",
            )
        if kind == "user_input_mutation":
            continue
        if kind != "user_output" or "as_tensor" not in content["arg"]:
            raise UnsupportedModelError("The program returns something other than tensors.", hint=AGAIN)
        names.append(_text(content["arg"]["as_tensor"]["name"]))
    return tuple(names)


def _check_order(parsed: ParsedPt2) -> None:
    """Every name is made once, before it is used, and described: so the graph has no cycle."""
    known = {parsed.image, *parsed.sources}
    for node in parsed.nodes:
        for name in references(node):
            if name not in known:
                raise ArtifactError(f"The node {node} uses '{name[:100]}', which is not there yet.", hint=AGAIN)
        for output in node.outputs:
            if output in known:
                raise ArtifactError(f"The node {node} makes '{str(output)[:100]}' a second time.", hint=AGAIN)
        known.update(output for output in node.outputs if output is not None)
    if not known.issuperset(parsed.outputs):
        raise ArtifactError("The program returns what it does not make.", hint=AGAIN)


def references(node: Node) -> list[str]:
    """Names of the values that a node takes."""
    stack: list[Argument] = list(node.arguments.values())
    found: list[str] = []
    while stack:
        item = stack.pop()
        if isinstance(item, Ref):
            found.append(item.name)
        elif isinstance(item, tuple):
            stack.extend(item)
    return found


def _node(node: Mapping[str, Any]) -> Node:
    outputs: list[str | None] = []
    for output in node["outputs"]:
        value = _argument(output)
        parts = value if isinstance(value, tuple) else (value,)
        outputs += [part.name if isinstance(part, Ref) else None for part in parts]
    # Python's own operators and control flow have no names for their arguments.
    arguments = {
        _text(entry["name"]) or str(index): _argument(entry["arg"]) for index, entry in enumerate(node["inputs"])
    }
    if len(arguments) != len(node["inputs"]):
        raise ValueError("an operator has two arguments of one name")
    named = node.get("name") or next((name for name in outputs if name), "")
    return Node(_text(named)[:200], _text(node["target"]), arguments, tuple(outputs))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of a name")
    return value


def _int(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise TypeError(f"{str(value)[:50]} instead of a whole number")
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{type(value).__name__} instead of yes or no")
    return value


def _ref(value: Any) -> Ref:
    return Ref(_text(value["name"]))


def _symbol(value: Any) -> Argument:
    """A size: a number, or the name of one that the program computes."""
    if "as_name" in value:
        return Ref(_text(value["as_name"]))
    return float(value["as_float"]) if "as_float" in value else _int(value["as_int"])


def _optional(value: Any) -> Ref | None:
    return _ref(value["as_tensor"]) if "as_tensor" in value else None


def _each(read: Callable[[Any], Argument]) -> Callable[[Any], Argument]:
    return lambda values: tuple(read(value) for value in values)


_ARGUMENTS: Mapping[str, Callable[[Any], Argument]] = {
    "as_none": lambda _: None,
    "as_tensor": _ref,
    "as_tensors": _each(_ref),
    "as_optional_tensor": _optional,
    "as_optional_tensors": _each(_optional),
    "as_int": _int,
    "as_ints": _each(_int),
    "as_float": float,
    "as_floats": _each(float),
    "as_bool": _bool,
    "as_bools": _each(_bool),
    "as_string": _text,
    "as_sym_int": _symbol,
    "as_sym_ints": _each(_symbol),
    "as_sym_float": _symbol,
    "as_sym_floats": _each(_symbol),
    "as_sym_bool": lambda value: Ref(_text(value["as_name"])) if "as_name" in value else _bool(value["as_bool"]),
}


def _argument(value: Mapping[str, Any]) -> Argument:
    ((kind, content),) = value.items()
    if kind in _ARGUMENTS:
        return _ARGUMENTS[kind](content)
    plain = kind.removeprefix("as_")
    return Special(plain, _int(content)) if plain in _SPECIAL else Special(plain)


def _size(size: Mapping[str, Any]) -> tuple[int | None, bool]:
    """A size, and whether it is left open; the expression of an open one is not looked at."""
    if "as_int" in size:
        return _int(size["as_int"]), False
    hint = size["as_expr"].get("hint") or {}
    return (_int(hint["as_int"]) if "as_int" in hint else None), True


def _meta(meta: Mapping[str, Any]) -> Meta:
    sizes = [_size(size) for size in meta["sizes"]]
    if len(sizes) > _MAX_RANK or any(size is not None and size < 0 for size, _ in sizes):
        raise ValueError(f"a tensor of {len(sizes)} axes")
    return Meta(_dtype(meta), tuple(size for size, _ in sizes), tuple(is_open for _, is_open in sizes))


def _dtype(meta: Mapping[str, Any]) -> str:
    return _DTYPES.get(_int(meta["dtype"]), "unknown")


def _tensors(archive: Archive, folder: str, model: str) -> dict[str, Stored]:
    name = f"data/{folder}/{model}_{folder}_config.json"
    if name not in archive.members:
        return {}
    found: dict[str, Stored] = {}
    elements = 0
    contents: dict[str, memoryview] = {}
    for key, entry in _json(archive, name)["config"].items():
        if entry["use_pickle"] is not False:
            raise UnsafeModelError(
                f"The tensor '{key[:100]}' is a pickle.", why="Unpickling it would run code from the file.", hint=AGAIN
            )
        member = f"data/{folder}/{_text(entry['path_name'])}"
        if member not in contents:
            contents[member] = archive.read(member)
        found[key] = _stored(key, member, contents[member], entry["tensor_meta"])
        elements += found[key].array.size
        if elements > len(archive.data) + _SPARE:
            raise UnsafeModelError(
                "The tensors are far larger than the file.",
                why=f"{elements:,} numbers from {len(archive.data):,} bytes.",
                hint="Do not use this file.",
            )
    return found


def _stored(key: str, member: str, content: memoryview, meta: Mapping[str, Any]) -> Stored:
    dtype, shape = _dtype(meta), [_int(size["as_int"]) for size in meta["sizes"]]
    strides, offset = [_int(stride["as_int"]) for stride in meta["strides"]], _int(meta["storage_offset"]["as_int"])
    if dtype == "unknown" or _int(meta["layout"]) != 7 or len(shape) > _MAX_RANK:
        raise UnsupportedModelError(
            f"The tensor '{key[:100]}' is sparse, quantised or complex.", hint="Export the network in float32."
        )
    raw = np.dtype({"bfloat16": "<u2", "bool": "u1"}.get(dtype, dtype)).newbyteorder("<")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min([*shape, *strides, offset], default=0) < 0 or len(content) % raw.itemsize:
        raise ValueError(f"the tensor '{key[:100]}' has negative sizes, or a part of a number")
    empty = 0 in shape
    if not empty and last >= len(content) // raw.itemsize:
        raise ArtifactError(f"The tensor '{key[:100]}' reaches beyond its numbers in the file.", hint=AGAIN)
    if math.prod(shape) > max(len(content) // raw.itemsize, _SPARE):
        raise UnsafeModelError(
            f"The tensor '{key[:100]}' of {shape} repeats a few numbers.", hint="Do not use this file."
        )
    numbers: NDArray[np.generic] = np.frombuffer(content, raw)
    if empty:
        array: NDArray[np.generic] = np.zeros(shape, raw)
    else:
        steps = [stride * raw.itemsize for stride in strides]
        array = np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps, writeable=False)
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    if dtype == "bool":
        array = array != 0
    return Stored(member, offset, tuple(strides), dtype, array)
