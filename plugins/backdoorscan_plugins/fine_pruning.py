"""The pruning defense of Fine-Pruning: take out the channels that clean images do not use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from backdoorscan import graph, hookimpl
from backdoorscan.classifier import Classifier, to_tensor
from backdoorscan.errors import MethodError, UnknownNameError, UsageError
from backdoorscan.findings import Finding
from backdoorscan.images import LabelledImages
from backdoorscan.ops.metrics import accuracy
from backdoorscan.plugin.method import Context, option
from backdoorscan.plugin.repairer import Candidate, Repairer

_CACHE_BYTES = 2**30
"""Most memory for stored activations; beyond it a sample of the images has to do."""


@dataclass(frozen=True, kw_only=True)
class Prune(Repairer):
    """Removes the channels of the last convolution that clean images activate least.

    Backdoors often live in channels that stay dormant on clean images. The channels of the last convolution before
    the dense head are removed in increasing order of their mean activation over the clean images (measured behind
    normalisation, activation function and pooling), and the clean accuracy is measured after each. The repaired
    network B′ is the one at the first point where the accuracy has dropped by at least X percentage points. Each B′
    also gives a GoodNet: the class where B and B′ agree, else N, "this input is backdoored".

    By itself it is a weak defense where backdoor and clean classes share channels: on the published CSAW face network
    the attack survives a drop of 4 points almost untouched.
    """

    id = "prune"
    paper = (
        "Liu, Dolan-Gavitt, Garg: Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks. "
        "RAID 2018, section 3.1"
    )

    drop: tuple[float, ...] = option(
        (2.0, 4.0, 10.0),
        help="Stop where the clean accuracy has dropped by X percentage points.",
        minimum=0,
        maximum=100,
    )
    channels: tuple[int, ...] = option((), help="Remove this many channels instead, whatever the accuracy.", minimum=1)
    layer: str = option("", help="The convolution to prune; the last one before the dense head if empty.")

    def repair(
        self, classifier: Classifier, images: LabelledImages, findings: Sequence[Finding], context: Context
    ) -> Sequence[Candidate]:
        """One candidate per drop or number of channels, from a single sweep."""
        network = classifier.graph_module
        conv = self._convolution(network)
        path = graph.channel_path(network, conv, classifier.example())
        front, rest = graph.split(network, path[-1])
        stored, labels = _activations(classifier, front, images)
        values = stored[0]
        order = torch.argsort(values.double().mean((0, 2, 3)), stable=True).tolist()
        silent = _silenced_value(classifier, str(conv.target))

        def candidate(name: str, count: int, **facts: float) -> Candidate:
            repaired = classifier.clone()
            target = repaired.graph_module
            node = _existing(target, str(conv.target))
            graph.remove_channels(target, graph.channel_path(target, node, classifier.example()), order[:count])
            shared = {"layer": str(conv.target), "channels": len(order), "channels_pruned": count}
            return Candidate(name, repaired, {**shared, **facts}, goodnet=True)

        if self.channels:
            if max(self.channels) > len(order):
                raise UsageError(
                    f"{self.id}.channels = {max(self.channels)} is too many.",
                    why=f"{conv.target} has {len(order)} channels.",
                )
            return [candidate(f"channels={count}", count) for count in sorted(set(self.channels))]

        wanted = sorted(set(self.drop))
        base = _accuracy(classifier, rest, stored, labels)
        curve, candidates = [base], []
        for count, channel in enumerate(order, start=1):
            values[:, channel] = silent[:, channel]
            curve.append(_accuracy(classifier, rest, stored, labels))
            # Accuracies are counts over the number of images: the tolerance only absorbs rounding.
            while wanted and 100 * (base - curve[-1]) >= wanted[0] - 1e-9:
                drop = wanted.pop(0)
                candidates.append(candidate(f"X={drop:g}", count, drop=drop))
            context.progress(count / len(order))
            if not wanted:
                break
        if wanted:
            raise UsageError(
                f"{self.id}.drop = {wanted[0]:g} cannot be reached.",
                why=f"Without any channel of {conv.target} the accuracy is still {curve[-1]:.1%}, from {base:.1%}.",
                hint="Ask for a smaller drop or another --layer.",
            )
        return candidates

    def _convolution(self, network: fx.GraphModule) -> fx.Node:
        if not self.layer:
            return graph.last_conv_node(network)
        names = graph.conv_names(network)
        if self.layer not in names:
            raise UnknownNameError("convolution", self.layer, names)
        return _existing(network, self.layer)


def _existing(network: fx.GraphModule, name: str) -> fx.Node:
    node = graph.find_layer(network, name)
    if node is None:
        raise MethodError(f"The network has no layer {name}.")
    return node


@torch.no_grad()
def _activations(classifier: Classifier, front: fx.GraphModule, images: LabelledImages) -> tuple[list[Tensor], Tensor]:
    """What ``front`` returns for all images (or as many as fit), and their labels."""
    size = sum(value.numel() * value.element_size() for value in front(classifier.example()))
    images = images.sample(max(1, _CACHE_BYTES // size), seed=0)
    batches = (to_tensor(images.pixels[start : start + 256]) for start in range(0, len(images), 256))
    parts = [front(classifier.native(batch)) for batch in batches]
    return [torch.cat(values) for values in zip(*parts, strict=True)], torch.from_numpy(images.labels)


@torch.no_grad()
def _silenced_value(classifier: Classifier, name: str) -> Tensor:
    """What the channels' activations are once they are removed: shape (1, C, H, W), zero for most networks."""
    twin = classifier.clone().graph_module
    conv = _existing(twin, name)
    path = graph.channel_path(twin, conv, classifier.example())
    module = graph.layer(twin, conv)
    if not isinstance(module, torch.nn.Conv2d):
        raise MethodError(f"{name} is not a convolution.")
    graph.remove_channels(twin, path, range(module.out_channels))
    return graph.values(twin, classifier.example(), [path[-1]])[path[-1]]


@torch.no_grad()
def _accuracy(classifier: Classifier, rest: fx.GraphModule, stored: Sequence[Tensor], labels: Tensor) -> float:
    chunks = zip(*(value.split(1024) for value in stored), strict=True)
    return accuracy(torch.cat([classifier.class_scores(rest(*chunk)).argmax(1) for chunk in chunks]), labels)


@hookimpl
def backdoorscan_repairers() -> Sequence[type[Repairer]]:
    """The methods of this module."""
    return [Prune]
