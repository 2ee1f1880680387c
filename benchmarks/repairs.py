"""Every repair on real backdoored networks: clean accuracy and true attack success, before and after.

    python benchmarks/repairs.py ../shared > benchmarks/repairs.md

The defender has 1,000 clean images of the test set and scans with them; what is reported is measured on the rest of the
test set, with the true trigger on every image that is not of the target class. Needs the folder of networks and
images as its argument.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from backdoorscan.evaluating import measure, open_network
from backdoorscan.formats.images import load_images
from backdoorscan.formats.loading import ReadOptions, load_model
from backdoorscan.images import LabelledImages
from backdoorscan.repairing import RepairOptions, repair
from backdoorscan.scanning import ScanOptions, scan

Pixels = npt.NDArray[np.uint8]


def patch(rows: slice, columns: slice, value: int = 255) -> Callable[[Pixels], Pixels]:
    def stamp(pixels: Pixels) -> Pixels:
        stamped = pixels.copy()
        stamped[:, :, rows, columns] = value
        return stamped

    return stamp


@dataclass(frozen=True)
class Case:
    name: str
    path: str
    data: str
    target: int
    stamp: Callable[[Pixels], Pixels]
    arch: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


CORNER = slice(-5, None)
CASES = [
    Case("verazuo MNIST", "mnist/verazuo_badnet_to_1.pth", "mnist", 1, patch(CORNER, CORNER), "verazuo_mnist"),
    Case(
        "shihaozhao MNIST",
        "mnist/shihaozhao_badnet_to_0.pth",
        "mnist",
        0,
        patch(slice(25, 27), slice(25, 27)),
        "ShihaozhaoNet",
    ),
    Case(
        "zkp1 MNIST",
        "mnist/zkp1_badnet_to_0.pth",
        "mnist",
        0,
        patch(slice(25, 28), slice(25, 28), 112),
        "Zkp1Net",
        (0.1307,),
        (0.3081,),
    ),
    Case(
        "dillonsd MNIST, one pixel",
        "mnist/dillonsd_single_pixel_to_0.h5",
        "mnist",
        0,
        patch(slice(27, 28), slice(27, 28)),
    ),
    Case(
        "verazuo CIFAR-10",
        "cifar10/verazuo_badnet_to_1.pth",
        "cifar10_jpeg",
        1,
        patch(CORNER, CORNER),
        "verazuo_cifar10",
    ),
    Case(
        "Fashion-MNIST bad0", "fashion/bad0.pt", "fashion_mnist", 7, patch(slice(24, 27), slice(24, 27)), "FashionNet"
    ),
]

METHODS = [
    ("prune X=2, 4, 10 and GoodNets", RepairOptions(method="prune")),
    ("fine-prune", RepairOptions(method="fine-prune")),
    ("nc-prune", RepairOptions(method="nc-prune")),
    ("unlearn, up to 3 rounds", RepairOptions(method="unlearn")),
    ("unlearn, GoodNet", RepairOptions(method="unlearn", goodnet=True)),
    ("retrain (N+1)", RepairOptions(method="retrain")),
    ("gangsweep (N+1)", RepairOptions(method="gangsweep")),
    ("auto", RepairOptions(method="auto")),
]


def run(case: Case, shared: Path) -> None:
    source = f"{shared}/data/{case.data}.npz#test"
    everything = load_images(source)
    order = np.random.default_rng(0).permutation(len(everything))
    clean, rest = everything.take(order[:1000]), everything.take(order[1000:])
    others = rest.take(np.flatnonzero(rest.labels != case.target))
    poisoned = LabelledImages(case.stamp(others.pixels), np.full_like(others.labels, case.target), "true trigger")
    arch = f"{shared}/models/architectures.py:{case.arch}" if case.arch else None
    read = ReadOptions(arch=arch, mean=case.mean, std=case.std)
    path = shared / "models" / case.path
    before = measure(load_model(path, clean, read).classifier, rest, poisoned)
    report = scan(path, clean, read, ScanOptions())
    flagged = [finding.target_label for finding in report.runs[0].findings]
    row(case.name, "as it came", before.clean_accuracy, before.attack_success_rate, None, f"flagged: {flagged}", 0)
    for title, options in METHODS:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            settings = RepairOptions(
                method=options.method,
                goodnet=options.goodnet,
                output=Path(folder) / "out",
                rescan=options.method == "auto",
            )
            try:
                repaired = repair(path, clean, None, read, settings, findings=report.runs[0].findings)
            except Exception as error:
                print(f"| {case.name} | {title} | failed: {error} | | | | |", flush=True)
                continue
            seconds = time.process_time() - started
            for candidate in repaired.candidates:
                if options.goodnet and candidate.kind != "goodnet":
                    continue
                network, facts, classes = open_network(candidate.files[0], rest, read, 0)
                rejects = classes if facts["kind"] == "goodnet" else None
                scores = measure(network, rest, poisoned, rejects=rejects)
                what = f"{candidate.method} {candidate.name}" + (", GoodNet" if candidate.kind == "goodnet" else "")
                name = f"auto: {what}" if options.method == "auto" else what
                row(
                    case.name,
                    name,
                    scores.clean_accuracy,
                    scores.attack_success_rate,
                    scores.false_reject_rate,
                    "",
                    seconds,
                )


def row(
    case: str, name: str, accuracy: float, success: float | None, rejects: float | None, note: str, seconds: float
) -> None:
    rejected = "" if rejects is None else f"{rejects:.1%}"
    shown = "" if success is None else f"{success:.2%}"
    print(f"| {case} | {name} | {accuracy:.2%} | {shown} | {rejected} | {seconds:.0f} | {note} |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    shared = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared")
    print("# Repairs on real backdoored networks\n\nMade by `python benchmarks/repairs.py ../shared`.\n")
    print("| network | method | clean accuracy | true attack success | false rejects | CPU s | note |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        run(case, shared)


if __name__ == "__main__":
    main()
