"""What scanning many models on a Ray cluster costs beside the scans themselves.

    python benchmarks/scaling.py ../shared > benchmarks/scaling.md

Needs backdoorscan[ray] and Linux. A cluster of this machine's cores is started and scans the Fashion-MNIST networks.
Counted is the processor time of all of its processes, which other work on the machine hardly changes; docs/scaling.md
draws on it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import ray
import torch

from backdoorscan.costing import versions
from backdoorscan.engine.crew import Say
from backdoorscan.engine.packing import pack
from backdoorscan.engine.ray import Cluster
from backdoorscan.formats.images import load_images
from backdoorscan.formats.loading import ReadOptions, load_model
from backdoorscan.images import LabelledImages
from backdoorscan.manifest import Entry
from backdoorscan.report import ScanReport
from backdoorscan.scanning import ScanOptions
from backdoorscan.surveying import survey

T = TypeVar("T")

NAMES = ("clean0", "clean1", "bad0", "bad1")
MANY = 100


def copies(folder: Path, source: Path, count: int) -> Iterator[Path]:
    """Files of the same network but for one number, so that each has to be scanned."""
    weights = torch.load(source, weights_only=True)
    last = list(weights)[-1]
    for number in range(count):
        weights[last][0] += 1e-4
        torch.save(weights, folder / f"{number}.pt")
        yield folder / f"{number}.pt"


def processor_time() -> dict[str, float]:
    """Seconds by what the processes are: this one, the workers, and what else Ray has started."""
    spent = {"driver": time.process_time(), "workers": 0.0, "Ray itself": 0.0}
    parents, seconds, commands = {}, {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            command = stat.with_name("cmdline").read_text()
        except OSError:
            continue
        fields, pid = rest.split(), int(stat.parent.name)
        parents[pid], commands[pid] = int(fields[1]), command or name
        seconds[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    for pid in seconds:
        above = parents[pid]
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid():
            spent["workers" if commands[pid].startswith("ray::") else "Ray itself"] += seconds[pid]
    return spent


def spent_on(work: Callable[[], T]) -> tuple[T, float, dict[str, float]]:
    """What it returns, wall seconds and processor seconds."""
    before, started = processor_time(), time.perf_counter()
    result = work()
    wall, after = time.perf_counter() - started, processor_time()
    return result, wall, {name: after[name] - before[name] for name in after}


def nothing(_shared: None, task: bytes, _say: Say) -> int:
    return len(task)


def main(shared: Path, folder: Path) -> None:
    images = load_images(f"{shared}/data/fashion_mnist.npz#test", limit=300)
    read = ReadOptions(arch=f"{shared.resolve()}/models/architectures.py:FashionNet", input_range=(0.0, 1.0))
    entries = [Entry(file=shared / f"models/fashion/{name}.pt", read=read) for name in NAMES]
    many = [Entry(file=file, read=read) for file in copies(folder, entries[0].file, MANY)]

    def scanned(entries: list[Entry], options: ScanOptions, images: LabelledImages = images) -> ScanReport:
        return survey(entries, images, options, observer=lambda *_: None)

    print(", ".join(f"{name} {version}" for name, version in {"ray": ray.__version__, **versions()}.items()) + "\n")
    print("| what | driver, CPU s | workers, CPU s | Ray itself, CPU s | wall s |\n|---|---|---|---|---|")

    def row(what: str, wall: float, spent: dict[str, float], share: int = 1) -> None:
        figures = [spent[name] / share for name in ("driver", "workers", "Ray itself")] + [wall / share]
        digits = 4 if share > 1 else 1
        print(f"| {what} | " + " | ".join(f"{figure:.{digits}f}" for figure in figures) + " |", flush=True)

    here = ScanOptions(jobs=1)
    alone, wall, spent = spent_on(lambda: scanned(entries, here))
    row(f"{len(entries)} models here, one after the other", wall, spent)
    engine, wall, spent = spent_on(Cluster)
    row("a cluster starts", wall, spent)
    cores = int(ray.cluster_resources()["CPU"])
    quick = replace(here, engine=engine, detectors=["head-weights"])
    _, wall, spent = spent_on(lambda: scanned(many[: 2 * cores], quick))
    row(f"{cores} workers start, and read {2 * cores} models", wall, spent)
    there, wall, spent = spent_on(lambda: scanned(entries, replace(here, engine=engine)))
    row(f"the {len(entries)} models on {cores} workers", wall, spent)
    assert [run.verdict for run in alone.runs] == [run.verdict for run in there.runs]
    _, wall, spent = spent_on(lambda: scanned(many[2 * cores :], quick))
    row("a model read and hardly scanned, each", wall, spent, MANY - 2 * cores)
    for size in (0, 2**20, 2**24):
        tasks = (bytes(size) for _ in range(MANY))
        _, wall, spent = spent_on(lambda: list(engine.spread(nothing, None, tasks, lambda *_: None)))  # noqa: B023
        row(f"an empty task with {size / 2**20:g} MiB, each", wall, spent, MANY)
    classifier = load_model(entries[0].file, images, read).classifier
    _, wall, spent = spent_on(lambda: [ray.get(ray.put(pack(classifier))).unpack() for _ in range(MANY)])
    row("a network packed and unpacked, each", wall, spent, MANY)
    efficiency = sum(run.cost.cpu_seconds for run in alone.runs) / sum(run.cost.cpu_seconds for run in there.runs)
    print(f"\nProcessor time of the scans themselves, here over there: {efficiency:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]), Path(folder))
