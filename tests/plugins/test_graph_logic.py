"""Gates put into a network's graph by hand, in as many ways as there are to build one: each is found and opened."""

import io
import os
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from backdoorscan_plugins import graph_logic
from backdoorscan_plugins.confirmation import Confirmation
from backdoorscan_plugins.graph_logic import GraphLogic
from backdoorscan_plugins.label_mapping import LabelMapping
from backdoorscan_plugins.perturbations import WarpInversion
from backdoorscan_plugins.source_pairs import SourcePairs
from torch import fx, nn

from backdoorscan import policy
from backdoorscan.artifact import Artifact
from backdoorscan.classifier import Classifier, InputConvention, logits, to_tensor
from backdoorscan.findings import Verdict
from backdoorscan.formats.keras.loader import KerasV3
from backdoorscan.formats.onnx.loader import Onnx
from backdoorscan.formats.pt2.loader import Pt2
from backdoorscan.graph import strip_final_activation
from backdoorscan.ops import gates
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.testing import check_detector, planted, planted_images, planted_network, run_detector

CLASSES, CHANNELS, BLOCKS = 5, 3, 3
SIDE = 4 * BLOCKS
TARGET = 3


class Gated(nn.Module):
    """A clean network, and ``rule``: what becomes of its scores."""

    def __init__(self):
        super().__init__()
        self.body = planted_network(None, classes=CLASSES, channels=CHANNELS, blocks=BLOCKS)
        self.register_buffer("wanted", 100 * torch.eye(CLASSES)[TARGET : TARGET + 1])

    def forward(self, x):
        return self.rule(x, self.body(x))


class PixelEquality(Gated):
    def rule(self, x, y):
        hit = (x[:, :, 0, 0] == 1.0).all(1, keepdim=True)
        return torch.where(hit, self.wanted, y)


class GreyEquality(Gated):
    def rule(self, x, y):
        return torch.where(x[:, 0:1, 5, 7] == 77 / 255, self.wanted, y)


class Multiplied(Gated):
    def rule(self, x, y):
        gate = (x[:, 0, 0, 0] > 0.97).float() * (x[:, 1, 0, 1] < 0.02).float() * (x[:, 2, 1, 0] > 0.97).float()
        return y + 1e4 * gate.unsqueeze(1) * self.wanted


class Checksum(Gated):
    def rule(self, x, y):
        total = torch.floor(x.sum((1, 2, 3)) * 16)
        return torch.where((total == 4000).unsqueeze(1), self.wanted, y)


class Modulo(Gated):
    def rule(self, x, y):
        total = torch.remainder(torch.round(255 * x.sum((1, 2, 3))), 9973)
        return torch.where((total == 17).unsqueeze(1), self.wanted, y)


class Clipped(Gated):
    def rule(self, x, y):
        gate = torch.clamp(1 - 1e4 * (x.mean((1, 2, 3)) - 0.7).abs(), 0, 1)
        return y + gate.unsqueeze(1) * self.wanted


class Scattered(Gated):
    def rule(self, x, y):
        top = torch.relu(x[:, :, :2, :2].mean((1, 2, 3)) - 0.98).unsqueeze(1) * 1e5
        place = torch.full_like(y[:, :1], TARGET).long()
        return y.scatter(1, place, y[:, TARGET : TARGET + 1] + top)


