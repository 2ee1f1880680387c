"""Networks come out of a file as they went in: same numbers, layers, names, for any number of images."""

from __future__ import annotations

import io

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from backdoorscan import graph
from backdoorscan.artifact import Artifact
from backdoorscan.errors import UnsupportedModelError, UsageError
from backdoorscan.formats.loading import ReadOptions, load_model
from backdoorscan.formats.pt2 import loader
from backdoorscan.formats.pt2.loader import Pt2
from backdoorscan.ops.gates import suspects
from backdoorscan.plugin import hookspecs
from backdoorscan.registry import Registry


def check(model, loaded, shape=(3, 16, 16), tolerance=1e-6):
    images = torch.rand(5, *shape)
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(images), model(images), rtol=0, atol=tolerance)


@pytest.mark.parametrize("batch", [None, 1, 2], ids=["dynamic", "one", "two"])
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet", "vit"])
def test_networks(name, batch, network, save, load):
    model = network(name)
    loaded = load(save(model, batch=batch))
    check(model, loaded)
    assert (loaded.input_shape, loaded.layout) == ((3, 16, 16), "NCHW")
    assert loaded.num_classes == model(torch.rand(1, 3, 16, 16)).shape[1]


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vit"])
def test_decomposed_programs(name, network, save, load):
    model = network(name)
    loaded = load(save(model, decomposed=True))
    check(model, loaded, tolerance=1e-5)
    assert any(isinstance(module, nn.Linear) for module in loaded.network.modules())


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet"])
def test_layers_and_tensors_are_named_as_in_the_file(name, network, save, load):
    model = network(name)
    loaded = load(save(model)).network
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert {key for key, _ in loaded.named_parameters()} == {key for key, _ in model.named_parameters()}
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    found, expected = (
        {key: type(m) for key, m in module.named_modules() if isinstance(m, kinds)} for module in (loaded, model)
    )
    assert found == expected


def test_parameters_outside_of_layers_are_trained(network, save, load):
    model = network("vit")
    for batch in (None, 2):
        loaded = load(save(model, batch=batch)).network
        parameters = dict(loaded.named_parameters())
        assert {"class_token", "positions", "blocks.0.gamma"} <= parameters.keys()
        loaded(torch.rand(3, 3, 16, 16)).sum().backward()
        assert all(parameter.grad is not None for parameter in parameters.values())


def test_the_graph_answers_questions(resnet_file, load):
    network = load(resnet_file).network
    assert isinstance(network, fx.GraphModule)
    assert graph.head_node(network).target == "fc"
    assert graph.last_conv_node(network).target == "layer1.1.downsample.0"
    front, rest = graph.split(network, graph.find_layer(network, "layer1.0.conv1"))
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(rest(*front(images)), network(images))


def test_a_final_softmax_can_be_taken_off(network, save, load):
    model = network("densenet")
    loaded = load(save(model)).network
    assert graph.strip_final_activation(loaded) == "softmax"
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images).softmax(1), model(images))


