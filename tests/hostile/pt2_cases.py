"""Hostile exported programs."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from hostile.good import zipped
from hostile.torch_cases import NAMES, payload, program_of, torch_zip
from hostile.yard import Case, Yard

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError

INPUTS = "archive/data/sample_inputs/model.pt"
MODEL = "archive/models/model.json"
WEIGHTS = "archive/data/weights/model_weights_config.json"
NODES = 2**17 + 1


def _members(yard: Yard) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(yard.good["pt2"])) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def edited(
    change: Callable[[dict[str, bytes], Yard], Any], method: int = zipfile.ZIP_STORED
) -> Callable[[Yard], bytes]:
    """The good file with other members."""

    def write(yard: Yard) -> bytes:
        members = _members(yard)
        change(members, yard)
        return zipped(members, method)

    return write


def described(change: Callable[[Any, Yard], Any], member: str = MODEL) -> Callable[[Yard], bytes]:
    """The good file with another description."""

    def edit(members: dict[str, bytes], yard: Yard) -> None:
        content = json.loads(members[member])
        change(content, yard)
        members[member] = json.dumps(content).encode()

    return edited(edit)


def added(name: str, content: Callable[[Yard], bytes]) -> Callable[[Yard], bytes]:
    """The good file with a member more, or another one."""
    return edited(lambda members, yard: members.update({name: content(yard)}))


def _graph(program: Any) -> Any:
    return program["graph_module"]["graph"]


def _relu(program: Any) -> Any:
    return next(node for node in _graph(program)["nodes"] if "relu" in node["target"])


def _code(yard: Yard) -> str:
    return f"__import__('os').system({yard.command!r})"


def _expressions(program: Any, yard: Yard) -> None:
    for meta in _graph(program)["tensor_values"].values():
        for size in meta["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = _code(yard)
    program["guards_code"] = [_code(yard)]
    program["range_constraints"] = {_code(yard): {"min_val": 0, "max_val": None}}


def _target(target: str) -> Callable[[Yard], bytes]:
    return described(lambda program, yard: _relu(program).update(target=target))


def _pickled_weight(yard: Yard) -> bytes:
    def change(members: dict[str, bytes], yard: Yard) -> None:
        config = json.loads(members[WEIGHTS])
        entry = next(iter(config["config"].values()))
        entry["use_pickle"] = True
        members[WEIGHTS] = json.dumps(config).encode()
        members[f"archive/data/weights/{entry['path_name']}"] = torch_zip(program_of(payload(yard, "reduce")))

    return edited(change)(yard)


def _cyclic(program: Any, yard: Yard) -> None:
    first, *_, last = _graph(program)["nodes"]
    first["inputs"][0]["arg"] = {"as_tensor": {"name": last["outputs"][0]["as_tensor"]["name"]}}


def _padding(size: int) -> Callable[[Yard], bytes]:
    def change(program: Any, yard: Yard) -> None:
        node = next(node for node in _graph(program)["nodes"] if "conv2d" in node["target"])
        node["inputs"].append({"name": "padding", "arg": {"as_ints": [size, size]}, "kind": 1})

    return described(change)


def _weight(**changes: Any) -> Callable[[Yard], bytes]:
    return described(lambda config, yard: config["config"]["0.weight"]["tensor_meta"].update(changes), WEIGHTS)


def _numbers(value: float) -> Callable[[Yard], bytes]:
    def change(members: dict[str, bytes], yard: Yard) -> None:
        entry = json.loads(members[WEIGHTS])["config"]["0.weight"]
        name = f"archive/data/weights/{entry['path_name']}"
        members[name] = np.full(len(members[name]) // 4, value, "<f4").tobytes()

    return edited(change)


def _named(name: str) -> Callable[[Yard], bytes]:
    """The good file in which the first layer has another name."""

    def change(members: dict[str, bytes], yard: Yard) -> None:
        program, weights = json.loads(members[MODEL]), json.loads(members[WEIGHTS])
        for spec in program["graph_module"]["signature"]["input_specs"]:
            if spec.get("parameter", {}).get("parameter_name") == "0.weight":
                spec["parameter"]["parameter_name"] = f"{name}.weight"
        weights["config"][f"{name}.weight"] = weights["config"].pop("0.weight")
        members[MODEL], members[WEIGHTS] = json.dumps(program).encode(), json.dumps(weights).encode()

    return edited(change)


def _many(program: Any, yard: Yard) -> None:
    _graph(program)["nodes"] = [{"target": "", "inputs": [], "outputs": [], "metadata": {}}] * NODES


def _twice(yard: Yard) -> bytes:
    return zipped({**_members(yard), "archive/models/modeX.json": b"{}"}).replace(b"modeX.json", b"model.json")


def cases() -> Iterator[Case]:
    """All of them."""
    for way in ("reduce", "eval", "newobj", "stack global", "build a class", "persistent", "protocol 0"):
        yield Case(
            "code", f".pt2: a pickle among the example inputs: {way}", UnsafeModelError,
            added(INPUTS, lambda yard, way=way: torch_zip(program_of(payload(yard, way)))),
        )  # fmt: skip
    bare = lambda yard: program_of(payload(yard, "reduce"))  # noqa: E731
    yield Case("code", ".pt2: a bare pickle among the example inputs", UnsafeModelError, added(INPUTS, bare))
    yield Case("code", ".pt2: a text pickle among the example inputs", ArtifactError, added(
        INPUTS, lambda yard: f"cos\nsystem\n(S{yard.command!r}\ntR.".encode()
    ))  # fmt: skip
    yield Case("code", ".pt2: example inputs of another program", UnsafeModelError, added(
        "archive/data/sample_inputs/other.pt", lambda yard: torch_zip(program_of(payload(yard, "reduce")))
    ))  # fmt: skip
    yield Case("code", ".pt2: a pickled weight", UnsafeModelError, _pickled_weight)
    yield Case("code", ".pt2: expressions of sizes", None, described(_expressions))
    yield Case("code", ".pt2: machine code", UnsafeModelError, added(
        "archive/data/aotinductor/model/model.so", lambda yard: b"\x7fELF"
    ))  # fmt: skip
    for target in ("os.system", "_operator.call", "torch.load", "torch.ops.aten.from_file.default",
                   "torch.ops.aten.relu.__class__", "torch.ops.higher_order.cond", "torch.ops.aten.set_.source_Tensor",
                   "torch.ops.own.library.default"):  # fmt: skip
        yield Case("code", f".pt2: the operator {target}", UnsupportedModelError, _target(target))
    for name in ("../escape", "/etc/passwd", "archive/../../x", "archive//x", "archive\\x", "other/x", "x"):
        yield Case("other files", f".pt2: a member called {name}", UnsafeModelError, added(name, lambda yard: b"x"))
    for size in (10**5, 10**9):
        yield Case("exhaustion", f".pt2: a padding of {size:,}", ArtifactError, _padding(size))
    vast = {"sizes": [{"as_int": 10**9}] * 4, "strides": [{"as_int": 0}] * 4}
    yield Case("exhaustion", ".pt2: one number repeated", UnsafeModelError, _weight(**vast))
    yield Case("exhaustion", ".pt2: more numbers than there are", ArtifactError, _weight(sizes=[{"as_int": 10**6}] * 4))
    yield Case("exhaustion", ".pt2: numbers from elsewhere", ArtifactError, _weight(storage_offset={"as_int": 10**9}))
    yield Case("exhaustion", ".pt2: numbers from before", ArtifactError, _weight(storage_offset={"as_int": -(10**6)}))
    yield Case("exhaustion", ".pt2: more than 100,000 operators", UnsafeModelError, described(_many))
    yield Case("exhaustion", ".pt2: a zip bomb", UnsafeModelError, edited(
        lambda members, yard: members.update({"archive/data/weights/weight_0": bytes(10**8)}), zipfile.ZIP_DEFLATED
    ))  # fmt: skip
    deep = b"[" * 100_000 + b"]" * 100_000
    yield Case("malformed", ".pt2: a deep JSON", ArtifactError, added(MODEL, lambda yard: deep))
    yield Case("malformed", ".pt2: a cycle", ArtifactError, described(_cyclic))
    for value in (np.nan, np.inf, 3e38):
        yield Case("malformed", f".pt2: {value}", UnsupportedModelError, _numbers(value))
    yield Case("disguise", ".pt2: two members of one name", UnsafeModelError, _twice)
    yield Case("disguise", ".pt2: a member in two spellings", UnsafeModelError, added(
        "archive/Models/MODEL.json", lambda yard: b"{}"
    ))  # fmt: skip
    yield Case("disguise", ".pt2: bytes before the archive", ArtifactError, lambda yard: b"#!" + yard.good["pt2"])
    yield Case("disguise", ".pt2: a comment behind the archive", UnsafeModelError, lambda yard: (
        yard.good["pt2"][:-2] + b"\x04\0more"
    ))  # fmt: skip
    for name in NAMES:
        yield Case("names", f".pt2: {name}", None, _named(name))
