"""Repaired networks side by side: all measured, scanned again and written in the same way."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from backdoorscan.costing import Forecast, Meter, forecast
from backdoorscan.errors import ArtifactError
from backdoorscan.evaluating import measure, predictions
from backdoorscan.findings import Finding, Verdict
from backdoorscan.formats.goodnet import write_goodnet
from backdoorscan.formats.loading import LoadedModel
from backdoorscan.goodnet import GoodNet, RejectingNet
from backdoorscan.images import LabelledImages
from backdoorscan.measured import CandidateRow, Scores
from backdoorscan.plugin.detector import MANY_CLASSES, labels_to_check
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.repairer import Candidate, Repairer
from backdoorscan.registry import Registry
from backdoorscan.scanning import ScanOptions, look_again, plan_detectors

if TYPE_CHECKING:
    from backdoorscan.repairing import RepairOptions

_GOODNET = ".goodnet."


@dataclass(frozen=True)
class Network:
    """A repaired network and the name of its file."""

    name: str
    network: nn.Module

    def write(self, loaded: LoadedModel, place: Path) -> tuple[list[str], str]:
        """Write it into the folder ``place``: a GoodNet as ONNX or .pt2, another in the format of the original.

        A network that learned to reject is written in both, where its format can hold it with one class more.

        Returns:
            The names of the files, and why one in the format of the original is not among them, or empty.

        Raises:
            BackdoorscanError: It cannot be written.
        """
        artifact, arch = loaded.artifact, loaded.options.arch
        network = copy.deepcopy(self.network).cpu()  # the others compute where they are until the end
        if not isinstance(network, GoodNet | RejectingNet):
            loaded.loader.write(artifact, _tensors(network), place / self.name, arch=arch)
            return [self.name], ""
        write_goodnet(network, place / self.name)
        if isinstance(network, GoodNet):
            return [self.name], ""
        own = self.name.rpartition(_GOODNET)[0] + loaded.suffix
        try:
            loaded.loader.write_extended(artifact, _tensors(network.classifier), place / own, arch=arch)
        except ArtifactError as error:
            return [self.name], error.why or error.what
        return [self.name, own], ""


def _tensors(classifier: nn.Module) -> Mapping[str, Tensor]:
    """The tensors of a classifier by their names in the file's network."""
    return classifier.get_submodule("network").state_dict()


class Bench:
    """Measures networks, all in the same way.

    Args:
        loaded: The original network.
        images: Clean images to measure on.
        poisoned: Poisoned images to measure on.
        options: How to repair.
        meter: Told of the gradient samples used.
        registry: Where detectors are found.

    Attributes:
        findings: Whose reversed triggers are tried on each network.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        images: LabelledImages,
        poisoned: LabelledImages | None,
        options: RepairOptions,
        meter: Meter,
        registry: Registry,
    ) -> None:
        self.loaded, self.images, self.poisoned = loaded, images, poisoned
        self.options, self.meter, self.registry = options, meter, registry
        self.findings: list[Finding] = []

    def _finders(self) -> list[str]:
        """The detectors that found something, and those whose suspicions they examined; all default ones if none."""
        finders = {finding.detector for finding in self.findings if finding.detector}
        components = {plugin.id: plugin.component for plugin in self.registry.of_kind("detector")}
        behind = [getattr(components.get(name), "confirms", ()) for name in finders]
        return sorted({*finders, *(name for names in behind for name in names)} & set(components))

    def measure(self, network: nn.Module, rejects: int | None) -> Scores:
        """What a network, or a GoodNet that answers ``rejects`` for "backdoored", does; see ``evaluating.measure``."""
        triggers = [finding.trigger for finding in self.findings if finding.trigger is not None]
        return measure(
            network, self.images, self.poisoned, target=self.options.target, rejects=rejects, triggers=triggers
        )

    def scan(self, classifier: Any, images: LabelledImages, targets: Sequence[int]) -> tuple[Verdict, list[Finding]]:
        """Scan a network; of many classes only the repaired ones and a few beside them."""
        classes = self.loaded.classifier.num_classes
        context = Context(seed=self.options.seed)
        labels = labels_to_check(classes, targets, context) if targets else tuple(range(classes))
        scan_options = ScanOptions(self._finders(), alpha=self.options.alpha, seed=self.options.seed)
        verdict, findings, samples = look_again(classifier, images, labels, scan_options, self.registry)
        self.meter.gradient_samples += samples
        return verdict, findings

    def forecast(self) -> Forecast | None:
        """About what one scan takes, if all default detectors run or some of them: others are not known so well."""
        plans = [plan_detectors(ScanOptions(names), self.registry) for names in (self._finders(), ())]
        planned, usual = ([detector for _, detector in plan] for plan in plans)
        return forecast(self.loaded.classifier, planned, usual, self.loaded.classifier.num_classes, jobs=1)

    def rows(self, method: Repairer, candidate: Candidate, before: Scores) -> list[tuple[CandidateRow, Network]]:
        """A candidate, and its GoodNet, measured."""
        self.meter.gradient_samples += int(candidate.facts.get("gradient_samples", 0))
        path = self.loaded.artifact.path
        stem = f"{path.stem}_{candidate.name}"
        goodnet = f"{stem}{_GOODNET}{self.options.goodnet_format}"
        networks: list[tuple[str, Network]]
        if candidate.rejects:
            networks = [("goodnet", Network(goodnet, RejectingNet(candidate.classifier)))]
        else:
            networks = [("repaired", Network(stem + self.loaded.suffix, candidate.classifier))]
            if candidate.goodnet or self.options.goodnet:
                both = GoodNet(self.loaded.classifier, candidate.classifier)
                networks.append(("goodnet", Network(goodnet, both)))
        rows = []
        for kind, network in networks:
            rejects = self.loaded.classifier.num_classes if kind == "goodnet" else None
            scores = self.measure(network.network, rejects)
            drop = 100 * (before.clean_accuracy - scores.clean_accuracy)
            row = CandidateRow(
                candidate.name,
                kind,
                scores,
                candidate.facts,
                files=(),
                method=method.id,
                worst_class=self._worst_class(network.network),
                within_budget=None if self.options.max_drop is None else drop <= self.options.max_drop + 1e-9,
            )
            rows.append((self._scanned(row, network.network), network))
        return rows

    def _scanned(self, row: CandidateRow, network: nn.Module) -> CandidateRow:
        targets = sorted({finding.target_label for finding in self.findings})
        many = self.loaded.classifier.num_classes > MANY_CLASSES and not targets
        if not self.options.rescan or many or isinstance(network, GoodNet):
            return row
        classifier = network.classifier if isinstance(network, RejectingNet) else network
        verdict, findings = self.scan(classifier, self.images, targets)
        return replace(row, verdict=verdict, flagged=[finding.target_label for finding in findings])

    def _worst_class(self, network: nn.Module) -> dict[str, Any] | None:
        labels = torch.from_numpy(self.images.labels)
        was = predictions(self.loaded.classifier, self.images) == labels
        now = predictions(network, self.images) == labels
        losses = {
            int(label): 100 * float(was[labels == label].double().mean() - now[labels == label].double().mean())
            for label in labels.unique()
        }
        label, points = max(losses.items(), key=lambda item: item[1])
        return {"label": label, "points": round(points, 2)} if points > 0 else None
