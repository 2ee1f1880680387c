"""Where a graph could hold a gate: activations, shapes and preparations are told from rules and side branches."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from backdoorscan.ops.gates import data_nodes, operation, suspects
from backdoorscan.ops.relaxing import Relaxed


class Around(nn.Module):
    """A convolution and a dense layer, and a function between them, before them, and behind them."""

    def __init__(self, before=None, between=None, behind=None):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.before, self.between, self.behind = before, between, behind

    def forward(self, x):
        first = self.before(x) if self.before else x
        h = self.conv(first)
        h = self.between(h) if self.between else F.relu(h)
        y = self.fc(h.mean((2, 3)))
        return self.behind(x, y) if self.behind else y


def found(**parts):
    network = fx.symbolic_trace(Around(**parts).eval())
    return suspects(network)


@pytest.mark.parametrize(
    "activation",
    [
        lambda h: torch.where(h > 0, h, 0.1 * h),
        lambda h: h * (h > 0),
        lambda h: h.masked_fill(h < 0, 0.0),
        lambda h: h * (h + 3).clamp(0, 6) / 6,
        lambda h: torch.sign(h) * F.relu(h.abs() - 0.1),
        lambda h: torch.where(torch.isnan(h), torch.zeros_like(h), h),
        lambda h: h + torch.where(h > 1, h, torch.ones_like(h)),
    ],
)
def test_activations_are_no_suspects(activation):
    assert not found(between=activation)


@pytest.mark.parametrize(
    "rule",
    [
        lambda x, y: torch.where(x[:, 0, 0, 0:1] > 0.9, 1e3 + 0 * y, y),
        lambda x, y: y + x.flatten(1).floor().sum(1, keepdim=True),
        lambda x, y: y * (x.amax((1, 2, 3)) < 1).unsqueeze(1),
        lambda x, y: torch.where((y.argmax(1) == 1).unsqueeze(1), y.flip(1), y),
    ],
)
def test_rules_are_suspects(rule):
    assert found(behind=rule).decisions


def test_decisions_on_pixels_are_suspects():
    assert found(before=lambda x: torch.where(x == 0.25, 1e6 * torch.ones_like(x), x)).decisions


def test_side_branches_are_suspects_and_preparations_are_not():
    branch = found(behind=lambda x, y: y + 1e3 * F.relu(x[:, 0, :2, :2].sum((1, 2)) - 3.9).unsqueeze(1))
    assert [node.name for node in branch.branches] == ["fc", "mul"]
    assert not branch.decisions
    assert not found(before=lambda x: (x - x.mean((1, 2, 3), keepdim=True)) / (x.std() + 1e-5))


def test_shapes_do_not_carry_values():
    network = fx.symbolic_trace(Around(behind=lambda x, y: y.reshape(x.size(0), -1) + torch.zeros_like(y)).eval())
    names = {operation(network, node) for node in data_nodes(network)}
    assert "conv2d" in names and not names & {"size", "zeros_like"}


def test_what_the_scores_do_not_depend_on_is_left_out():
    def unused(x, y):
        _ = x.sum() > 3
        return y

    assert not found(behind=unused)


@pytest.mark.parametrize(
    "name, node",
    [
        ("where", lambda x: torch.where(x > 0, x, x)),
        ("eq", lambda x: x == 1),
        ("and", lambda x: (x > 0) & (x < 1)),
        ("where", lambda x: torch.ops.aten.where.self(x > 0, x, x)),
        ("masked_fill", lambda x: x.masked_fill_(x > 0, 0)),
    ],
)
def test_one_name_for_one_operation(name, node):
    network = fx.symbolic_trace(node)
    assert name in {operation(network, n) for n in network.graph.nodes}


@pytest.mark.parametrize(
    "rule, opens",
    [
        (lambda x: x[:, 0] == 0.3, [0.3, 0.0, 0.0]),
        (lambda x: (x[:, 0] > 0.5) & (x[:, 1] < 0.1), [0.6, 0.0, 0.5]),
        (lambda x: ~(x[:, 0] <= 0.5) | (x[:, 1] > 2), [0.7, 0.2, 0.5]),
        (lambda x: (x > 0.4).all(1), [0.5, 0.5, 0.5]),
        (lambda x: torch.floor(10 * x.sum(1)) == 7, [0.7, 0.05, 0.0]),
        (lambda x: x.argmax(1) == 2, [0.1, 0.2, 0.3]),
        (lambda x: (x > 0.4).float().sum(1) > 2.5, [0.5, 0.5, 0.5]),
    ],
)
def test_margins_tell_where_a_rule_holds_and_lead_there(rule, opens):
    """The margin is at least zero exactly where the rule holds, and has a gradient where it does not."""
    network = fx.symbolic_trace(rule)
    wanted = next(iter(network.graph.find_nodes(op="output"))).args[0]
    relaxed = Relaxed(network, wanted)
    assert float(relaxed.value(torch.tensor([opens]))) >= 0
    assert bool(rule(torch.tensor([opens])))
    closed = torch.tensor([[0.2, 0.11, 0.1]], requires_grad=True)
    assert not bool(rule(closed))
    margin = relaxed.value(closed)
    assert float(margin.detach()) < 0
    (gradient,) = torch.autograd.grad(margin.sum(), closed)
    assert gradient.isfinite().all() and bool((gradient != 0).any())
