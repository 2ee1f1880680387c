"""Classifiers that are pickled."""

import operator
import pickle

import torch
from torch import fx, nn
from torch.nn import functional

from backdoorscan.classifier import Classifier, to_tensor
from backdoorscan.engine.packing import pack


class Odd(nn.Module):
    """Asks what its input is, so it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(x.flatten(1)) if x.sum() > 0 else self.head(-x.flatten(1))


def through_pickle(classifier):
    return pickle.loads(pickle.dumps(pack(classifier))).unpack()


def written(classifier):
    return [
        (node.op, node.target, str(node.args), str(node.kwargs), node.name, dict(node.meta))
        for node in classifier.graph_module.graph.nodes
    ]


def graph_of_all_sorts():
    root = nn.Module()
    root.part = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1))
    root.register_buffer("shift", torch.full((4, 1, 1), 0.5))
    graph = fx.Graph()
    x = graph.placeholder("x")
    x = graph.call_module("part.0", (x,))
    x.meta["source"] = "Conv_17"
    x = graph.call_function(operator.add, (x, graph.get_attr("shift")))
    x = graph.call_function(functional.relu, (x,))  # a trace of its own would spell the default out
    x = graph.call_function(functional.max_pool2d, (x, 2))  # a function that cannot be pickled
    both = graph.call_function(torch.cat, ([x, x],), {"dim": 1})
    part = graph.call_function(operator.getitem, (both, (slice(None), slice(0, 3))))
    graph.output(graph.call_method("mean", (part, (2, 3))))
    return Classifier(fx.GraphModule(root, graph), input_shape=(1, 4, 4), num_classes=3, details={"format": "made"})


def test_a_graph_is_the_same_node_for_node():
    classifier = graph_of_all_sorts()
    twin = through_pickle(classifier)
    images = torch.rand(5, 1, 4, 4)
    assert written(twin) == written(classifier)
    assert torch.equal(twin(images), classifier(images))
    assert (twin.num_classes, twin.details, twin.convention) == (3, {"format": "made"}, classifier.convention)
    assert [v.stride() for v in twin.state_dict().values()] == [v.stride() for v in classifier.state_dict().values()]
    assert not any(module.training for module in twin.network.modules())
    assert written(classifier.clone()) == written(twin)


def test_the_other_side_has_weights_of_its_own(triple):
    classifier, images, _ = triple(None)
    twin = through_pickle(classifier)
    pixels = to_tensor(images.pixels[:3])
    before = classifier(pixels)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(pixels).any()
    assert torch.equal(classifier(pixels), before)


def test_a_network_that_is_no_graph():
    classifier = Classifier(Odd(), input_shape=(1, 4, 4), num_classes=3)
    images = torch.rand(5, 1, 4, 4)
    assert torch.equal(through_pickle(classifier)(images), classifier(images))
