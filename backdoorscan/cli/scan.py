"""``backdoorscan scan``."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from backdoorscan.cli import _options as shared
from backdoorscan.cli._advice import after_scan
from backdoorscan.cli._completion import ids
from backdoorscan.cli._console import Terminal
from backdoorscan.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from backdoorscan.costing import Forecast
    from backdoorscan.engine.keeping import Keeping
    from backdoorscan.images import LabelledImages
    from backdoorscan.manifest import Entry
    from backdoorscan.report import ScanReport
    from backdoorscan.scanning import Observer, ScanOptions

KEPT = "What is kept between runs"
GATE = "When to fail"


def scan(
    context: typer.Context,
    models: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL...", help="Model files, or folders to search for them.", show_default=False),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Scan the models that this TOML file lists in tables [[model]]."),
    ] = None,
    valid: shared.OptionalValid = None,
    arch: shared.Arch = None,
    trust: shared.Trust = False,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            "-d",
            "--detector",
            metavar="ID",
            envvar="BACKDOORSCAN_DETECTORS",
            autocompletion=ids("detector"),
            help="Detectors to run. [default: all]",
        ),
    ] = None,
    option: shared.MethodOption = None,
    labels: Annotated[
        str | None, typer.Option(metavar="0-9,33", help="Examine only these labels; the report says so.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(envvar="BACKDOORSCAN_ALPHA", help="False alarms per clean model. [default: 0.01]")
    ] = None,
    limit: shared.Limit = None,
    input_range: shared.InputRange = None,
    mean: shared.Mean = None,
    std: shared.Std = None,
    layout: shared.Layout = None,
    input_shape: shared.InputShape = None,
    seed: shared.Seed = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            envvar="BACKDOORSCAN_THREADS",
            help="Threads; more than one only helps large networks. [default: 1]",
            rich_help_panel=shared.RUNNING,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "-j",
            "--jobs",
            min=1,
            envvar="BACKDOORSCAN_JOBS",
            help="Units of work, or models, at a time, each on one thread; the report is the same. "
            "[default: the usable cores]",
            rich_help_panel=shared.RUNNING,
        ),
    ] = None,
    device: shared.Device = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="local|ray",
            envvar="BACKDOORSCAN_ENGINE",
            help="Where to work: here, or on all cores of a Ray cluster; the report is the same. [default: local]",
            rich_help_panel=shared.RUNNING,
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            envvar="BACKDOORSCAN_RAY_ADDRESS",
            help="The Ray cluster. [default: RAY_ADDRESS, or the one this machine is part of, or a new one here]",
            rich_help_panel=shared.RUNNING,
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0,
            envvar="BACKDOORSCAN_TIMEOUT",
            help="Seconds after which to give a model up: exit code 2.",
            rich_help_panel=shared.RUNNING,
        ),
    ] = None,
    fail_on: Annotated[
        str | None,
        typer.Option(
            metavar="low|medium|high|critical|never",
            envvar="BACKDOORSCAN_FAIL_ON",
            help="Least severity of a finding for exit code 1. [default: medium: every proven backdoor]",
            rich_help_panel=GATE,
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="BACKDOORSCAN_BASELINE",
            help="Accept the findings that this file lists, each with a reason and a date.",
            rich_help_panel=GATE,
        ),
    ] = None,
    write_baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Add the findings to this file; fill the reasons in.", rich_help_panel=GATE),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted scan.", rich_help_panel=KEPT)
    ] = False,
    use_cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            envvar="BACKDOORSCAN_CACHE",
            help="Whether a finished scan of the same answers, and this one is kept. [default: cache]",
            rich_help_panel=KEPT,
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="BACKDOORSCAN_CACHE_DIR",
            help="Where scans are kept. [default: the platform's cache folder]",
            rich_help_panel=KEPT,
        ),
    ] = None,
    format: Annotated[
        list[str] | None,
        shared.format_option(shared.REPORTERS, envvar="BACKDOORSCAN_FORMATS", autocompletion=ids("reporter")),
    ] = None,
    output: shared.Output = None,
    save_triggers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save the reversed triggers as .npz or .h5.", rich_help_panel=shared.REPORT),
    ] = None,
    save_figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save the charts as PNG.", rich_help_panel=shared.REPORT)
    ] = None,
) -> None:
    """Look for backdoors in models.

    Ctrl-C loses nothing that is finished: the same command with --resume goes on.
    Example: backdoorscan scan model.h5 --valid clean.h5
    Example: backdoorscan scan weights.pt --arch net.py:make_net --valid images/ --limit 1000
    Example: backdoorscan scan models/ --valid clean.h5 -f sarif=scan.sarif -f markdown=summary.md
    """
    from backdoorscan import baseline as baselines
    from backdoorscan import cache, policy, scanning
    from backdoorscan import manifest as manifests
    from backdoorscan.engine import named
    from backdoorscan.engine.keeping import Keeping
    from backdoorscan.registry import installed
    from backdoorscan.report import ScanReport

    terminal: Terminal = context.obj
    config = shared.settings(terminal.config)
    formats = format or config.formats
    terminal.check_formats(formats, output, ScanReport)
    terminal.check_output(save_triggers)
    terminal.check_output(write_baseline)
    seed = _first(seed, config.seed, 0)
    chosen = tuple(detector or config.detectors or ())
    # Tables in the configuration file serve every run; only those of detectors that run matter to this one.
    detectors = {plugin.id for plugin in installed().of_kind("detector")}
    base = {key: value for key, value in config.methods.items() if key in (chosen or detectors)}
    options = scanning.ScanOptions(
        detectors=chosen,
        settings=shared.method_options(option, base),
        labels=shared.parse_labels(labels),
        alpha=_first(alpha, config.alpha, policy.DEFAULT_ALPHA),
        seed=seed,
        timeout=config.timeout if timeout is None else timeout,
        jobs=jobs or config.jobs or shared.usable_cores(),
    )
    scanning.plan_detectors(options, installed())  # complain about unknown names before any work
    known = manifests.Entry(
        file=Path(),
        read=shared.read_options(arch, input_range, mean, std, layout, input_shape, trust, device or config.device),
        labels=options.labels,
        alpha=options.alpha,
        fail_on=policy.FailOn.named(_first(fail_on, config.fail_on, policy.DEFAULT_FAIL_ON)),
    )
    entries = manifests.gather(models or [], known, installed(), terminal.say)
    entries += manifests.load(manifest, known) if manifest else []
    if not entries:
        raise UsageError("There is no model to scan.", hint="backdoorscan scan model.h5 --valid clean.h5")
    if save_triggers and len(entries) > 1:
        raise UsageError("--save-triggers is of use only with one model.", hint="The JSON report has the triggers.")
    accepting = baseline or config.baseline
    accepted = baselines.load(accepting) if accepting else []
    if write_baseline and write_baseline.exists():
        baselines.load(write_baseline, whole=False)  # complain before any work
    shared.use_threads(threads or config.threads or 1)
    keeping = Keeping(
        cache_dir or config.cache_dir or cache.default_folder(),
        reports=_first(use_cache, config.cache, True),
        resume=resume,
        tell=terminal.say,
    )
    limit, valid = limit or config.limit, valid or config.valid
    chosen_engine, address = _first(engine, config.engine, "local"), ray_address or config.ray_address
    elsewhere = named(chosen_engine, address, known.read.device)
    options = replace(options, engine=elsewhere)  # last, for a cluster may have to be started
    try:
        with terminal.watching() as observer:
            foretold = terminal.foretelling("this scan")
            report = _scanned(entries, valid, limit, options, observer, keeping, foretold)
    except KeyboardInterrupt:
        raise Interrupted("Interrupted.", hint="The same command with --resume goes on where it ended.") from None
    report, expired = baselines.suppress(report, accepted, datetime.date.today())
    for lapsed in expired:
        terminal.say(f"expired on {lapsed.expires}: {accepting} no longer accepts the finding {lapsed}")
    terminal.emit(report, formats, output)
    if write_baseline:
        count = baselines.write(write_baseline, report, datetime.date.today())
        terminal.say(f"wrote {count} finding{'' if count == 1 else 's'} to {write_baseline}; each needs a reason")
    if save_triggers:
        from backdoorscan.formats.triggers import save_triggers as save

        # Of a backdoored model only the flagged labels': the others are no backdoors, and a repair takes all it gets.
        flagged = [f.trigger for run in report.runs for f in run.findings if f.trigger]
        save(flagged or [t for run in report.runs for part in run.detectors for t in part.triggers], save_triggers)
        terminal.say(f"wrote {save_triggers}")
    if save_figures:
        from backdoorscan.reports.album import save_figures as draw

        terminal.say(f"wrote {len(draw(report, save_figures))} pictures to {save_figures}")
    if terminal.shows_table(formats, output):
        run, entry = max(zip(report.runs, entries, strict=True), key=lambda pair: pair[0].verdict == report.verdict)
        terminal.say(after_scan(run, entry.valid or valid, entry.read.arch, entry.read.trust))
    else:
        for run in report.runs:
            if run.error:
                terminal.say(f"not scanned: {run.error.partition(chr(10))[0]}")
    raise typer.Exit(policy.gate(zip(report.runs, [entry.fail_on for entry in entries], strict=True)))


def _scanned(
    entries: Sequence[Entry],
    valid: str | None,
    limit: int | None,
    options: ScanOptions,
    observer: Observer,
    keeping: Keeping,
    foretold: Callable[[Forecast], None] | None,
) -> ScanReport:
    """The report of one model, which raises what is wrong with it, or of several."""
    from backdoorscan import scanning, surveying
    from backdoorscan.formats.images import load_images

    def load(source: str | None) -> LabelledImages | None:
        return None if source is None else load_images(source, limit=limit, seed=options.seed)

    observer("reading the images", 0.0)
    if len(entries) > 1:
        default = load(valid) if any(entry.valid is None for entry in entries) else None
        return surveying.survey(entries, default, options, limit=limit, observer=observer, keeping=keeping)
    (entry,) = entries
    own = replace(options, labels=entry.labels, alpha=entry.alpha)
    images = load(entry.valid or valid)
    report = scanning.scan(entry.file, images, entry.read, own, observer=observer, keeping=keeping, foretold=foretold)
    return replace(report, runs=[entry.named(run) for run in report.runs])


T = TypeVar("T")


def _first(*values: T | None) -> T:
    """The first value that is not ``None``."""
    return next(value for value in values if value is not None)
