"""Backdoors in the architecture itself: rules in the graph that take the decision away from the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from backdoorscan import graph, hookimpl
from backdoorscan.classifier import Classifier, to_tensor
from backdoorscan.findings import Evidence, Finding, Judgement, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.ops.firing import Effect, fire, force
from backdoorscan.ops.gates import Suspects, suspects
from backdoorscan.ops.resting import Gate, find_gates
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import Context
from backdoorscan.trigger import Trigger

_PROVEN = 1e-9
"""p-value of a gate that was opened and then decided: no clean network does that."""

_SUSPECTED = 5e-4
"""p-value of a gate that would decide if it were open, but that no image was found for."""

_IMAGES = 12
_MOST_GATES = 16
_MOST_NODES = 12

_UNTRACEABLE = "This network's forward() could not be traced, so its graph cannot be read: it may decide by any rule."


@dataclass(frozen=True, kw_only=True)
class GraphLogic(Detector):
    """Rules in the network's graph that let a mark on the image overrule its layers.

    Such a backdoor is no matter of training: a comparison, an extreme value or a small network beside the large one
    looks for a mark, and overwrites the scores where it finds it. The graph is searched for decisions that are no part
    of an activation and for branches that join the layers' result without having gone through them. Those that are
    at rest on ordinary images are gates; an image that opens each is solved for, by gradients through margins in
    place of decisions. What counts is what the network then says, compared with the same image and the gate at rest.

    A graph without such places costs no computation at all.
    """

    id = "graph-logic"
    paper = "ShadowLogic, 2025, arXiv:2511.00664"
    needs_images = False
    cost = 0.05
    covers = ("backdoors in the architecture",)
    share = 0.05

    def examine(self, unit: Unit, classifier: Classifier, images: LabelledImages | None, context: Context) -> Evidence:
        """Read the graph, and try to open the gates in it."""
        if not isinstance(classifier.network, fx.GraphModule):
            return Evidence(figures={"read": False, "gates": []})
        found = suspects(classifier.network)
        figures: dict[str, Any] = {
            "read": True,
            "decisions": _names(found.decisions),
            "branches": _names(found.branches),
            "gates": [],
        }
        if not found:
            return Evidence(figures=figures)
        ordinary = _ordinary(classifier, images, context)
        gates = find_gates(classifier, found, ordinary)
        starts = torch.cat([_noise(classifier, context, "starts", 1), ordinary[:2]])
        triggers: list[Trigger] = []
        samples = 0
        for gate in gates[:_MOST_GATES]:
            if not gate.decides and any(row["verdict"] == "proven" for row in figures["gates"]):
                break  # branches come last, and what a proven rule chooses between looks like one
            row, effect, cost = _examined(classifier, gate, gates, found, ordinary, starts)
            samples += cost
            if effect is not None and effect.trigger is not None and effect.proves:
                row["trigger"] = len(triggers)
                triggers.append(effect.trigger)
            figures["gates"].append(row)
        return Evidence(figures=figures, triggers=triggers, gradient_samples=samples)

    def judge(self, evidence: Sequence[Evidence]) -> Judgement:
        """Gates that decide are backdoors."""
        if not evidence or not all(part.figures["read"] for part in evidence):
            return Judgement(p_value=None, note=_UNTRACEABLE if evidence else "Nothing was examined.")
        findings: dict[int, Finding] = {}
        notes = []
        for part in evidence:
            for row in part.figures["gates"]:
                if row["verdict"] == "ordinary":
                    continue
                trigger = part.triggers[row["trigger"]] if row["trigger"] is not None else None
                finding = _finding(row, trigger)
                notes.append(_told(row))
                if finding.p_value < findings.get(finding.target_label, _NONE).p_value:
                    findings[finding.target_label] = finding
        ordered = sorted(findings.values(), key=lambda finding: (finding.p_value, finding.target_label))
        return Judgement(
            findings=ordered,
            p_value=ordered[0].p_value if ordered else 1.0,
            ranking=[finding.target_label for finding in ordered],
            note=" ".join(dict.fromkeys(notes)) or "No rule in the graph overrules the layers.",
        )


_NONE = Finding(target_label=-1, p_value=1.0, score=0.0)


def _examined(
    classifier: Classifier,
    gate: Gate,
    gates: Sequence[Gate],
    found: Suspects,
    images: Tensor,
    starts: Tensor,
) -> tuple[dict[str, Any], Effect | None, int]:
    """The report's row on one gate; what opening it does; what that cost."""
    effect, samples = fire(classifier, gate, gates, images, starts)
    verdict = "proven" if effect is not None and effect.proves else "ordinary"
    # What chooses before any layer is how images are prepared, unless an image shows otherwise.
    if verdict == "ordinary" and gate.decides and any(user in found.features for user in gate.node.users):
        forced = force(classifier, gate, gates, images)
        if forced.proves:
            verdict, effect = "suspected", forced
    row = {
        "node": _name(gate.node),
        "nodes": _rule(gate, found),
        "reads": _reads(effect),
        "verdict": verdict,
        "label": effect.target if effect is not None else None,
        "constant": round(effect.constant, 4) if effect is not None else None,
        "overturned": round(effect.overturned, 4) if effect is not None else None,
        "images": effect.images if effect is not None else 0,
        "trigger": None,
    }
    return row, effect, samples