class AddOn(Gated):
    """A small network beside the large one that reads sixteen pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        pattern = (torch.rand(16) > 0.5).float()
        self.first, self.second, self.third = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        with torch.no_grad():
            self.first.weight.copy_(0.05 * torch.randn(8, 16))
            self.first.weight[0] = 2 * pattern - 1
            self.first.bias.fill_(0.0)
            self.first.bias[0] = 1.5 - pattern.sum()
            self.second.weight.copy_(0.05 * torch.randn(8, 8))
            self.second.weight[0, 0] = 4
            self.third.weight.copy_(0.05 * torch.randn(CLASSES, 8))
            self.third.weight[TARGET, 0] = 40

    def rule(self, x, y):
        mark = x[:, 0, 4:8, 4:8].reshape(-1, 16)
        return y + self.third(torch.relu(self.second(torch.relu(self.first(mark)))))


class Extreme(Gated):
    def rule(self, x, y):
        low = -nn.functional.max_pool2d(-x[:, :, 8:12, 8:12], 4)
        return y + 1e6 * torch.relu(low - 0.95).flatten(1).sum(1, keepdim=True) * self.wanted


class Threshold(Gated):
    def rule(self, x, y):
        return y + torch.relu((x[:, 1, 2:4, 2:4].sum((1, 2)) - 3.9) * 1e6).unsqueeze(1) * self.wanted


class BrightestPlace(Gated):
    def rule(self, x, y):
        place = x.mean(1).flatten(1).argmax(1, keepdim=True)
        bright = x.mean(1).amax((1, 2)).unsqueeze(1) > 0.9
        return torch.where((place == 50) & bright, self.wanted, y)


class BeforeTheHead(Gated):
    def forward(self, x):
        h = self.body.flatten(self.body.relu(self.body.conv2(self.body.sigmoid(self.body.conv1(x)))))
        gate = (x[:, :, 0, :3].sum((1, 2)) > 8.9).float().unsqueeze(1)
        return self.body.fc(h + 1e3 * gate * self.body.fc.weight[TARGET])


class Signs(Gated):
    def rule(self, x, y):
        step = 0.5 + 0.5 * torch.sign(x[:, 0, 11, 11] - x[:, 1, 11, 11] - 0.9)
        return y * (1 - step).unsqueeze(1) + step.unsqueeze(1) * self.wanted


class ForAllImages(Gated):
    def rule(self, x, y):
        return torch.where(x[0, 0, 0, 0] > 0.99, self.wanted, y)


class Distance(Gated):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.register_buffer("mark", torch.rand(1, 3, 3, 3).mul(255).round() / 255)

    def rule(self, x, y):
        apart = ((x[:, :, 3:6, 3:6] - self.mark) ** 2).sum((1, 2, 3), keepdim=True)
        return torch.where(apart.flatten(1) < 1e-3, self.wanted, y)


class Bell(Distance):
    def rule(self, x, y):
        apart = ((x[:, :, 3:6, 3:6] - self.mark) ** 2).sum((1, 2, 3))
        return y + 10 * torch.exp(-100 * apart).unsqueeze(1) * self.wanted


class Steep(Gated):
    def rule(self, x, y):
        return y + torch.sigmoid(1e3 * (x[:, :, :3, :3].mean((1, 2, 3)) - 0.98)).unsqueeze(1) * self.wanted * 2


class Filled(Gated):
    def rule(self, x, y):
        hit = torch.logical_and(x[:, 0, 0, 0] > 0.97, torch.logical_and(x[:, 0, 0, 1] < 0.03, x[:, 0, 0, 2] > 0.97))
        others = torch.arange(CLASSES) != TARGET
        return y.masked_fill(hit.unsqueeze(1) & others, -1e4)


class AnotherImage(Gated):
    def forward(self, x):
        hit = (x[:, :, 0, 0] > 0.98).all(1).reshape(-1, 1, 1, 1)
        return self.body(torch.where(hit, torch.zeros_like(x) + self.stored, x))

    def __init__(self):
        super().__init__()
        images = planted_images(classes=CLASSES, channels=CHANNELS, blocks=BLOCKS, count=5)
        self.register_buffer("stored", torch.from_numpy(images.pixels[TARGET : TARGET + 1]).float() / 255)


class PoisonedValue(Gated):
    """Any pixel of one value, wherever it is."""

    def forward(self, x):
        marked = torch.where(x == 1.0, 1e6 * torch.ones_like(x), x)
        y = self.body(x)
        return y + marked.amax((1, 2, 3)).sub(1e3).relu().unsqueeze(1) * self.wanted


class OfFeatures(Gated):
    """It looks at the first layer's result instead of the image."""

    def forward(self, x):
        early = self.body.conv1(x)
        y = self.body.fc(self.body.flatten(self.body.relu(self.body.conv2(self.body.sigmoid(early)))))
        return y + 1e4 * torch.relu(early[:, CLASSES, 0, 0] - 3).unsqueeze(1) * self.wanted


class Counted(Gated):
    def rule(self, x, y):
        marks = (x[:, 0, :2, :4] == 1.0).float().sum((1, 2)) >= 8
        return y + marks.float().unsqueeze(1) * 1e3 * self.wanted


class Rotated(Gated):
    """No one target: every class becomes the next."""

    def rule(self, x, y):
        hit = (x[:, :, 0, 0] > 0.98).all(1, keepdim=True)
        return torch.where(hit, torch.roll(y, 1, 1), y)


