"""The contract of a repair method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

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
        rejects: Whether ``classifier`` is itself a GoodNet: K+1 scores, of which the last means "backdoored".
    """

    name: str
    classifier: Classifier
    facts: Mapping[str, Any] = field(default_factory=dict)
    goodnet: bool = False
    rejects: bool = False


@dataclass(frozen=True, kw_only=True)
class Repairer(Method, ABC):
    """Takes a backdoor out of a classifier, or makes it harmless.

    Attributes:
        needs_triggers: Whether it works only with findings that carry reversed triggers, unless it is given poisoned
            images.
        poisoned: What it makes of known poisoned images: nothing; or it learns from them, whatever their labels, or
            only if these are the true ones. Only a method that can learn from them finds them in ``Context.poisoned``.
        held_out: Share of the clean images kept from the method, to measure with; 0 if it may see all.
        auto: Settings under which ``--method auto`` tries it; none to be left out.
    """

    needs_triggers: ClassVar[bool] = False
    poisoned: ClassVar[Literal["ignored", "images", "true labels"]] = "ignored"
    held_out: ClassVar[float] = 0.25
    auto: ClassVar[Sequence[Mapping[str, Any]]] = ()

    @abstractmethod
    def repair(
        self, classifier: Classifier, images: LabelledImages, findings: Sequence[Finding], context: Context
    ) -> Sequence[Candidate]:
        """Repair the network; the original is left as it is.

        Args:
            classifier: The network B.
            images: Clean labelled images.
            findings: Suspected backdoors with their reversed triggers; may be empty.
            context: Seed, progress.

        Returns:
            At least one candidate, mildest first.

        Raises:
            MethodError: The method cannot work on this model.
        """
