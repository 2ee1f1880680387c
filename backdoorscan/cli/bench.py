"""``backdoorscan bench``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backdoorscan.cli import _options as shared
from backdoorscan.cli._console import Terminal

if TYPE_CHECKING:
    from backdoorscan.bench.report import BenchReport
    from backdoorscan.plugin import reporter
    from backdoorscan.plugin.attack import Attack

FORMATS = ("table", "json", "html")
ZOO = "The networks"
JUDGED = "What is judged"


def bench(
    context: typer.Context,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Labelled images to train on; repeatable. [default: digits]",
            rich_help_panel=ZOO,
        ),
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Attacks; repeatable. [default: all]", rich_help_panel=ZOO)
    ] = None,
    architecture: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Architectures; repeatable. [default: all]", rich_help_panel=ZOO),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=0, help="Networks per data, architecture and attack.", rich_help_panel=ZOO)
    ] = 1,
    clean: Annotated[
        int, typer.Option(min=0, help="Clean networks per data and architecture.", rich_help_panel=ZOO)
    ] = 5,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Images shown to a network in training.", rich_help_panel=ZOO)
    ] = None,
    train_only: Annotated[
        bool, typer.Option("--train-only", help="Train what is missing, list the networks, judge nothing.")
    ] = False,
    detector: Annotated[
        list[str] | None,
        typer.Option("-d", "--detector", metavar="ID", help="[default: those of a scan]", rich_help_panel=JUDGED),
    ] = None,
    repair: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD", help="Repair methods, or auto. [default: none]", rich_help_panel=JUDGED),
    ] = None,
    option: shared.MethodOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The defender's clean images. [default: 1000, or a third of all]")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(envvar="BACKDOORSCAN_ALPHA", help="False alarms per clean model. [default: 0.01]")
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", envvar="BACKDOORSCAN_CACHE_DIR", help="Where networks and results are kept."),
    ] = None,
    use_cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Whether to use and keep results; networks always are.")
    ] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, each on one thread.")] = 1,
    seed: shared.Seed = None,
    format: shared.Format = None,
    output: shared.Output = None,
) -> None:
    """Train a zoo of small clean and backdoored networks and judge detectors and repairs on it.

    Networks and results are kept: what is there already is not made again.
    Example: backdoorscan bench --attack badnets --attack blended --repair prune
    """
    from backdoorscan import policy
    from backdoorscan.bench import running
    from backdoorscan.bench.data import load_datasets
    from backdoorscan.bench.report import summarise
    from backdoorscan.bench.spec import plan_zoo
    from backdoorscan.bench.training import Recipe
    from backdoorscan.bench.zoo import train_zoo
    from backdoorscan.costing import Meter
    from backdoorscan.errors import UnknownNameError
    from backdoorscan.registry import installed

    terminal: Terminal = context.obj
    for destination in terminal.destinations(format, output):
        if destination.format not in FORMATS:
            raise UnknownNameError("format of a bench", destination.format, FORMATS)
        terminal.check_output(destination.file)
    settings = shared.method_options(option, {})
    attacks = _attacks(attack, settings)
    options = running.BenchOptions(
        detectors=tuple(detector or ()),
        repairs=tuple(dict.fromkeys(repair or ())),
        settings={name: values for name, values in settings.items() if name not in {own.id for own in attacks}},
        alpha=policy.DEFAULT_ALPHA if alpha is None else alpha,
        seed=seed or 0,
    )
    running.check(options, installed())  # complain about unknown names before any work
    shared.use_threads(1)
    meter = Meter()
    recipe = Recipe() if samples is None else Recipe(samples=samples, epochs=1)
    datasets = load_datasets(data or (), limit, options.seed)
    specs = plan_zoo(
        datasets, architecture or (), attacks, clean=clean, backdoored=seeds, seed=options.seed, recipe=recipe
    )
    with terminal.watching() as observer:
        entries = list(train_zoo(specs, cache_dir, jobs=jobs, observer=observer))
    if train_only:
        for entry in entries:
            success = "" if entry.attack_success is None else f"  attack success {entry.attack_success:.1%}"
            print(f"{entry.path}  {entry.spec.name}  accuracy {entry.accuracy:.1%}{success}")
        return
    terminal.say(f"{len(entries)} networks, {sum(entry.fresh for entry in entries)} of them new")
    with terminal.watching() as observer:
        results = list(
            running.judge_zoo(entries, options, cache_dir, jobs=jobs, use_cache=use_cache, observer=observer)
        )
    report = summarise(results, options, meter)
    terminal.emit(report, format, output, render=partial(_rendered, report), width=120)
    if terminal.shows_table(format, output):
        terminal.say("next: the same with -f html -o bench.html draws what was kept")


def _attacks(names: Sequence[str] | None, settings: Mapping[str, Mapping[str, Any]]) -> list[Attack]:
    """The attacks with their options; all if none is named.

    Raises:
        UsageError: An unknown attack or option.
        PluginError: A broken one was asked for.
    """
    from backdoorscan.plugin.attack import Attack
    from backdoorscan.registry import installed

    everything = [plugin.id for plugin in installed().of_kind("attack")]
    attacks = []
    for name in dict.fromkeys(names or everything):
        component = installed().find("attack", name).component
        if isinstance(component, type) and issubclass(component, Attack):
            attacks.append(component.configured(settings.get(name, {})))
    return attacks


def _rendered(report: BenchReport, format: str, terminal: reporter.Terminal) -> str:
    """The report as text."""
    from backdoorscan.bench import rendering
    from backdoorscan.reports.json import Json

    if format == "json":
        return Json().render(report, terminal)
    return (
        rendering.render_html(report)
        if format == "html"
        else rendering.render_table(report, terminal.width, terminal.color)
    )
