"""The contract of a repair method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backdoorscan.classifier import Classifier
from backdoorscan.findings import Finding
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.method import Context, Method


@dataclass(frozen=True)
class Candidate:
    """One repaired network.

    Attributes:
        name: Short and unique within the repair, fit for a file name, e.g. ``"X=2"``.
        classifier: The repaired network B′.
        facts: What the method did, for the report.
        goodnet: Whether to combine B and B′ into a GoodNet as well.
    """

    name: str
    classifier: Classifier
    facts: Mapping[str, Any] = field(default_factory=dict)
    goodnet: bool = False


@dataclass(frozen=True, kw_only=True)
class Repairer(Method, ABC):
    """Takes a backdoor out of a classifier, or makes it harmless."""

    @abstractmethod
    def repair(
        self, classifier: Classifier, images: LabelledImages, findings: Sequence[Finding], context: Context
    ) -> Sequence[Candidate]:
        """Repair the network; the original is left as it is.

        Args:
            classifier: The network B.
            images: Clean labelled images.
            findings: Suspected backdoors with their reversed triggers; may be empty.
            context: Seed, device, progress.

        Returns:
            At least one candidate, mildest first.

        Raises:
            MethodError: The method cannot work on this model.
        """