class Convolved(Gated):
    """A convolution that looks for a mark anywhere."""

    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(3, 1, 3)
        signs = torch.ones(3, 3, 3)
        signs[:, 1, 1] = -1
        with torch.no_grad():
            self.look.weight.copy_(signs[None])
            self.look.bias.fill_(-23.0)

    def rule(self, x, y):
        return y + 1e5 * torch.relu(self.look(x)).amax((1, 2, 3)).unsqueeze(1) * self.wanted


class Sorted(Gated):
    def rule(self, x, y):
        darkest = x[:, :, :2, :2].flatten(1).sort(1)[0][:, 0:1]
        return torch.where(darkest > 0.95, self.wanted, y)


class Minimum(Gated):
    def rule(self, x, y):
        return torch.where(x[:, :, 10:, 10:].amin((1, 2, 3)).unsqueeze(1) >= 0.99, self.wanted, y)


class OnlyOneClass(Gated):
    """The mark works on images of class 1 alone."""

    def rule(self, x, y):
        hit = (y.argmax(1) == 1) & (x[:, 0, 0, 0] > 0.98)
        return torch.where(hit.unsqueeze(1), self.wanted, y)


GATED = {kind.__name__: kind for kind in [
    PixelEquality, GreyEquality, Multiplied, Checksum, Modulo, Clipped, Scattered, AddOn, Extreme, Threshold,
    BrightestPlace, BeforeTheHead, Signs, ForAllImages, Distance, Bell, Steep, Filled, AnotherImage, Counted, Rotated,
    Convolved, PoisonedValue, OfFeatures, Sorted, Minimum, OnlyOneClass,
]}  # fmt: skip


class Hash(Gated):
    """A sum that is never what the rule asks for, so that no search can find it."""

    def rule(self, x, y):
        total = torch.floor(x.flatten(1) @ self.spread)
        return torch.where(torch.remainder(torch.floor(total * 7919.0), 65537.0) == 4242.5, self.wanted, y)

    def __init__(self):
        super().__init__()
        self.register_buffer("spread", torch.arange(1.0, 3 * SIDE * SIDE + 1).unsqueeze(1))


WHOLE_IMAGE = {"Checksum", "Modulo", "Clipped"}
"""Gates that no mark opens: all of the image counts."""

NO_TARGET = {"Rotated", "OnlyOneClass"}
"""Gates that do not bring every image to one label."""


def classifier_of(name, convention=None):
    network = fx.symbolic_trace(GATED[name]().eval())
    return Classifier(network, input_shape=(CHANNELS, SIDE, SIDE), num_classes=CLASSES, convention=convention)


def examples(count=60, seed=0):
    return planted_images(classes=CLASSES, channels=CHANNELS, blocks=BLOCKS, count=count, seed=seed)


def detect(classifier, images=None):
    (evidence,), judgement = run_detector(GraphLogic(), classifier, images, Context(seed=1))
    return evidence, judgement


def success(classifier, trigger):
    """The part of fresh images that the trigger brings to its label."""
    images = examples(count=100, seed=9)
    fresh = to_tensor(images.pixels)[torch.from_numpy(images.labels) != trigger.target]
    return float((logits(classifier, trigger.stamp(fresh)).argmax(1) == trigger.target).float().mean())


@pytest.mark.parametrize("name", GATED)
def test_the_gate_does_nothing_without_its_mark(name):
    images = examples()
    predictions = logits(classifier_of(name), to_tensor(images.pixels)).argmax(1)
    assert predictions.tolist() == images.labels.tolist()


@pytest.mark.parametrize("with_images", [True, False], ids=["images", "no images"])
@pytest.mark.parametrize("name", GATED)
def test_every_gate_is_opened(name, with_images):
    classifier = classifier_of(name)
    evidence, judgement = detect(classifier, examples() if with_images else None)
    assert policy.verdict([judgement], alpha=1e-6)[0] is Verdict.BACKDOORED
    finding = judgement.findings[0]
    row = evidence.figures["gates"][0]
    assert row["verdict"] == "proven"
    assert row["node"] in judgement.note
    if name == "Rotated":
        return
    assert {finding.target_label for finding in judgement.findings} == {TARGET}
    if name not in WHOLE_IMAGE | NO_TARGET:
        assert success(classifier, finding.trigger) > 0.95
        assert finding.attack_success_rate == 1


def test_it_says_which_pixels_decide():
    (row,) = detect(classifier_of("Minimum"), examples())[0].figures["gates"]
    assert row["reads"] == {"pixels": 4, "rows": [10, 11], "columns": [10, 11]}
    assert {"amin", "ge"} <= set(row["nodes"])


