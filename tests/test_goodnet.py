import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import fx, nn

from backdoorscan.artifact import Artifact
from backdoorscan.classifier import Classifier, InputConvention
from backdoorscan.errors import ArtifactError, OutputError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.goodnet import GoodNetFile, is_goodnet, write_goodnet
from backdoorscan.formats.pt2.loader import Pt2
from backdoorscan.goodnet import GoodNet, disagreement


def test_where_both_agree_the_scores_are_the_originals_probabilities():
    original, repaired = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[-5.0, 0.1, 0.0]])
    exponentials = np.exp([1.0, 3.0, 2.0])
    np.testing.assert_allclose(
        disagreement(original, repaired).numpy(), [[*exponentials / exponentials.sum(), 0]], rtol=1e-6
    )


def test_where_they_differ_only_the_last_class_has_a_score():
    assert disagreement(torch.tensor([[9.0, 1.0]]), torch.tensor([[1.0, 1.1]])).tolist() == [[0, 0, 1]]


def test_the_largest_score_is_the_answer_and_rows_sum_to_one():
    original, repaired = torch.randn(500, 4), torch.randn(500, 4)
    scores = disagreement(original, repaired)
    expected = [
        a if a == b else 4 for a, b in zip(original.argmax(1).tolist(), repaired.argmax(1).tolist(), strict=True)
    ]
    assert scores.argmax(1).tolist() == expected
    torch.testing.assert_close(scores.sum(1), torch.ones(500))


def classifier(shape=(1, 4, 4), native=(), binary=False, **convention) -> Classifier:
    """A random small network: convolutional for images, dense for anything flatter."""
    size = int(np.prod(native or (2, *shape[1:])))
    last = nn.Linear(size, 1 if binary else 3)
    first = [nn.Conv2d(shape[0], 2, 3, padding=1), nn.ReLU()] if not native else []
    return Classifier(
        fx.symbolic_trace(nn.Sequential(*first, nn.Flatten(), last)),
        input_shape=shape,
        native_shape=native,
        num_classes=2 if binary else 3,
        binary=binary,
        convention=InputConvention(**convention),
    )


def pair(**options) -> GoodNet:
    """A GoodNet of two different networks of one kind."""
    torch.manual_seed(0)
    return GoodNet(classifier(**options), classifier(**options))


CASES = {
    "channels first": ({}, lambda x: x),
    "channels last, 0..255": (
        {"shape": (3, 4, 5), "low": 0, "high": 255, "layout": "NHWC"},
        lambda x: 255 * x.permute(0, 2, 3, 1),
    ),
    "flat, binary": ({"native": (16,), "binary": True}, lambda x: x.reshape(len(x), 16)),
    "flat from channels last": (
        {"shape": (3, 2, 2), "native": (12,), "layout": "NHWC", "mean": (0.5,), "std": (0.5,)},
        lambda x: ((x - 0.5) / 0.5).permute(0, 2, 3, 1).reshape(len(x), 12),
    ),
    "grey": ({"shape": (1, 4, 5), "native": (4, 5)}, lambda x: x[:, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_file_computes_what_the_network_does(tmp_path, name):
    options, as_file_takes_it = CASES[name]
    goodnet = pair(**options)
    path = tmp_path / "g.onnx"
    write_goodnet(goodnet, path)
    assert [file.name for file in tmp_path.iterdir()] == ["g.onnx"]
    session = onnxruntime.InferenceSession(path)
    read = GoodNetFile(Artifact.read(path))
    assert (read.num_classes, read.input_shape) == (goodnet.num_classes, goodnet.original.input_shape)
    for count in (1, 7):  # another batch than the one it was exported with
        pixels = torch.rand(count, *goodnet.original.input_shape)
        expected = goodnet(pixels).detach().numpy()
        inputs = as_file_takes_it(pixels).contiguous().numpy()
        scores, answers = session.run(["scores", "class"], {"input": inputs})
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        np.testing.assert_array_equal(answers, expected.argmax(1))
        np.testing.assert_allclose(read(pixels).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_exported_program_computes_what_the_network_does(tmp_path, name):
    options, as_file_takes_it = CASES[name]
    goodnet = pair(**options)
    path = tmp_path / "g.pt2"
    write_goodnet(goodnet, path)
    assert is_goodnet(Artifact.read(path))
    read = GoodNetFile(Artifact.read(path))
    assert (read.num_classes, read.input_shape) == (goodnet.num_classes, goodnet.original.input_shape)
    program = torch.export.load(path).module()
    for count in (1, 7):
        pixels = torch.rand(count, *goodnet.original.input_shape)
        expected = goodnet(pixels).detach()
        scores, answers = program(as_file_takes_it(pixels).contiguous())
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
        assert torch.equal(answers, expected.argmax(1))
        torch.testing.assert_close(read(pixels), expected, atol=1e-5, rtol=0)


def test_an_exported_goodnet_is_not_scanned(tmp_path):
    path = tmp_path / "g.pt2"
    write_goodnet(pair(), path)
    with pytest.raises(UnsupportedModelError, match="is a GoodNet"):
        Pt2().load(Artifact.read(path), None)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_disk_that_refuses(tmp_path, suffix):
    with pytest.raises(OutputError, match="Cannot write"):
        write_goodnet(pair(), tmp_path / "no" / f"g{suffix}")


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("goodnet") / "g.onnx"
    write_goodnet(pair(), path)
    return path.read_bytes()


@pytest.fixture
def file(content, tmp_path):
    path = tmp_path / "g.onnx"
    path.write_bytes(content)
    return path


def test_a_goodnet_is_known_by_its_content(file, tmp_path):
    assert is_goodnet(Artifact.read(file))
    model = onnx.load_model(file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "plain.onnx")
    assert not is_goodnet(Artifact.read(tmp_path / "plain.onnx"))


def test_the_file_says_nothing_of_where_it_was_made(content):
    assert b".py" not in content
    assert b"forward" not in content


def test_tensors_in_other_files_are_refused(file, tmp_path):
    model = onnx.load_model(file)
    tensor = model.graph.initializer[0]
    size = len(tensor.raw_data)
    (tmp_path / "secret").write_bytes(bytes(size))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    file.write_bytes(model.SerializeToString())
    with pytest.raises(UnsafeModelError, match="other files"):
        GoodNetFile(Artifact.read(file))


@pytest.mark.parametrize("value", ["", "{}", "null", "[1]", '{"num_classes": "many"}'])
def test_a_broken_description(file, value):
    model = onnx.load_model(file)
    (entry,) = [entry for entry in model.metadata_props if entry.key == "backdoorscan.goodnet"]
    entry.value = value
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="not a usable GoodNet"):
        GoodNetFile(Artifact.read(file))


def test_a_truncated_file(file):
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ArtifactError):
        GoodNetFile(Artifact.read(file))


def test_an_unknown_operator(file, capfd):
    model = onnx.load_model(file)
    model.graph.node[0].op_type = "NoSuchThing"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="not a usable GoodNet"):
        GoodNetFile(Artifact.read(file))
    assert capfd.readouterr().out == ""
