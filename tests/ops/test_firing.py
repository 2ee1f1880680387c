"""Gates are told from what varies, opened, and judged by what the network says."""

import pytest
import torch
from torch import fx, nn

from backdoorscan.classifier import Classifier, to_tensor
from backdoorscan.ops.firing import fire, force
from backdoorscan.ops.gates import suspects
from backdoorscan.ops.resting import answer, find_gates
from backdoorscan.plugin.testing import planted_images, planted_network


class Ruled(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.body = planted_network(None, classes=4, blocks=3)
        self.rule = rule
        self.register_buffer("wanted", 50 * torch.eye(4)[2:3])

    def forward(self, x):
        return self.rule(x, self.body(x), self.wanted)


def of(rule):
    network = fx.symbolic_trace(Ruled(rule).eval())
    classifier = Classifier(network, input_shape=(1, 12, 12), num_classes=4)
    images = to_tensor(planted_images(classes=4, blocks=3, count=12).pixels)
    return classifier, images, find_gates(classifier, suspects(network), images)


def pixel(x, y, wanted):
    return torch.where(x[:, :, 4, 4] > 0.97, wanted, y)


def half_the_images(x, y, wanted):
    return torch.where(x[:, :, 4, 5] > 0.5, 1.1 * y, y)


def never(x, y, wanted):
    return torch.where(x[:, :, 4, 4] > 1.5, wanted, y)


def harmless(x, y, wanted):
    return torch.where(x[:, :, 4, 4] > 0.97, 1.01 * y, y)


def test_a_gate_is_what_rests_on_all_images():
    _, _, gates = of(pixel)
    assert [(gate.node.name, gate.rest.item(), gate.decides) for gate in gates] == [("gt", False, True)]
    assert not of(half_the_images)[2]


def test_opening_it_names_pixel_and_label():
    classifier, images, gates = of(pixel)
    effect, samples = fire(classifier, gates[0], gates, images, images[:2])
    assert effect.proves and (effect.target, effect.overturned) == (2, 1.0)
    assert effect.trigger.mask.nonzero().tolist() == [[0, 4, 4]]
    assert effect.trigger.pattern[0, 4, 4] > 0.97
    assert samples > 0
    assert force(classifier, gates[0], gates, images).target == 2


def test_what_no_image_opens_can_only_be_forced():
    classifier, images, gates = of(never)
    assert fire(classifier, gates[0], gates, images, images[:2])[0] is None
    forced = force(classifier, gates[0], gates, images)
    assert forced.proves and forced.trigger is None


@pytest.mark.parametrize("how", [fire, force])
def test_a_rule_that_changes_no_label_proves_nothing(how):
    classifier, images, gates = of(harmless)
    arguments = (images[:2],) if how is fire else ()
    effect = how(classifier, gates[0], gates, images, *arguments)
    effect = effect[0] if how is fire else effect
    assert effect is not None and not effect.proves


def test_nodes_can_be_held():
    classifier, images, gates = of(pixel)
    marked = images[:1].clone()
    marked[:, :, 4, 4] = 1
    assert answer(classifier, marked).argmax() == 2
    held = answer(classifier, marked, {gates[0].node: gates[0].rest})
    assert held.argmax() != 2


def test_a_branch_counts_as_silent_only_while_nothing_selects_it():
    classifier, images, gates = of(harmless)
    assert [gate.decides for gate in gates] == [True, False]
    forced = force(classifier, gates[0], gates, images)
    assert (forced.constant, forced.overturned) == (0.25, 0.0)
