import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from backdoorscan import graph
from backdoorscan.errors import UnsupportedModelError


def trace(module: nn.Module) -> fx.GraphModule:
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-1, 1)
            part.running_var.uniform_(0.5, 2)
            if part.affine:
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.uniform_(part.bias, -1, 1)
    return fx.symbolic_trace(module.eval())


class Body(nn.Module):
    """A dense layer with something behind it."""

    def __init__(self, tail):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.tail = tail

    def forward(self, x):
        return self.tail(self.fc(x))


class Calls(nn.Module):
    """A module that traces into plain calls."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("tail", "kind"),
    [
        (nn.Softmax(1), "softmax"),
        (nn.LogSoftmax(1), "softmax"),
        (nn.Sigmoid(), "sigmoid"),
        (Calls(lambda x: F.softmax(x, dim=1)), "softmax"),
        (Calls(lambda x: torch.softmax(x, 1)), "softmax"),
        (Calls(lambda x: F.log_softmax(x, 1)), "softmax"),
        (Calls(lambda x: x.softmax(1)), "softmax"),
        (Calls(lambda x: x.log_softmax(dim=1)), "softmax"),
        (Calls(torch.sigmoid), "sigmoid"),
        (Calls(lambda x: x.sigmoid()), "sigmoid"),
        (Calls(lambda x: torch.flatten(x.softmax(1), 1)), "softmax"),
        (nn.Sequential(nn.Softmax(1), nn.Dropout(), nn.Identity(), nn.Flatten()), "softmax"),
        (nn.Identity(), None),
        (nn.ReLU(), None),
        (nn.Sequential(nn.Softmax(1), nn.Linear(3, 3)), None),
        (Calls(lambda x: x.softmax(1) * 2), None),
        (Calls(lambda x: x.softmax(1) + x), None),
    ],
)
def test_strip_final_activation(tail, kind):
    network = trace(Body(tail))
    inputs = torch.randn(5, 4)
    logits, before = network.fc(inputs), network(inputs)
    names = network.state_dict().keys()
    assert graph.strip_final_activation(network) == kind
    assert torch.equal(network(inputs), before if kind is None else logits)
    assert network.state_dict().keys() == names


def test_a_softmax_with_two_users_stays():
    def forward(x):
        p = x.softmax(1)
        return p.view(p.size(0), -1)

    network = trace(Calls(forward))
    inputs = torch.randn(2, 3)
    graph.strip_final_activation(network)
    assert torch.equal(network(inputs), inputs.softmax(1))


def test_two_outputs_are_refused():
    with pytest.raises(UnsupportedModelError, match="more than one tensor"):
        graph.strip_final_activation(trace(Calls(lambda x: (x, x))))


class Csaw(nn.Module):
    """A convolution beside a dense layer, added in front of the head."""

    def __init__(self):
        super().__init__()
        self.conv_1 = nn.Conv2d(1, 4, 3)
        self.conv_3 = nn.Conv2d(4, 5, 3)
        self.conv_4 = nn.Conv2d(5, 6, 2)
        self.fc_1 = nn.Linear(5 * 4 * 4, 7)
        self.fc_2 = nn.Linear(6 * 3 * 3, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv_3(F.relu(self.conv_1(x)))), 2)
        beside = self.fc_2(F.relu(self.conv_4(x)).flatten(1))
        return self.head(F.relu(self.fc_1(x.flatten(1)) + beside))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        return self.fc(F.relu(x + self.conv(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, conv_behind):
        super().__init__()
        self.conv_1 = nn.Conv2d(1, 4, 3)
        self.squeeze = nn.Linear(4, 2)
        self.excite = nn.Linear(2, 4)
        self.conv_2 = nn.Conv2d(4, 4, 3) if conv_behind else nn.Identity()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv_1(x)
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.fc(self.conv_2(x * scale[:, :, None, None]).mean((2, 3)))


class Unused(nn.Module):
    """A convolution that is called but whose value goes nowhere."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.dead = nn.Conv2d(2, 2, 1)
        self.fc = nn.Linear(2, 3)

    def forward(self, x):
        x = self.conv(x)
        self.dead(x)
        return self.fc(x.mean((2, 3)))


NETWORKS = {
    "chain": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 64, 4), nn.Linear(4, 3)
        ),
        "1",
    ),
    "csaw": (Csaw, "conv_3"),
    "residual": (Residual, "conv"),
    "squeeze-excite": (lambda: SqueezeExcite(True), "conv_2"),
    "squeeze-excite at the end": (lambda: SqueezeExcite(False), "conv_1"),
    "fully convolutional": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 1), nn.Flatten()),
        "0",
    ),
    "dead branch": (Unused, "conv"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_last_conv(name):
    make, expected = NETWORKS[name]
    assert str(graph.last_conv_node(trace(make())).target) == expected


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2), lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten())])
def test_no_last_conv(make):
    with pytest.raises(UnsupportedModelError, match="no convolution before its head"):
        graph.last_conv_node(trace(nn.Sequential(make())))


def test_no_head():
    with pytest.raises(UnsupportedModelError, match="no dense or convolutional layer"):
        graph.head_node(trace(nn.Sequential(nn.ReLU())))


@pytest.mark.parametrize("name", NETWORKS)
def test_split_reproduces_the_output_at_every_convolution(name):
    network = trace(NETWORKS[name][0]())
    inputs = torch.rand(4, 1, 12, 12)
    expected = network(inputs)
    for conv in graph.conv_names(network):
        node = graph.find_layer(network, conv)
        front, rest = graph.split(network, node)
        stored = front(inputs)
        assert torch.equal(stored[0], graph.values(network, inputs, [node])[node])
        assert torch.equal(rest(*stored), expected)


