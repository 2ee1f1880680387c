"""Files made to run code, to exhaust, or to mislead: refused, or read without doing what they ask for."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.pt2.loader import Pt2

WEIGHTS = "data/weights/model_weights_config.json"


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def small():
    """A small network, quick to read."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3))
    program = torch.export.export(
        model.eval(), (torch.rand(2, 3, 4, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def nodes(program):
    return program["graph_module"]["graph"]["nodes"]


def test_a_pickle_among_the_example_inputs_is_refused(small, rewrite, load, tmp_path):
    def poison(members):
        members["archive/data/sample_inputs/model.pt"] = pickle.dumps(Payload(tmp_path / "ran"))

    with pytest.raises(UnsafeModelError, match="example inputs"):
        load(rewrite(small, poison))
    assert not (tmp_path / "ran").exists()


def test_a_pickled_weight_is_refused(small, rewrite, program, load, tmp_path):
    def edit(config):
        config["config"]["0.weight"]["use_pickle"] = True

    def poison(members):
        members["archive/data/weights/weight_0"] = pickle.dumps(Payload(tmp_path / "ran"))

    with pytest.raises(UnsafeModelError, match=r"'0.weight' is a pickle"):
        load(program(rewrite(small, poison), edit, WEIGHTS))
    assert not (tmp_path / "ran").exists()


def test_expressions_are_not_evaluated(small, program, load, tmp_path):
    code = f"__import__('os').system('touch {tmp_path / 'ran'}')"

    def edit(description):
        graph = description["graph_module"]["graph"]
        graph["tensor_values"]["x" if "x" in graph["tensor_values"] else "input"]["sizes"][0]["as_expr"]["expr_str"] = (
            code
        )
        description["guards_code"] = [code]
        description["range_constraints"] = {code: {"min_val": 0, "max_val": None}}

    load(program(small, edit))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "target",
    ["os.system", "_operator.call", "torch.ops.aten.os.system", "torch.ops.aten.from_file.default", "torch.load",
     "torch.ops.aten.relu.__class__", "torch.ops.higher_order.cond", "torch.ops.aten.set_.source_Tensor"],
)  # fmt: skip
def test_unknown_operators_are_refused_by_name(target, small, program, load):
    def edit(description):
        node = next(node for node in nodes(description) if "relu" in node["target"])
        node["target"] = target

    with pytest.raises(UnsupportedModelError) as caught:
        load(program(small, edit))
    assert target.removeprefix("torch.ops.") in str(caught.value)


def test_a_cycle(small, program, load):
    def edit(description):
        first, *_, last = nodes(description)
        first["inputs"][0]["arg"] = {"as_tensor": {"name": last["outputs"][0]["as_tensor"]["name"]}}

    with pytest.raises(ArtifactError, match="not there yet"):
        load(program(small, edit))


def test_a_value_made_twice(small, program, load):
    with pytest.raises(ArtifactError, match="a second time"):
        load(program(small, lambda description: nodes(description).append(nodes(description)[-1])))


def test_sizes_that_the_graph_does_not_have(small, program, load):
    def edit(description):
        values = description["graph_module"]["graph"]["tensor_values"]
        values["linear"]["sizes"][1]["as_int"] = 4

    with pytest.raises(UnsupportedModelError, match="not what the file says"):
        load(program(small, edit))


@pytest.mark.parametrize(
    "name", ["forward", "training", "_modules", "graph", "lambda", "a/b", '"]; x = 1 #', "x", "__class__"]
)
def test_names_that_no_attribute_should_have(name, small, program, load):
    old, new = "0.weight", f"{name}.weight"

    def describe(description):
        for spec in description["graph_module"]["signature"]["input_specs"]:
            parameter = spec.get("parameter", {})
            if parameter.get("parameter_name") == old:
                parameter["parameter_name"] = new

    def weigh(config):
        config["config"][new] = config["config"].pop(old)

    loaded = load(program(program(small, describe), weigh, WEIGHTS))
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(loaded.network(images), load(small).network(images))
    assert all(part.isidentifier() or part.isdigit() for key in loaded.network.state_dict() for part in key.split("."))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda meta: meta["sizes"][0].update(as_int=10**6), ArtifactError),
        (lambda meta: meta["storage_offset"].update(as_int=10**9), ArtifactError),
        (lambda meta: meta["strides"][0].update(as_int=-1), ArtifactError),
        (lambda meta: meta.update(dtype=10), UnsupportedModelError),
        (lambda meta: meta.update(sizes=[{"as_int": 10**9}] * 4, strides=[{"as_int": 0}] * 4), UnsafeModelError),
    ],
    ids=["beyond", "offset", "negative", "complex", "repeated"],
)  # fmt: skip
def test_tensors_beyond_their_numbers(change, error, small, program, load):
    with pytest.raises(error):
        load(program(small, lambda config: change(config["config"]["0.weight"]["tensor_meta"]), WEIGHTS))


