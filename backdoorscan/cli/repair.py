"""``backdoorscan repair``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from backdoorscan.cli import _options as shared
from backdoorscan.cli._console import Terminal


def repair(
    context: typer.Context,
    model: shared.Model,
    valid: shared.Valid,
    method: Annotated[str, typer.Option("-m", "--method", metavar="ID", help="Repair method.")] = "prune",
    drop: Annotated[
        list[float] | None,
        typer.Option(help="prune: stop where the clean accuracy has dropped by X percentage points; repeatable."),
    ] = None,
    channels: Annotated[
        list[int] | None, typer.Option(help="prune: remove this many channels instead; repeatable.")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="prune: the convolution to prune.")] = None,
    option: shared.MethodOption = None,
    poisoned: shared.Poisoned = None,
    target: shared.Target = None,
    arch: shared.Arch = None,
    limit: shared.Limit = None,
    input_range: shared.InputRange = None,
    mean: shared.Mean = None,
    std: shared.Std = None,
    layout: shared.Layout = None,
    seed: shared.Seed = None,
    threads: shared.Threads = 1,
    format: shared.Format = "table",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Folder for the results. [default: MODEL-repaired]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files in an existing folder.")] = False,
) -> None:
    """Repair a model: write B′ in the model's own format, and GoodNets as ONNX.

    Example: backdoorscan repair model.h5 --valid clean.h5 --method prune --drop 4
    """
    from backdoorscan import policy, repairing
    from backdoorscan.formats.images import load_images
    from backdoorscan.registry import installed

    terminal: Terminal = context.obj
    installed().find("reporter", format)
    config = shared.settings(terminal.config)
    read = shared.read_options(arch, input_range, mean, std, layout)
    seed = seed if seed is not None else config.seed or 0
    settings = shared.method_options(option, {key: value for key, value in config.methods.items() if key == method})
    shortcuts: dict[str, Any] = {"drop": drop, "channels": channels, "layer": layer}
    chosen = settings.setdefault(method, {})
    chosen.update({name: value for name, value in shortcuts.items() if value})
    installed().check_settings("repairer", [method], settings)
    shared.use_threads(threads)
    options = repairing.RepairOptions(
        method=method, settings=chosen, output=output, force=force, target=target, seed=seed
    )
    with terminal.watching() as observer:
        observer("reading the images", 0.0)
        images = load_images(valid, limit=limit, seed=seed)
        report = repairing.repair(model, images, poisoned, read, options, observer=observer)
    terminal.emit(report, format, None)
    raise typer.Exit(policy.repair_exit_code(report))
