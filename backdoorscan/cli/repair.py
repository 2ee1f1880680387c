"""``backdoorscan repair``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from backdoorscan.cli import _options as shared
from backdoorscan.cli._advice import after_repair
from backdoorscan.cli._completion import ids
from backdoorscan.cli._console import Terminal
from backdoorscan.errors import UsageError

if TYPE_CHECKING:
    from backdoorscan.findings import Finding

PRUNING = "Options of prune"
MEASURING = "Measuring"


def repair(
    context: typer.Context,
    model: shared.Model,
    valid: shared.Valid,
    method: Annotated[
        str,
        typer.Option(
            "-m",
            "--method",
            metavar="ID",
            autocompletion=ids("repairer", ("auto", "Tries several and keeps the best.")),
            help="Repair method; auto tries several and keeps the best.",
            show_default=True,
        ),
    ] = "prune",
    option: shared.MethodOption = None,
    drop: Annotated[
        list[float] | None,
        typer.Option(
            metavar="X", help="Stop where the accuracy has dropped by X points; repeatable.", rich_help_panel=PRUNING
        ),
    ] = None,
    channels: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Remove this many channels instead; repeatable.", rich_help_panel=PRUNING),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(metavar="NAME", help="The convolution to prune.", rich_help_panel=PRUNING)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="SCAN.json", help="A scan of this model: saves scanning again.")
    ] = None,
    triggers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Reversed triggers (.npz, .h5) instead of a scan's.")
    ] = None,
    goodnet: Annotated[
        bool, typer.Option("--goodnet", help="Combine every repaired network with the original into a GoodNet.")
    ] = False,
    goodnet_format: Annotated[
        Literal["onnx", "pt2"], typer.Option("--goodnet-format", help="How GoodNets are written.")
    ] = "onnx",
    max_drop: Annotated[
        float | None, typer.Option(min=0, max=100, help="Most points of clean accuracy to lose: else exit code 1.")
    ] = None,
    rescan: Annotated[bool, typer.Option("--rescan/--no-rescan", help="Scan the repaired networks again.")] = True,
    test: Annotated[
        str | None,
        typer.Option("--test", metavar="DATA", help="Clean images to measure on.", rich_help_panel=MEASURING),
    ] = None,
    poisoned: shared.Poisoned = None,
    learn_from_poisoned: Annotated[
        bool,
        typer.Option(
            "--learn-from-poisoned",
            help="Give half of the poisoned images to the method (retrain, unlearn); the rest measures.",
            rich_help_panel=MEASURING,
        ),
    ] = False,
    target: shared.Target = None,
    arch: shared.Arch = None,
    trust: shared.Trust = False,
    limit: shared.Limit = None,
    input_range: shared.InputRange = None,
    mean: shared.Mean = None,
    std: shared.Std = None,
    layout: shared.Layout = None,
    seed: shared.Seed = None,
    threads: shared.Threads = 1,
    device: shared.Device = None,
    format: shared.Format = None,
    report_output: Annotated[
        Path | None,
        typer.Option(
            "--report-output",
            metavar="FILE",
            help="Write the report there, not to stdout.",
            rich_help_panel=shared.REPORT,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Folder for the networks. [default: MODEL-repaired]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files in an existing folder.")] = False,
) -> None:
    """Repair a model: write B′ in the model's own format, and GoodNets as ONNX or .pt2.

    Example: backdoorscan repair model.h5 --valid clean.h5 --method prune --drop 4
    Example: backdoorscan repair model.h5 --valid clean.h5 --method auto --report scan.json --max-drop 2
    """
    from backdoorscan import policy, repairing
    from backdoorscan.formats.images import load_images
    from backdoorscan.measured import RepairReport
    from backdoorscan.registry import installed

    terminal: Terminal = context.obj
    terminal.check_formats(format, report_output, RepairReport)
    config = shared.settings(terminal.config)
    read = shared.read_options(arch, input_range, mean, std, layout, trust=trust, device=device or config.device)
    seed = seed if seed is not None else config.seed or 0
    settings = shared.method_options(option, {key: value for key, value in config.methods.items() if key == method})
    shortcuts: dict[str, Any] = {"drop": drop, "channels": channels, "layer": layer}
    chosen = settings.setdefault(method, {})
    chosen.update({name: value for name, value in shortcuts.items() if value})
    if method == repairing.AUTO:
        settings.pop(method)
    installed().check_settings("repairer", [] if method == repairing.AUTO else [method], settings)
    if report and triggers:
        raise UsageError("Both --report and --triggers are given.", hint="Pass one of them.")
    shared.use_threads(threads)
    options = repairing.RepairOptions(
        method=method,
        settings=chosen,
        output=output,
        force=force,
        goodnet=goodnet,
        goodnet_format=goodnet_format,
        max_drop=max_drop,
        rescan=rescan,
        learn_from_poisoned=learn_from_poisoned,
        target=target,
        alpha=policy.DEFAULT_ALPHA if config.alpha is None else config.alpha,
        seed=seed,
    )
    repairing.plan_methods(options, installed())  # complain about options before any work
    with terminal.watching() as observer:
        observer("reading the images", 0.0)
        images = load_images(valid, limit=limit, seed=seed)
        findings = _reported(report, model) if report else None
        if triggers:
            from backdoorscan.formats.loading import load_model
            from backdoorscan.formats.triggers import load_triggers

            classifier = load_model(model, images, read, seed=seed).classifier
            findings = load_triggers(triggers, classifier, images)
        result = repairing.repair(
            model,
            images,
            poisoned,
            read,
            options,
            findings=findings,
            test=test,
            observer=observer,
            foretold=terminal.foretelling("each scan in this repair"),
        )
    terminal.emit(result, format, report_output)
    if terminal.shows_table(format, report_output):
        terminal.say(after_repair(result, valid))
    raise typer.Exit(policy.repair_exit_code(result))


def _reported(path: Path, model: Path) -> Sequence[Finding]:
    """The findings of a stored scan of this very file.

    Raises:
        UsageError: It is not a scan report, or one of another file.
    """
    from backdoorscan.formats.loading import read_artifact
    from backdoorscan.report import ScanReport

    try:
        report = ScanReport.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UsageError(f"Cannot read the report {path}.", why=str(error)) from error
    digest = read_artifact(model).sha256
    for run in report.runs:
        if run.model.get("sha256") == digest:
            return run.findings
    raise UsageError(f"{path} is not a report on {model}.", why="No model in it has this file's digest.")
