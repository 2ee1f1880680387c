"""Arrays in files beside the model: read only from its own folder, and embedded when a copy is written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, UnsafeModelError
from backdoorscan.formats.onnx.loader import Onnx

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(5, 90)).astype(np.float32)
KERNEL = RNG.normal(size=(3, 3, 1, 1)).astype(np.float32)


def node(op, inputs, outputs, name="", **settings):
    return helper.make_node(op, inputs.split(), outputs.split(), name, **settings)


@pytest.fixture
def data(written):
    """A network with a weight among its arrays and one in an operator."""
    nodes = [
        node("Constant", "", "kernel", value=numpy_helper.from_array(KERNEL, "kernel")),
        node("Conv", "x kernel", "c", "conv"),
        node("Flatten", "c", "f"),
        node("Gemm", "f w", "y", "head", transB=1),
    ]
    return written(nodes, {"w": WEIGHT})


def outside(tensor, location, **place):
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **place}.items():
        tensor.external_data.add(key=key, value=str(value))


@pytest.fixture
def beside(data, tmp_path):
    """The network with both in one file beside it, as exporters write them, and that file."""

    def make(location="model.onnx.data", offset=64, length=WEIGHT.nbytes):
        model = onnx.load_model_from_string(data)
        outside(model.graph.initializer[0], location, offset=offset, length=length)
        outside(model.graph.node[0].attribute[0].t, location, length=KERNEL.nbytes)
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        content = KERNEL.tobytes().ljust(64, b"\0") + WEIGHT.tobytes()
        (tmp_path / "model.onnx.data").write_bytes(content)
        return Artifact.read(path)

    return make


def whole(artifact):
    return artifact.with_companions(Onnx().companions(artifact))


def test_the_same_network_as_with_all_inside(data, beside, load, answer):
    artifact = beside()
    assert Onnx().companions(artifact) == ["model.onnx.data"]
    ours, theirs = Onnx().load(whole(artifact), None), load(data)
    x = RNG.normal(size=(2, 3, 6, 5)).astype(np.float32)
    np.testing.assert_array_equal(answer(ours, x), answer(theirs, x))
    assert ours.network.state_dict().keys() == theirs.network.state_dict().keys()


def test_as_onnx_and_torch_write_it(data, tmp_path, load, answer):
    onnx.save_model(
        onnx.load_model_from_string(data), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0,
        convert_attribute=True, location="weights.bin",
    )  # fmt: skip
    artifact = whole(Artifact.read(tmp_path / "m.onnx"))
    assert list(artifact.parts) == ["weights.bin"]
    x = RNG.normal(size=(2, 3, 6, 5)).astype(np.float32)
    np.testing.assert_array_equal(answer(Onnx().load(artifact, None), x), answer(load(data), x))


def test_a_model_without_has_no_companions(data, artifact):
    assert list(Onnx().companions(artifact(data))) == []
    assert list(Onnx().companions(artifact(data.replace(b"conv", b"location"[:4])))) == []


@pytest.mark.parametrize(
    "location",
    ["../model.onnx.data", "a/../../b", "/etc/passwd", "", ".", "..\\secret", "C:secret", "a\0b", "x\ny"],
)
def test_names_that_lead_elsewhere(beside, location):
    artifact = beside(location)
    for read in (Onnx().companions, lambda artifact: Onnx().load(artifact, None)):
        with pytest.raises(UnsafeModelError, match="refused: it keeps the array"):
            read(artifact)


def test_the_model_itself_is_no_companion(beside):
    with pytest.raises(UnsafeModelError):
        whole(beside("model.onnx"))


@pytest.mark.parametrize("kind", ["symlink_to", "hardlink_to"])
def test_links(beside, tmp_path, kind):
    artifact = beside()
    (tmp_path / "secret").write_bytes((tmp_path / "model.onnx.data").read_bytes())
    (tmp_path / "model.onnx.data").unlink()
    getattr(tmp_path / "model.onnx.data", kind)(tmp_path / "secret")
    with pytest.raises(UnsafeModelError):
        whole(artifact)


def test_a_companion_that_was_not_read_is_never_opened(beside):
    with pytest.raises(ArtifactError, match="which is not there"):
        Onnx().load(beside(), None)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(65, WEIGHT.nbytes), (0, 2**40), (2**70, 8), (-64, WEIGHT.nbytes), ("zero", 8), (0, ""), (64, -1), (2**30, 0)],
)
def test_places_behind_the_end(beside, offset, length):
    with pytest.raises(ArtifactError, match="ends before it"):
        Onnx().load(whole(beside(offset=offset, length=length)), None)


def test_more_than_the_place_holds(beside):
    with pytest.raises(ArtifactError, match="broken"):
        Onnx().load(whole(beside(length=16)), None)


def test_a_copy_holds_all_inside(beside, load, tmp_path, run, answer):
    artifact = whole(beside())
    weights = Onnx().load(artifact, None).network.state_dict()
    weights["head.weight"][0] = 0
    weights["conv.weight"][1] *= 2
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    Onnx().write(artifact, weights, tmp_path / "copy.onnx")
    copy = (tmp_path / "copy.onnx").read_bytes()
    again = load(copy)
    for name, tensor in again.network.state_dict().items():
        assert torch.equal(tensor, weights[name])
    x = RNG.normal(size=(2, 3, 6, 5)).astype(np.float32)
    np.testing.assert_allclose(answer(again, x), run(copy, x), atol=1e-5)
    assert before.items() <= {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()


def test_an_unchanged_copy_holds_all_inside_too(beside, load, tmp_path):
    artifact = whole(beside())
    Onnx().write(artifact, Onnx().load(artifact, None).network.state_dict(), tmp_path / "copy.onnx")
    assert load((tmp_path / "copy.onnx").read_bytes()).num_classes == 5


def test_a_copy_that_would_be_too_large(beside, tmp_path, monkeypatch):
    from backdoorscan.formats import sandbox
    from backdoorscan.formats.onnx import replace as replacing

    monkeypatch.setattr(sandbox, "available", lambda: False)
    monkeypatch.setattr(replacing, "_MAX_BYTES", 1000)
    artifact = whole(beside())
    with pytest.raises(ArtifactError, match="would take"):
        Onnx().write(artifact, Onnx().load(artifact, None).network.state_dict(), tmp_path / "copy.onnx")
    assert not (tmp_path / "copy.onnx").exists()


def test_parts_that_nobody_names_do_not_matter(data, artifact):
    assert Onnx().load(replace(artifact(data), parts={"other": b"x"}), None).num_classes == 5
