"""Fits the weights of the default scan's verdict on a zoo of small networks, and judges it on other attacks.

    python benchmarks/calibrate.py ../shared ZOO [INDEX/COUNT | kept]

The folder ZOO keeps the networks and the evidence on them, so a second run only fits. ``INDEX/COUNT`` collects the
evidence on a part of the zoo, so that several processes can share the work; ``kept`` judges only those of it on which
there is evidence. Printed are the constants that ``backdoorscan_plugins.confirmation``, ``label_mapping``,
``source_pairs`` and ``perturbations`` hold, and how well each tells backdoored networks from clean ones: an attack by
weights fitted on all the others, a clean network by weights fitted without the networks of its architecture and data.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backdoorscan_plugins import confirmation, perturbations, source_pairs
from backdoorscan_plugins.graph_logic import GraphLogic
from backdoorscan_plugins.label_mapping import LabelMapping
from plain_nets import plain_networks
from scipy import stats
from sklearn.linear_model import LogisticRegression

from backdoorscan.bench.data import load_datasets
from backdoorscan.bench.spec import ModelSpec, plan_zoo
from backdoorscan.bench.zoo import train_zoo
from backdoorscan.classifier import Classifier
from backdoorscan.findings import Examined
from backdoorscan.images import LabelledImages
from backdoorscan.ops.outliers import Null
from backdoorscan.plugin.detector import run_detector
from backdoorscan.plugin.method import Context
from backdoorscan.registry import installed
from backdoorscan.scanning import ScanOptions, plan_detectors


def sources(shared: Path) -> list[str]:
    """Real images of ten classes."""
    return [f"{shared}/data/mnist.npz#train", f"{shared}/data/fashion_mnist.npz#train"]


def zoo(shared: Path) -> list[ModelSpec]:
    """60 clean networks and 144 backdoored ones: every attack on four architectures and three sets of images."""
    images = ["digits", *sources(shared)]
    attacks = [plugin.component.configured({}) for plugin in installed().of_kind("attack")]
    return plan_zoo(load_datasets(images), [], attacks, clean=5, backdoored=1)


def collect(classifier: Classifier, clean: LabelledImages) -> dict[str, Any]:
    """The evidence of a default scan, without verdicts: detector -> figures of its units, cost."""
    earlier: dict[str, Examined] = {}
    record: dict[str, Any] = {}
    for _, detector in plan_detectors(ScanOptions(), installed()):
        context = Context(seed=0, earlier=dict(earlier))
        started = time.process_time()
        evidence, judgement = run_detector(detector, classifier, clean, context)
        earlier[detector.id] = Examined(evidence=evidence, judgement=judgement)
        record[detector.id] = {
            "units": [part.figures for part in evidence],
            "triggers": [[trigger.to_json() for trigger in part.triggers] for part in evidence],
            "gradient_samples": sum(part.gradient_samples for part in evidence),
            "seconds": round(time.process_time() - started, 3),
        }
    return record


def gather(shared: Path, folder: Path, part: str) -> list[dict[str, Any]]:
    """The evidence on the networks, kept in the folder; attacks that did not take are left out."""
    specs = zoo(shared)
    kept = folder / "evidence"
    kept.mkdir(parents=True, exist_ok=True)
    if part == "kept":
        specs = [spec for spec in specs if (kept / f"{spec.key}.json").exists()]
    elif part:
        index, count = map(int, part.split("/"))
        specs = specs[index::count]
    records = []
    for entry in train_zoo(specs, folder):
        file = kept / f"{entry.spec.key}.json"
        if not entry.took:
            continue
        records.append(
            {
                "attack": entry.spec.attack.id if entry.spec.attack else "clean",
                "group": (entry.spec.architecture, entry.spec.data.name),
                "targets": set(entry.spec.targets),
                "evidence": evidence(file, entry.spec.name, lambda at=entry: at.load().classifier, entry.clean),
            }
        )
    if part in ("", "kept"):
        for plain in plain_networks(load_datasets(sources(shared)), folder / "plain"):
            found = evidence(kept / f"{plain.name}.json", plain.name, lambda at=plain: at.classifier, plain.clean)
            records.append({"attack": "clean", "group": plain.group, "targets": set(), "evidence": found})
    return records


def evidence(file: Path, name: str, load: Callable[[], Classifier], clean: LabelledImages) -> dict[str, Any]:
    """Detector -> figures of its units; collected where the file does not have them yet."""
    if not file.exists():
        file.write_text(json.dumps(collect(load(), clean)))
        print(name, file=sys.stderr, flush=True)
    return {detector: record["units"] for detector, record in json.loads(file.read_text()).items()}


Weights = tuple[Any, Any, Any]
FIGURES = list(confirmation.WEIGHTS)


def fit(records: Sequence[Mapping[str, Any]]) -> Weights:
    """Means, standard deviations and weights of the figures: target labels against the suspects of clean networks."""
    rows, truth = [], []
    for record in records:
        for unit in record["evidence"]["confirmation"]:
            backdoored = unit["label"] in record["targets"]
            if backdoored or record["attack"] == "clean":
                rows.append([unit.get(name, np.nan) for name in FIGURES])
                truth.append(backdoored)
    table = np.array(rows, float)
    mean, sd = np.nanmean(table, 0), np.nanstd(table, 0)
    model = LogisticRegression(C=0.3, class_weight="balanced").fit(np.nan_to_num((table - mean) / sd), truth)
    return mean, sd, model.coef_[0]


def confirmed(record: Mapping[str, Any], weights: Weights) -> float:
    """The largest score of a network's suspects."""
    mean, sd, weight = weights
    scores = [-9.0]
    for unit in record["evidence"]["confirmation"]:
        figures = np.array([unit.get(name, np.nan) for name in FIGURES], float)
        scores.append(float(np.clip(np.nan_to_num((figures - mean) / sd) * weight, -10, 10).sum()))
    return max(scores)