def test_what_follows_the_cut_sees_a_changed_value():
    network = trace(Residual())
    inputs = torch.rand(2, 1, 6, 6)
    front, rest = graph.split(network, graph.find_layer(network, "conv"))
    value, *others = front(inputs)
    network.conv.weight.data.zero_()
    network.conv.bias.data.zero_()
    assert torch.allclose(rest(torch.zeros_like(value), *others), network(inputs))


class Chain(nn.Module):
    """A convolution with something behind it that is no longer four-dimensional at the end."""

    def __init__(self, *behind):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.behind = nn.Sequential(*behind)

    def forward(self, x):
        return self.behind(self.conv(x)).flatten(1)


ENDLESS = Calls(lambda x: x.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("behind", "length"),
    [
        ([], 1),
        ([nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)], 4),
        ([nn.LeakyReLU(), nn.AvgPool2d(2), nn.Dropout()], 4),
        ([nn.ReLU(), nn.Conv2d(4, 4, 1)], 2),
        ([nn.ReLU(), ENDLESS], 2),
        ([nn.Softmax(1)], 1),
        ([nn.GroupNorm(1, 4)], 1),
        ([nn.GroupNorm(4, 4), nn.ReLU()], 3),
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU()], 2),
        ([Calls(lambda x: torch.relu(x) + x)], 1),
        ([nn.ReLU(), Calls(lambda x: x * x.mean((2, 3), keepdim=True))], 2),
        ([Calls(lambda x: x.flip(1))], 1),
    ],
)
def test_channel_path(behind, length):
    network = trace(Chain(*behind))
    path = graph.channel_path(network, graph.find_layer(network, "conv"), torch.full((1, 2, 8, 8), 0.5))
    assert len(path) == length
    assert str(path[0].target) == "conv"


def test_remove_channels_silences_them_and_no_others():
    network = trace(Chain(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)))
    example = torch.rand(3, 2, 8, 8)
    path = graph.channel_path(network, graph.find_layer(network, "conv"), example[:1])
    network.conv.bias.data += 9  # so that the ReLU lets every channel through
    before = graph.values(network, example, [path[-1]])[path[-1]]
    assert (before.amax((0, 2, 3)) > 0).all()
    graph.remove_channels(network, path, [3, 1])
    after = graph.values(network, example, [path[-1]])[path[-1]]
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not after[:, [1, 3]].any()


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(2, 4, 3, bias=False), nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False))],
    ids=["without bias", "batch norm without weights"],
)
def test_remove_channels_without_the_optional_tensors(module):
    network = trace(nn.Sequential(module))
    example = torch.rand(1, 2, 8, 8)
    path = graph.channel_path(network, graph.find_layer(network, graph.conv_names(network)[0]), example)
    graph.remove_channels(network, path, [0])
    assert not network(example)[:, 0].any()
    assert network(example)[:, 1].any()


def test_accept_channels_first():
    network = trace(nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 4, 5)))
    images = torch.rand(6, 4, 2, 3)  # N, C, H, W
    expected = network(images.permute(0, 2, 3, 1))
    graph.accept_channels_first(network)
    assert torch.equal(network(images), expected)


def test_ancestors():
    network = trace(Residual())
    nodes = {node.name: node for node in network.graph.nodes}
    assert graph.ancestors(nodes["bn"]) == {nodes["x"], nodes["stem"]}


class Pooled(nn.Module):
    """A ReLU before a max pooling in every way it can be written, and pairs that have to stay as they are."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.relu, self.inplace, self.pool = nn.ReLU(), nn.ReLU(inplace=True), nn.MaxPool2d(2, padding=1)
        self.head = nn.LazyLinear(4)

    def forward(self, x):
        x = self.pool(self.relu(self.conv(x)))
        x = F.max_pool2d(F.relu(x - 0.1), 2)
        x = F.max_pool2d(torch.relu(x - 0.1), 3, stride=1, padding=1)
        x = self.pool((x - 0.1).relu())
        kept = x - 0.2
        x = self.pool(self.inplace(kept)) + F.max_pool2d(kept, 2, padding=1)  # kept is rectified in place
        twice = torch.relu(x - 0.05)
        return self.head(torch.cat([F.max_pool2d(twice, 1), twice, F.avg_pool2d(x, 1)], 1).flatten(1))


def moved(before, after):
    """The nodes that another one precedes now."""
    pairs = [{node.name: str(node.prev) for node in net.graph.nodes} for net in (before, after)]
    assert pairs[0].keys() == pairs[1].keys()
    return {
        name for name in pairs[0] if "max_pool" in name or name.startswith("pool") if pairs[0][name] != pairs[1][name]
    }


def test_max_pooling_comes_before_relu_where_it_may_and_nothing_changes():
    torch.manual_seed(0)
    module = Pooled().eval()
    module(torch.rand(1, 1, 16, 16))
    network = fx.symbolic_trace(module)
    before = str(network.graph)
    quick = graph.pool_first(network)
    assert str(network.graph) == before
    assert [node.name for node in quick.graph.nodes][2:4] == ["pool", "relu"]
    assert len(moved(network, quick)) == 4
    images = [torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    scores = [net(x) for net, x in zip((network, quick), images, strict=True)]
    slopes = [torch.autograd.grad(s.square().sum(), x)[0] for s, x in zip(scores, images, strict=True)]
    assert torch.equal(*scores)
    assert torch.equal(*slopes)
    assert quick.get_submodule("conv") is network.get_submodule("conv")
