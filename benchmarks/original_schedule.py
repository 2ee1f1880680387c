"""The search for triggers beside Neural Cleanse as its authors ran it, on the same network, in the same run.

    python benchmarks/original_schedule.py ../shared > benchmarks/original_schedule.md

The original examines one label at a time: 1,000 steps of 31 batches of 32 images, stopped early as the authors' code
does. Ours takes all labels in one batch. The original is run for three labels, the target's among them, and its work
for all ten is ten times their mean. Printed are ratios; seconds are of this machine.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from backdoorscan_plugins.neural_cleanse import NeuralCleanse

from backdoorscan.classifier import Classifier
from backdoorscan.findings import Unit
from backdoorscan.formats.images import load_images
from backdoorscan.formats.loading import ReadOptions, load_model
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.method import Context

NETWORK, DATA, TARGET, OTHERS = "models/fashion/bad0.pt", "data/fashion_mnist.npz#test", 7, (0, 8)
ORIGINAL = NeuralCleanse(
    steps=1000,
    batches=31,
    batch_size=32,
    restarts=1,
    learning_rate=0.1,
    patience=5,
    cost_multiplier=2,
    smoothing=0,
    attack_success_threshold=0.99,
    early_stop_threshold=1,
    early_stop_patience=25,
)


def examined(
    method: NeuralCleanse, labels: tuple[int, ...], classifier: Classifier, images: LabelledImages
) -> tuple[int, float, dict[int, float]]:
    """Gradient samples, CPU seconds and the L1 norm of each label's trigger."""
    started = time.process_time()
    evidence = method.examine(Unit("labels", labels), classifier, images, Context(seed=0))
    norms = {row["label"]: row["l1"] for row in evidence.figures["labels"]}
    return evidence.gradient_samples, time.process_time() - started, norms


def main(shared: Path) -> None:
    images = load_images(f"{shared}/{DATA}", limit=1000, seed=0)
    read = ReadOptions(arch=f"{shared}/models/architectures.py:FashionNet")
    classifier = load_model(shared / NETWORK, images, read).classifier
    samples, seconds, norms = examined(NeuralCleanse(), tuple(range(10)), classifier, images)
    runs = {label: examined(ORIGINAL, (label,), classifier, images) for label in (TARGET, *OTHERS)}
    all_samples = 10 * float(np.mean([run[0] for run in runs.values()]))
    all_seconds = 10 * float(np.mean([run[1] for run in runs.values()]))
    print("| label | original: gradient samples | CPU s | L1 of the trigger | ours: L1 |\n|---|---|---|---|---|")
    for label, (own, took, found) in runs.items():
        print(f"| {label} | {own:,} | {took:.0f} | {found[label]:.1f} | {norms[label]:.1f} |")
    print(f"\nAll ten labels: {all_samples:,.0f} gradient samples, {all_seconds:.0f} CPU s.")
    print(f"Ours: {samples:,} gradient samples, {seconds:.1f} CPU s.")
    print(f"Ratio: {all_samples / samples:.0f} in gradient samples, {all_seconds / seconds:.0f} in CPU seconds.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