def paired(record: Mapping[str, Any]) -> float:
    """The largest statistic of ``source-pairs``."""
    rows = [row for unit in record["evidence"]["source-pairs"] for row in unit["labels"] if "retention" in row]
    return max((source_pairs.statistic(row) for row in rows), default=0.0)


def warped(record: Mapping[str, Any]) -> float:
    """The largest statistic of ``warp``."""
    rows = [row for unit in record["evidence"]["warp"] for row in unit["labels"]]
    values = perturbations.warp_statistics(rows)
    return max((value for value, row in zip(values, rows, strict=True) if row["succeeded"]), default=-9.0)


def mapped(record: Mapping[str, Any]) -> float:
    """The statistic of ``label-mapping``."""
    return max((float(unit.get("statistic", 0.0)) for unit in record["evidence"]["label-mapping"]), default=0.0)


def report(records: Sequence[Mapping[str, Any]]) -> None:
    """Print constants and figures as Markdown."""
    clean = [record for record in records if record["attack"] == "clean"]
    special = {"all-to-all": mapped, "source-specific": paired}
    general = [record for record in records if record["attack"] not in {"clean", *special}]
    held_out: list[float] = []
    for group in sorted({record["group"] for record in clean}):
        weights = fit([record for record in [*clean, *general] if record["group"] != group])
        held_out += [confirmed(record, weights) for record in clean if record["group"] == group]
    print(f"{len(clean)} clean networks, {len(records) - len(clean)} backdoored ones.\n")
    verdicts(general + [record for record in records if record["attack"] in special], clean, held_out)
    print("| attack | networks | detector | AUROC | p at most 0.0025 |\n|---|---|---|---|---|")
    for attack in sorted({record["attack"] for record in records} - {"clean"}):
        ours = [record for record in records if record["attack"] == attack]
        if attack in special:
            row(attack, attack, [special[attack](r) for r in ours], [special[attack](r) for r in clean])
            continue
        weights = fit([record for record in general if record["attack"] != attack] + clean)
        row(attack, "confirmation", [confirmed(record, weights) for record in ours], held_out)
        if attack == "warping":
            row(attack, "warp", [warped(r) for r in ours], [warped(r) for r in clean])
    mean, sd, weight = fit([*general, *clean])
    print("\n| figure | mean | sd | weight |\n|---|---|---|---|")
    for at, name in enumerate(FIGURES):
        print(f"| {name} | {mean[at]:.2f} | {sd[at]:.2f} | {weight[at]:.2f} |")
    print("\n| statistic | networks | median | upper sd | largest |\n|---|---|---|---|---|")
    statistics = {"confirmation": held_out} | {
        name: [statistic(record) for record in clean]
        for name, statistic in {"label-mapping": mapped, "source-pairs": paired, "warp": warped}.items()
    }
    for name, values in statistics.items():
        found = [value for value in values if value > -9]
        null = null_of(found)
        print(f"| {name} | {null.count} | {null.mean:.2f} | {null.sd:.2f} | {max(found):.2f} |")


