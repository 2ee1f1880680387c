"""How the work of a default scan grows with the number of classes.

    python benchmarks/growth.py ../shared docs/growth.svg > benchmarks/growth.md

The CSAW face network has 1,283 classes; with only the first rows of its head it has fewer, all else being equal. Each
is scanned without images of the user's. Counted are gradient samples, which are the same on any machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from backdoorscan import graph
from backdoorscan.costing import Meter
from backdoorscan.formats.loading import LoadedModel, ReadOptions, load_model
from backdoorscan.registry import installed
from backdoorscan.report import ModelRun
from backdoorscan.scanning import ScanOptions, plan_detectors, scan_model

NETWORK = "models/csaw/sunglasses_bd_net.h5"
CLASSES = (10, 43, 100, 400, 1283)


def with_classes(path: Path, count: int) -> LoadedModel:
    """The network with the first ``count`` rows of its head."""
    loaded = load_model(path, None, ReadOptions())
    classifier = loaded.classifier
    head = graph.layer(classifier.graph_module, graph.head_node(classifier.graph_module))
    assert isinstance(head, torch.nn.Linear) and head.bias is not None
    with torch.no_grad():
        head.weight = torch.nn.Parameter(head.weight[:count].clone())
        head.bias = torch.nn.Parameter(head.bias[:count].clone())
    head.out_features = classifier.num_classes = count
    return loaded


def scanned(path: Path, count: int) -> ModelRun:
    options, registry = ScanOptions(), installed()
    plan = plan_detectors(options, registry)
    return scan_model(
        with_classes(path, count), None, plan, options, meter=Meter(), observer=lambda *_: None, registry=registry
    )


def main(shared: Path, picture: Path) -> None:
    rows = []
    print("| classes | gradient samples | of them the search for triggers | CPU s | label 0 |\n|---|---|---|---|---|")
    for count in CLASSES:
        run = scanned(shared / NETWORK, count)
        search = next(part.gradient_samples for part in run.detectors if part.id == "neural-cleanse")
        rows.append((count, run.cost.gradient_samples, search))
        flagged = "flagged" if any(finding.target_label == 0 for finding in run.findings) else "not flagged"
        print(f"| {count} | {rows[-1][1]:,} | {search:,} | {run.cost.cpu_seconds:.0f} | {flagged} |", flush=True)
    classes = [row[0] for row in rows]
    plt.rcParams["svg.hashsalt"] = "growth"
    _, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(classes, [row[1] for row in rows], marker="o", label="default scan")
    axes.plot(classes, [row[2] for row in rows], marker="s", label="of it the search for triggers")
    axes.plot(classes, [rows[0][2] / 10 * count for count in classes], "--", color="grey", label="every label searched")
    axes.set(
        xscale="log", yscale="log", xlabel="classes", ylabel="gradient samples", xticks=classes, xticklabels=classes
    )
    axes.minorticks_off()
    axes.legend()
    plt.savefig(picture, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