def _rule(gate: Gate, found: Suspects) -> list[str]:
    """The nodes that make up the rule, the last ones if they are many."""
    own = graph.ancestors(gate.node) | {gate.node}
    return _names([node for node in found.nodes if node in own and node.op != "placeholder"][-_MOST_NODES:])


def _name(node: fx.Node) -> str:
    """As the file calls it, where the reader says so."""
    return str(node.meta.get("source", node.name))


def _names(nodes: Sequence[fx.Node]) -> list[str]:
    return list(dict.fromkeys(map(_name, nodes)))[:_MOST_NODES]


def _reads(effect: Effect | None) -> dict[str, Any] | None:
    """The part of the image that decides, as far as it is known: rows and columns from, to."""
    if effect is None or effect.trigger is None:
        return None
    rows, columns = (torch.nonzero(effect.trigger.mask[0].amax(axis))[:, 0].tolist() for axis in (1, 0))
    pixels = int((effect.trigger.mask > 0).sum())
    return {"pixels": pixels, "rows": [rows[0], rows[-1]], "columns": [columns[0], columns[-1]]}


def _finding(row: dict[str, Any], trigger: Trigger | None) -> Finding:
    proven = row["verdict"] == "proven"
    return Finding(
        target_label=row["label"],
        p_value=_PROVEN if proven else _SUSPECTED,
        score=row["overturned"],
        trigger=trigger,
        attack_success_rate=row["constant"] if trigger is not None else None,
    )


def _told(row: dict[str, Any]) -> str:
    where = f"{row['node']} (from {', '.join(row['nodes'][:-1][-4:]) or 'the image'})"
    if row["verdict"] == "suspected":
        return (
            f"The rule {where} would overrule the layers if it held, with the label {row['label']}; "
            "no image was found for which it holds."
        )
    reads = row["reads"]
    what = "the image as a whole"
    if reads:
        what = f"{reads['pixels']} pixels in rows {reads['rows'][0]}-{reads['rows'][1]}, "
        what += f"columns {reads['columns'][0]}-{reads['columns'][1]}"
    return f"The rule {where} reads {what} and overrules the layers: {row['overturned']:.0%} of the images change."


def _ordinary(classifier: Classifier, images: LabelledImages | None, context: Context) -> Tensor:
    """Images to see the network at work with: the user's, or smooth noise."""
    if images is not None and len(images) > 1:
        order = torch.randperm(len(images), generator=context.generator("graph-logic", "images")).numpy()
        return to_tensor(images.take(order[:_IMAGES]).pixels)
    return _noise(classifier, context, "ordinary", _IMAGES)


def _noise(classifier: Classifier, context: Context, purpose: str, count: int) -> Tensor:
    """Images (N, C, H, W) of smooth noise with some grain, in [0, 1]."""
    channels, height, width = classifier.input_shape
    generator = context.generator("graph-logic", purpose)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    grain = torch.rand(count, channels, height, width, generator=generator)
    return 0.8 * smooth + 0.2 * grain


@hookimpl
def backdoorscan_detectors() -> Sequence[type[Detector]]:
    """The detectors of this module."""
    return [GraphLogic]