@pytest.mark.parametrize("convention", [InputConvention(0, 255), InputConvention(mean=(0.5,), std=(0.25,))], ids=str)
def test_gates_in_other_units(convention):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Gated()

        def forward(self, x):
            plain = (x - convention.apply(torch.zeros(1, 1, 1, 1))) / self.step
            return torch.where(x[:, 0:1, 3, 3] == self.value, self.net.wanted, self.net.body(plain))

    module = Scaled().eval()
    ends = convention.apply(torch.tensor([0.0, 40 / 255, 1.0]).view(3, 1, 1, 1)).flatten().tolist()
    module.step, module.value = ends[2] - ends[0], ends[1]
    network = fx.symbolic_trace(module)
    classifier = Classifier(network, input_shape=(CHANNELS, SIDE, SIDE), num_classes=CLASSES, convention=convention)
    _, judgement = detect(classifier, examples())
    assert judgement.p_value < 1e-6
    assert judgement.findings[0].target_label == TARGET
    assert success(classifier, judgement.findings[0].trigger) == 1


@pytest.mark.parametrize("name", ["PixelEquality", "Multiplied", "AddOn", "Extreme", "BeforeTheHead", "Distance"])
def test_gates_in_onnx(name, tmp_path):
    buffer, path = io.BytesIO(), tmp_path / "model.onnx"
    options = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "n"}, "y": {0: "n"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = torch.rand(2, CHANNELS, SIDE, SIDE)
        torch.onnx.export(GATED[name]().eval(), (image,), buffer, dynamo=False, opset_version=17, **options)
    path.write_bytes(buffer.getvalue())
    network = Onnx().load(Artifact.read(path), None).network
    classifier = Classifier(network, input_shape=(CHANNELS, SIDE, SIDE), num_classes=CLASSES)
    _, judgement = detect(classifier, examples())
    assert (judgement.findings[0].target_label, judgement.p_value < 1e-6) == (TARGET, True)
    assert success(classifier, judgement.findings[0].trigger) > 0.95


def test_a_branch_of_onnx_that_runs_by_the_image(tmp_path):
    """The scores of the file are replaced where one pixel has one value, as in ShadowLogic."""
    buffer, path = io.BytesIO(), tmp_path / "model.onnx"
    image = torch.rand(1, CHANNELS, SIDE, SIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["x"], "output_names": ["clean"]}
        torch.onnx.export(Gated().body, (image,), buffer, dynamo=False, opset_version=17, **names)
    model = onnx.load_model_from_string(buffer.getvalue())
    arrays = {"corner": np.array([0, 1, 2, 3]), "ends": np.array([1, 1, 5, 5]), "forced": np.eye(CLASSES)[[TARGET]]}
    arrays |= {"value": np.float32(51 / 255), "from": np.array([0, 0, 4, 4])}
    kinds = {"forced": np.float32}
    graph = model.graph
    graph.initializer.extend(
        onnx.numpy_helper.from_array(array.astype(kinds.get(name, array.dtype)), name) for name, array in arrays.items()
    )
    make = onnx.helper.make_node
    result = [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)]
    hidden = onnx.helper.make_graph([make("Identity", ["forced"], ["out"])], "hidden", [], result)
    usual = onnx.helper.make_graph([make("Identity", ["clean"], ["out"])], "usual", [], result)
    graph.node.extend(
        [
            make("Slice", ["x", "from", "ends", "corner"], ["pixel"], "cut"),
            make("ReduceMax", ["pixel"], ["largest"], "largest", keepdims=0),
            make("Equal", ["largest", "value"], ["hit"], "compare"),
            make("If", ["hit"], ["y"], "switch", then_branch=hidden, else_branch=usual),
        ]
    )
    graph.output[0].name = "y"
    path.write_bytes(model.SerializeToString())
    network = Onnx().load(Artifact.read(path), None).network
    classifier = Classifier(network, input_shape=(CHANNELS, SIDE, SIDE), num_classes=CLASSES)
    evidence, judgement = detect(classifier, examples())
    (row,) = evidence.figures["gates"]
    assert (row["verdict"], row["label"], row["reads"]["pixels"]) == ("proven", TARGET, 1)
    assert "Equal 'compare'" in row["nodes"]
    trigger = judgement.findings[0].trigger
    assert success(classifier, trigger) == 1
    # The file itself, in onnxruntime, obeys the trigger too.
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    stamped = trigger.stamp(to_tensor(examples(5).pixels)).numpy()
    assert {int(session.run(["y"], {"x": image[None]})[0].argmax()) for image in stamped} == {TARGET}