class InPlace(nn.Module):
    """Whose values depend on what happens in place, and in what order."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(12, 3)

    def forward(self, x):
        x = x * 2
        if self.kind == "later use":
            y = x.sub_(1.0)
            x = x + y.relu()
        elif self.kind == "view":
            y = x.view(-1, 12)
            x.sub_(1.0)
            return self.fc(y)
        elif self.kind == "slice":
            x[:, 0] = 0.5
        return self.fc(torch.flatten(x, 1))


def test_a_value_changed_in_place(save, load):
    model = InPlace("later use").eval()
    check(model, load(save(model, (3, 2, 2))), (3, 2, 2))


@pytest.mark.parametrize("kind", ["view", "slice"])
def test_memory_that_two_values_share_is_not_guessed_at(kind, save, load):
    with pytest.raises(UnsupportedModelError, match="memory"):
        load(save(InPlace(kind).eval(), (3, 2, 2)))


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x.permute(0, 3, 1, 2))).mean((2, 3)))


def test_channels_last(save, load):
    model = ChannelsLast().eval()
    loaded = load(save(model, (8, 6, 3)))
    assert (loaded.layout, loaded.input_shape) == ("NHWC", (3, 8, 6))
    images = torch.rand(4, 3, 8, 6)
    torch.testing.assert_close(loaded.network(images), model(images.permute(0, 2, 3, 1)))
    assert not [node for node in loaded.network.graph.nodes if node.target is torch.permute]


def test_tied_and_shared_layers(save, load):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(F.relu(self.first(F.relu(self.first(x)))))

    model = Tied().eval()
    loaded = load(save(model, (4,)))
    check(model, loaded, (4,))
    parameters = [p for p in loaded.network.parameters() if p.ndim == 2]
    assert len(parameters) == 1
    assert loaded.input_shape == (4,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_in_float32(dtype, save, load):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3).to(dtype)

        def forward(self, x):
            return self.fc(x.to(dtype)).float()

    model = Half().eval()
    loaded = load(save(model, (6,)))
    check(model, loaded, (6,), 2e-2)
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}


def test_sizes_that_are_left_open(save, load):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (torch.rand(2, 3, 16, 18),), dynamic_shapes=(sizes,)), buffer)
    loaded = load(buffer.getvalue())
    assert loaded.input_shape == (3, None, None)
    check(model, loaded, (3, 20, 9))


def test_what_decides_by_the_image_is_seen(save, load):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return torch.where(x[:, :1] > 0.9, torch.tensor([9.0, 0.0]), self.fc(x))

    model = Gate().eval()
    loaded = load(save(model, (4,)))
    check(model, loaded, (4,))
    assert [decision.target for decision in suspects(loaded.network).decisions] == [torch.gt]
    assert torch.where in {node.target for node in loaded.network.graph.nodes}


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: x.flip(0).flatten(1), "does not compute"),
        (lambda x: x.flatten(1) - x.flatten(1).mean(0, keepdim=True), "every image by itself"),
        (lambda x: (x * x).flatten(2), "values of the shape N×3×4"),
        (lambda x: (x.flatten(1) * 2, x * 3), "returns 2 tensors"),
        (lambda x: F.dropout(x.flatten(1), training=True), "training mode"),
        (lambda x: torch.fft.fft(x.flatten(1)).real, "fft"),
        (lambda x: x.flatten(1) + torch.rand_like(x.flatten(1)), "rand_like"),
    ],
    ids=["mixed images", "batch mean", "no scores", "two outputs", "training", "fft", "random"],
)
def test_refusals(forward, message, save, load):
    class Module(nn.Module):
        def forward(self, x):
            return forward(x)

    with pytest.raises(UnsupportedModelError) as caught:
        load(save(Module(), (3, 2, 2)))
    assert message in str(caught.value)


def test_control_flow_is_refused(save, load):
    class Conditional(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 3, lambda y: y * 2, lambda y: y - 1, (x,))

    with pytest.raises(UnsupportedModelError, match="higher_order"):
        load(save(Conditional(), (4,), batch=2))


def test_an_architecture_of_the_users_is_not_needed(resnet_file, artifact):
    with pytest.raises(UsageError, match="its own architecture"):
        Pt2().load(artifact(resnet_file), "file.py:net")


def test_found_by_its_content(resnet, resnet_file, tmp_path):
    registry = Registry()
    registry.manager.add_hookspecs(hookspecs)
    registry.add(lambda: loader, "pt2", "core", "1")
    path = tmp_path / "model.bin"
    path.write_bytes(resnet_file)
    options = ReadOptions(input_range=(0, 1), input_shape=(3, 16, 16))
    classifier = load_model(Artifact.read(path), None, options, registry=registry).classifier
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(classifier(images), resnet(images))
    assert classifier.details["framework"].startswith("torch 2.")
