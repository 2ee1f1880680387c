"""``backdoorscan scan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from backdoorscan.cli import _options as shared
from backdoorscan.cli._console import Terminal
from backdoorscan.errors import Interrupted

KEPT = "What is kept between runs"


def scan(
    context: typer.Context,
    model: shared.Model,
    valid: shared.OptionalValid = None,
    arch: shared.Arch = None,
    detector: Annotated[
        list[str] | None, typer.Option("-d", "--detector", metavar="ID", help="Detectors to run. [default: all]")
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
    threads: shared.Threads = 1,
    jobs: Annotated[
        int | None,
        typer.Option(
            "-j",
            "--jobs",
            min=1,
            envvar="BACKDOORSCAN_JOBS",
            help="Units of work at a time, each on one thread; the report is the same. [default: the usable cores]",
        ),
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds after which to give up: exit code 2.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted scan.", rich_help_panel=KEPT)
    ] = False,
    use_cache: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache",
            help="Whether a finished scan of the same answers, and this one is kept.",
            rich_help_panel=KEPT,
        ),
    ] = True,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="BACKDOORSCAN_CACHE_DIR",
            help="Where scans are kept. [default: the platform's cache folder]",
            rich_help_panel=KEPT,
        ),
    ] = None,
    format: shared.Format = "table",
    output: shared.Output = None,
    save_triggers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the reversed triggers as .npz or .h5.")
    ] = None,
    save_figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Save the charts as PNG.")] = None,
) -> None:
    """Look for backdoors in a model.

    Ctrl-C loses nothing that is finished: the same command with --resume goes on.
    Example: backdoorscan scan model.h5 --valid clean.h5
    """
    from backdoorscan import cache, policy, scanning
    from backdoorscan.engine.keeping import Keeping
    from backdoorscan.formats.images import load_images
    from backdoorscan.registry import installed

    terminal: Terminal = context.obj
    installed().find("reporter", format)
    terminal.check_output(output)
    terminal.check_output(save_triggers)
    config = shared.settings(terminal.config)
    read = shared.read_options(arch, input_range, mean, std, layout, input_shape)
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
        timeout=timeout,
        jobs=jobs or shared.usable_cores(),
    )
    scanning.plan_detectors(options, installed())  # complain about unknown names before any work
    shared.use_threads(threads)
    folder = cache_dir or cache.default_folder()
    keeping = Keeping(folder, reports=use_cache, resume=resume, tell=terminal.say)
    try:
        with terminal.watching() as observer:
            observer("reading the images", 0.0)
            images = None if valid is None else load_images(valid, limit=limit, seed=seed)
            report = scanning.scan(model, images, read, options, observer=observer, keeping=keeping)
    except KeyboardInterrupt:
        raise Interrupted("Interrupted.", hint="The same command with --resume goes on where it ended.") from None
    terminal.emit(report, format, output)
    if save_triggers:
        from backdoorscan.formats.triggers import save_triggers as save

        # Of a backdoored model only the flagged labels': the others are no backdoors, and a repair takes all it gets.
        flagged = [f.trigger for run in report.runs for f in run.findings if f.trigger]
        save(flagged or [t for run in report.runs for part in run.detectors for t in part.triggers], save_triggers)
        terminal.say(f"wrote {save_triggers}")
    if save_figures:
        from backdoorscan.reports.album import save_figures as draw

        terminal.say(f"wrote {len(draw(report, save_figures))} pictures to {save_figures}")
    if report.verdict == "backdoored" and output is None and format == "table":
        terminal.say(
            f"next: backdoorscan repair {model} --valid {valid or 'DATA'}" + (f" --arch {arch}" if arch else "")
        )
    raise typer.Exit(policy.exit_code(report.verdict, report.complete))


T = TypeVar("T")


def _first(*values: T | None) -> T:
    """The first value that is not ``None``."""
    return next(value for value in values if value is not None)