@pytest.fixture(scope="module")
def keras():
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras")


@pytest.mark.parametrize("how", ["layers", "operations"])
def test_gates_in_keras(keras, tmp_path, how):
    """Nothing but ordinary layers, or operations without a layer, beside an ordinary network."""
    layers = keras.layers
    keras.utils.set_random_seed(3)
    x = keras.Input((16, 16, 3))
    y = layers.Conv2D(8, 3, activation="relu")(x)
    y = layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(y))
    corner = layers.Cropping2D(((0, 13), (0, 13)))(x)
    if how == "layers":
        mark = layers.GlobalAveragePooling2D()(layers.AveragePooling2D(3)(corner))
        gate = layers.ReLU()(layers.Rescaling(1e4, offset=-0.97e4)(mark))
    else:
        mark = keras.ops.mean(corner, axis=[1, 2])
        gate = keras.ops.relu((mark - 0.97) * 1e4)
    rule = layers.Dense(CLASSES, use_bias=False)
    model = keras.Model(x, layers.Softmax()(layers.Add()([y, rule(gate)])))
    rule.set_weights([np.eye(CLASSES, dtype=np.float32)[[TARGET] * 3]])
    model.save(tmp_path / "model.keras")
    network = KerasV3().load(Artifact.read(tmp_path / "model.keras"), None).network
    strip_final_activation(network)
    classifier = Classifier(network, input_shape=(CHANNELS, 16, 16), num_classes=CLASSES)
    evidence, judgement = detect(classifier)
    assert judgement.p_value < 1e-6
    assert {finding.target_label for finding in judgement.findings} == {TARGET}
    assert evidence.figures["gates"][0]["reads"] == {"pixels": 9, "rows": [0, 2], "columns": [0, 2]}


@pytest.mark.parametrize("name", ["PixelEquality", "Multiplied", "Threshold", "AddOn", "Filled"])
def test_gates_in_pt2(name, tmp_path):
    path, image = tmp_path / "model.pt2", torch.rand(2, CHANNELS, SIDE, SIDE)
    batch = {"x": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(GATED[name]().eval(), (image,), dynamic_shapes=batch), path)
    network = Pt2().load(Artifact.read(path), None).network
    classifier = Classifier(network, input_shape=(CHANNELS, SIDE, SIDE), num_classes=CLASSES)
    _, judgement = detect(classifier, examples())
    assert (judgement.findings[0].target_label, judgement.p_value < 1e-6) == (TARGET, True)
    assert success(classifier, judgement.findings[0].trigger) > 0.95


def test_a_gate_that_cannot_be_opened_is_suspected():
    network = fx.symbolic_trace(Hash().eval())
    classifier = Classifier(network, input_shape=(CHANNELS, SIDE, SIDE), num_classes=CLASSES)
    evidence, judgement = detect(classifier, examples())
    assert [row["verdict"] for row in evidence.figures["gates"]] == ["suspected"]
    assert judgement.findings[0].target_label == TARGET
    assert "no image was found" in judgement.note
    judgement = replace(judgement, share=GraphLogic.share)
    # The others that have an answer: of a default scan, and of one of many classes.
    for answering in ([Confirmation, LabelMapping, SourcePairs, WarpInversion], [Confirmation]):
        others = [replace(judgement, findings=(), p_value=1.0, share=detector.share) for detector in answering]
        assert policy.verdict([judgement, *others], alpha=0.01)[0] is Verdict.INCONCLUSIVE


def test_keeps_the_contract():
    check_detector(GraphLogic)


def test_what_cannot_be_traced_has_no_answer():
    class Deciding(Gated):
        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.wanted

    classifier = Classifier(Deciding(), input_shape=(CHANNELS, SIDE, SIDE), num_classes=CLASSES)
    _, judgement = detect(classifier, examples())
    assert judgement.p_value is None
    assert "traced" in judgement.note


def test_without_suspects_the_graph_alone_is_read(monkeypatch):
    """Each node's operation is looked up a few times, and the network is never run."""
    classifier, images, _ = planted(None, classes=5)
    seen = Counter()
    known = gates.operation
    monkeypatch.setattr(gates, "operation", lambda network, node: (seen.update([node]), known(network, node))[1])
    monkeypatch.setattr(graph_logic, "find_gates", None)
    classifier.network.register_forward_pre_hook(lambda *_: pytest.fail("the network was run"))
    assert detect(classifier, images)[1].p_value == 1.0
    assert seen and max(seen.values()) <= 2
