"""Every repairer of the installation keeps the contract, and pruning does what it says."""

from dataclasses import dataclass, replace

import pytest
import torch
from backdoorscan_plugins.fine_pruning import Prune

from backdoorscan import graph
from backdoorscan.classifier import logits, to_tensor
from backdoorscan.errors import UnknownNameError, UsageError
from backdoorscan.findings import Finding
from backdoorscan.ops.metrics import accuracy, attack_success_rate
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.repairer import Candidate, Repairer
from backdoorscan.plugin.testing import ContractError, check_repairer, planted
from backdoorscan.registry import installed

QUICK = {
    "unlearn": {"rounds": 1, "sample": 64},
    "retrain": {"steps": 4, "head_steps": 4},
    "gangsweep": {"steps": 4, "head_steps": 4, "generator_steps": 4},
    "fine-prune": {"epochs": 1},
}
"""The contract is checked, not the effect."""

REPAIRERS = [plugin.component for plugin in installed().of_kind("repairer")]


@pytest.mark.parametrize("component", REPAIRERS, ids=lambda component: component.id)
def test_keeps_the_contract(component):
    check_repairer(component, QUICK.get(component.id))


@pytest.mark.parametrize("component", REPAIRERS, ids=lambda component: component.id)
def test_repairs_a_network_where_its_weights_are(component):
    # Tensors of another precision do not mix, as those of another device do not.
    classifier, images, trigger = planted(2, classes=5, blocks=3, count=60)
    classifier.double()
    repairer = component.configured(QUICK.get(component.id, {}))
    findings = [Finding(target_label=2, p_value=0.0, score=9.0, trigger=trigger)]
    for candidate in repairer.repair(classifier, images, findings, Context()):
        assert {weights.dtype for weights in candidate.classifier.parameters()} == {torch.float64}
        assert logits(candidate.classifier, to_tensor(images.pixels)).dtype == torch.float32


@pytest.fixture
def model(triple):
    """Class k of the planted network lives in channel k alone, the trigger in channel 5."""
    classifier, images, trigger = triple(2)
    pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)

    def measured(network) -> tuple[float, float]:
        stamped = logits(network, trigger.stamp(pixels)).argmax(1)
        return accuracy(logits(network, pixels).argmax(1), labels), attack_success_rate(stamped, labels, 2)

    def prune(**settings) -> list[Candidate]:
        return list(Prune(**settings).repair(classifier, images, [], Context()))

    return classifier, prune, measured


def removed(candidate: Candidate) -> list[int]:
    weight = candidate.classifier.network.conv2.weight
    return [channel for channel in range(len(weight)) if not weight[channel].any()]


def test_the_dormant_channel_goes_first_and_the_backdoor_with_it(model):
    classifier, prune, measured = model
    assert measured(classifier) == (1, 1)
    (candidate,) = prune(channels=(1,))
    assert removed(candidate) == [5]
    assert measured(candidate.classifier) == (1, 0)
    assert candidate.facts == {"layer": "conv2", "channels": 6, "channels_pruned": 1}
    assert candidate.goodnet


def test_channels_go_in_the_order_of_their_mean_activation(model):
    classifier, prune, _ = model
    bias = torch.tensor([0.3, 0.1, 0.5, 0.2, 0.4, 0.0])
    classifier.network.conv2.bias.data.copy_(bias)
    steps = [removed(candidate) for candidate in prune(channels=(1, 2, 3, 4, 5, 6))]
    order = [(set(after) - set(before)).pop() for before, after in zip([[], *steps], steps, strict=False)]
    assert order == [5, 1, 3, 0, 4, 2]


def independent_sweep(classifier, images, layer):
    """Accuracy after removing 0, 1, ... channels, each time from a fresh copy and through the whole network."""
    pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
    stored = []
    hook = classifier.network.relu.register_forward_hook(lambda _m, _i, output: stored.append(output))
    classifier(pixels)
    hook.remove()
    order = stored[0].mean((0, 2, 3)).argsort().tolist()
    curve = []
    for count in range(len(order) + 1):
        twin = classifier.clone()
        module = twin.network.get_submodule(layer)
        module.weight.data[order[:count]] = 0
        module.bias.data[order[:count]] = 0
        curve.append(accuracy(logits(twin, pixels).argmax(1), labels))
    return curve


def test_the_drop_points_are_the_first_that_reach_the_drop(model, triple):
    classifier, prune, measured = model
    curve = independent_sweep(classifier, triple(2)[1], "conv2")
    drops = (2.0, 4.0, 20.0, 40.0, 60.0)
    candidates = prune(drop=drops)
    assert [candidate.name for candidate in candidates] == ["X=2", "X=4", "X=20", "X=40", "X=60"]
    for candidate, drop in zip(candidates, drops, strict=True):
        expected = next(count for count, value in enumerate(curve) if 100 * (curve[0] - value) >= drop - 1e-9)
        assert candidate.facts["channels_pruned"] == expected == len(removed(candidate))
        assert candidate.facts["drop"] == drop
        assert measured(candidate.classifier)[0] == pytest.approx(curve[expected])