@pytest.mark.parametrize("size", [10**5, 10**9])
def test_operators_that_would_exhaust_the_memory(size, small, program, load):
    def edit(description):
        node = next(node for node in nodes(description) if "conv2d" in node["target"])
        node["inputs"].append({"name": "padding", "arg": {"as_ints": [size, size]}, "kind": 1})

    with pytest.raises(ArtifactError):
        load(program(small, edit))


def test_a_zip_bomb(small, rewrite, load):
    def inflate(members):
        members["archive/data/weights/weight_0"] = bytes(10**8)

    data = rewrite(small, inflate, compression=zipfile.ZIP_DEFLATED)
    assert len(data) < 10**6
    with pytest.raises(UnsafeModelError, match="compressed"):
        load(data)


@pytest.mark.parametrize(
    "name", ["../escape", "/etc/passwd", "archive/../../x", "archive//x", "archive\\x", "other/x", "x"]
)
def test_members_out_of_the_folder(name, small, rewrite, load):
    with pytest.raises(UnsafeModelError):
        load(rewrite(small, lambda members: members.update({name: b"x"})))


@pytest.mark.parametrize("name", ["archive/models/model.json", "archive/Models/MODEL.json"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(name, small, load):
    buffer = io.BytesIO(small)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(name, b"{}")
    with pytest.raises(UnsafeModelError):
        load(buffer.getvalue())


def test_members_that_overlap(small, load):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, zipfile.ZipFile(io.BytesIO(small)) as source:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
        # A member whose header and bytes lie inside another one's bytes.
        nested = io.BytesIO()
        with zipfile.ZipFile(nested, "w") as other:
            other.writestr("archive/inner", b"x")
        archive.writestr("archive/outer", nested.getvalue())
        inner = other.infolist()[0]
        inner.header_offset = archive.getinfo("archive/outer").header_offset + 30 + len("archive/outer")
        archive.filelist.append(inner)
    with pytest.raises(UnsafeModelError, match="overlap"):
        load(buffer.getvalue())


def test_a_local_header_of_another_name(small, load):
    place = small.index(b"models/model.json")
    data = small[:place] + b"models/Xodel.json" + small[place + 17 :]
    with pytest.raises(UnsafeModelError, match="calls itself otherwise"):
        load(data)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
def test_truncated(part, small, artifact, load):
    data = small[: int(part * len(small))]
    assert Pt2().accepts(artifact(data)) or part == 0.1
    with pytest.raises(ArtifactError):
        load(data)


def test_bits_that_flipped(small, artifact):
    chance = random.Random(0)
    for _ in range(60):
        data = bytearray(small)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            Pt2().load(artifact(bytes(data)), None)
        except ArtifactError:
            continue
        # What still reads was hit where nothing is read: padding, dates, example inputs.


def test_descriptions_that_were_scrambled(small, program, artifact):
    chance = random.Random(1)

    def scramble(value):
        if isinstance(value, dict):
            return {key: scramble(item) for key, item in value.items() if chance.random() > 0.002}
        if isinstance(value, list):
            return [scramble(item) for item in value]
        return chance.choice([None, -1, "x", [], {}, 2**40, value]) if chance.random() < 0.004 else value

    refused = 0
    for _ in range(40):
        data = program(small, lambda description: description.update(scramble(description)))
        try:
            Pt2().load(artifact(data), None)
        except ArtifactError:
            refused += 1
    assert refused > 10


def test_a_description_nested_without_end(small, rewrite, load):
    def nest(members):
        members["archive/models/model.json"] = b"[" * 100_000 + b"]" * 100_000

    with pytest.raises(ArtifactError, match="damaged"):
        load(rewrite(small, nest))


def test_compiled_code(small, rewrite, load):
    def add(members):
        members["archive/data/aotinductor/model/model.so"] = b"\x7fELF"

    with pytest.raises(UnsafeModelError, match="machine code"):
        load(rewrite(small, add))


def test_old_archives_say_what_to_do(small, rewrite, load):
    def age(members):
        for name in [name for name in members if "weights" in name]:
            del members[name]

    with pytest.raises(UnsupportedModelError, match=r"2\.9"):
        load(rewrite(small, age))


def test_reading_needs_no_torch():
    code = "import backdoorscan.formats.pt2.parse, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