def verdicts(
    backdoored: Sequence[Mapping[str, Any]], clean: Sequence[Mapping[str, Any]], held_out: list[float]
) -> None:
    """What the four detectors say together."""
    groups = sorted({record["group"] for record in clean})
    ordered = [record for group in groups for record in clean if record["group"] == group]
    others = (mapped, paired, warped)
    methods = (confirmation.Confirmation, LabelMapping, source_pairs.SourcePairs, perturbations.WarpInversion)
    shares = [method.share for method in methods]
    whole = sum(shares) + GraphLogic.share  # which has an answer on every network
    nulls = [held_out, *([value for value in map(one, ordered) if value > -9] for one in others)]

    def p_value(values: Sequence[float]) -> float:
        tails = [
            null_of(null).p_value(value) * whole / share
            for value, null, share in zip(values, nulls, shares, strict=True)
        ]
        return min(1.0, *tails)

    of_clean = [p_value([own, *(one(r) for one in others)]) for own, r in zip(held_out, ordered, strict=True)]
    of_bad = []
    for attack in sorted({record["attack"] for record in backdoored}):
        rest = [r for r in backdoored if r["attack"] not in (attack, "all-to-all", "source-specific")]
        weights = fit([*rest, *clean])
        of_bad += [
            p_value([confirmed(r, weights), *(one(r) for one in others)]) for r in backdoored if r["attack"] == attack
        ]
    area = stats.mannwhitneyu(of_clean, of_bad).statistic / len(of_clean) / len(of_bad)
    caught, alarms = np.mean(np.array(of_bad) <= 0.01), sum(p <= 0.01 for p in of_clean)
    print(f"All four together: AUROC {area:.3f}; {caught:.0%} caught at p <= 0.01, {alarms} false alarms.\n")


def row(attack: str, detector: str, backdoored: Sequence[float], clean: Sequence[float]) -> None:
    """One line of the table of attacks."""
    area = stats.mannwhitneyu(backdoored, clean).statistic / len(backdoored) / len(clean)
    null = null_of([value for value in clean if value > -9])
    p_values = np.array([null.p_value(value) for value in backdoored])
    print(f"| {attack} | {len(backdoored)} | {detector} | {area:.3f} | {np.mean(p_values <= 0.0025):.0%} |")


def null_of(values: Sequence[float]) -> Null:
    """The median of clean networks, and how far those above it lie: the ones far below tell nothing of alarms."""
    found = np.array(values)
    median = float(np.median(found))
    return Null(median, float(np.sqrt(np.square(found[found > median] - median).mean())), len(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    part = sys.argv[3] if len(sys.argv) > 3 else ""
    found = gather(Path(sys.argv[1]), Path(sys.argv[2]), part)
    if "/" not in part:
        report(found)