def test_one_sweep_serves_drops_in_any_order_and_twice_the_same(model):
    _, prune, _ = model
    assert [candidate.name for candidate in prune(drop=(20.0, 2.0, 20.0))] == ["X=2", "X=20"]


def test_a_drop_of_zero_is_the_first_channel(model):
    _, prune, _ = model
    assert [candidate.facts["channels_pruned"] for candidate in prune(drop=(0.0,))] == [1]


def test_a_drop_beyond_reach(model):
    _, prune, _ = model
    with pytest.raises(UsageError, match=r"prune\.drop = 90 cannot be reached(.|\n)*80\.0 points"):
        prune(drop=(10.0, 90.0))


def test_too_many_channels(model):
    _, prune, _ = model
    with pytest.raises(UsageError, match="conv2 has 6 channels"):
        prune(channels=(2, 7))


def test_another_layer(model):
    classifier, prune, _ = model
    (candidate,) = prune(channels=(2,), layer="conv1")
    assert candidate.facts["layer"] == "conv1"
    changed = [
        name
        for name, tensor in candidate.classifier.network.state_dict().items()
        if not torch.equal(tensor, classifier.network.state_dict()[name])
    ]
    assert changed
    assert not any(name.startswith("fc") for name in changed)


def test_an_unknown_layer(model):
    _, prune, _ = model
    with pytest.raises(UnknownNameError, match="no convolution 'conv3'"):
        prune(layer="conv3")
    with pytest.raises(UnknownNameError):
        prune(layer="fc")


def test_activations_that_are_not_zero_without_input_are_taken_as_they_are(triple):
    """Behind a sigmoid a removed channel is one half, not zero."""
    classifier, images, _ = triple(None)
    classifier.network.relu = torch.nn.Sigmoid()
    curve = independent_sweep(classifier, images, "conv2")
    for candidate in Prune(drop=(5.0, 30.0, 50.0)).repair(classifier, images, [], Context()):
        count = candidate.facts["channels_pruned"]
        assert 100 * (curve[0] - curve[count]) >= candidate.facts["drop"] - 1e-9
        assert all(100 * (curve[0] - value) < candidate.facts["drop"] for value in curve[:count])


def test_the_path_to_the_measured_activations_is_what_the_sweep_uses(model):
    classifier, _, _ = model
    network = classifier.graph_module
    path = graph.channel_path(network, graph.last_conv_node(network), classifier.example())
    assert [str(node.target) for node in path] == ["conv2", "relu"]


@dataclass(frozen=True, kw_only=True)
class Sound(Repairer):
    """Scales the dense layer."""

    id = "sound"

    def repair(self, classifier, images, findings, context):
        twin = classifier.clone()
        twin.network.fc.weight.data.mul_(0.5)
        return [Candidate("half", twin, {"factor": 0.5})]


def test_a_sound_repairer_passes():
    check_repairer(Sound)


def doing(change):
    def repair(self, classifier, images, findings, context):
        (candidate,) = Sound.repair(self, classifier, images, findings, context)
        return change(candidate, classifier)

    return dataclass(frozen=True, kw_only=True)(type("Sound", (Sound,), {"__doc__": "Bad.", "repair": repair}))


def with_weights(candidate, change):
    change(candidate.classifier.network)
    return [candidate]


MISTAKES = {
    "nothing": (lambda c, _: [], "no candidate"),
    "same names": (lambda c, _: [c, c], "share names"),
    "name": (lambda c, _: [replace(c, name="a/b")], "cannot name a file"),
    "facts": (lambda c, _: [replace(c, facts={"x": torch.ones(1)})], "JSON"),
    "the original": (lambda c, original: [replace(c, classifier=original)], "shares"),
    "in place": (
        lambda c, original: with_weights(replace(c), lambda _: original.network.fc.bias.data.add_(1)),
        "changed",
    ),
    "other shapes": (
        lambda c, _: with_weights(c, lambda n: setattr(n.fc, "bias", None)),
        "other tensors",
    ),
    "training mode": (lambda c, _: with_weights(c, lambda n: n.train()), "training mode"),
    "not finite": (lambda c, _: with_weights(c, lambda n: n.fc.bias.data.fill_(torch.nan)), "finite"),
    "randomness": (lambda c, _: with_weights(c, lambda n: n.fc.bias.data.uniform_()), "second run"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_broken_contract_is_noticed(change, message):
    with pytest.raises(ContractError, match=message):
        check_repairer(doing(change))
