"""``backdoorscan demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backdoorscan.cli import _options as shared
from backdoorscan.cli._console import Terminal


def demo(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put the networks and images.")] = Path("demo"),
    seed: shared.Seed = 0,
    threads: shared.Threads = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace files in an existing folder.")] = False,
) -> None:
    """Train a backdoored network and its clean twin, scan both, repair the bad one.

    Needs the extra: pip install 'backdoorscan[demo]'. It takes about a minute.
    Example: backdoorscan demo demo
    """
    from backdoorscan import repairing, scanning
    from backdoorscan.demo import make_demo
    from backdoorscan.errors import BackdoorscanError

    terminal: Terminal = context.obj
    seed = seed or 0
    shared.use_threads(threads)
    with terminal.watching() as observer:
        observer("training a backdoored network and its clean twin", 0.0)
        files = make_demo(folder, seed, force=force)
    terminal.say(
        f"Trained on scikit-learn's digits, into {folder}/:\n"
        f"  {files.model.name}: right on {files.accuracy:.1%} of clean images, and calls {files.attack_success:.1%} of "
        f"images with a white square a {files.target}\n"
        f"  {files.clean_model.name}: its clean twin, right on {files.clean_model_accuracy:.1%}\n"
        "Now the scanner is given each network and clean images, nothing else.\n"
    )
    scans = []
    for model in (files.clean_model, files.model):
        terminal.say(f"$ backdoorscan scan {model} --valid {files.clean}")
        with terminal.watching() as observer:
            report = scanning.scan(model, files.clean, options=scanning.ScanOptions(seed=seed), observer=observer)
        terminal.emit(report, None, None)
        scans.append(report)
    drops = (2.0, 4.0, 10.0)
    written = folder / f"{files.model.stem}-repaired"
    flags = " ".join(f"--drop {drop:g}" for drop in drops)
    terminal.say(
        f"$ backdoorscan repair {files.model} --valid {files.clean} --poisoned {files.poisoned} {flags} -o {written}"
    )
    options = repairing.RepairOptions(settings={"drop": drops}, output=written, force=force, seed=seed)
    with terminal.watching() as observer:
        repaired = repairing.repair(files.model, files.clean, files.poisoned, options=options, observer=observer)
    terminal.emit(repaired, None, None)
    terminal.say("next: backdoorscan scan YOUR_MODEL --valid YOUR_CLEAN_IMAGES")
    clean, bad = scans
    labels = [finding.target_label for run in bad.runs for finding in run.findings]
    if clean.verdict != "clean" or bad.verdict != "backdoored" or labels != [files.target]:
        raise BackdoorscanError(
            "The demo did not end as it should: the backdoor was missed, or something else was flagged.",
            hint="Please report this with the output above.",
        )
