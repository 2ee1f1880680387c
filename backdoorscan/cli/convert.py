"""``backdoorscan convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backdoorscan.cli import _files
from backdoorscan.cli import _options as shared
from backdoorscan.cli._console import Terminal
from backdoorscan.errors import UsageError


def convert(
    context: typer.Context,
    model: shared.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new file: .onnx, .pt2 or .safetensors.")],
    to: Annotated[
        str | None, typer.Option("--to", metavar="FORMAT", help="onnx, pt2 or safetensors, where OUT does not tell.")
    ] = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Let the new file take images N×C×H×W in [0, 1], however MODEL is fed.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    arch: shared.Arch = None,
    trust: shared.Trust = False,
    valid: Annotated[
        str | None,
        typer.Option(
            "--valid", metavar="DATA", help="Clean labelled images, as for scan.", rich_help_panel=shared.FEEDING
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Use a sample of the images.", rich_help_panel=shared.FEEDING)
    ] = None,
    input_range: shared.InputRange = None,
    mean: shared.Mean = None,
    std: shared.Std = None,
    layout: shared.Layout = None,
    input_shape: shared.InputShape = None,
    seed: shared.Seed = None,
    threads: shared.Threads = 1,
    format: _files.Format = None,
    output: shared.Output = None,
) -> None:
    """Write a model in another format: ONNX, an exported PyTorch program (.pt2), or safetensors with a graph as JSON.

    The new file takes any number of inputs, in the units and the axis order of the original, and keeps its final
    activation. It is read back and compared with the original on random inputs before it is put in its place.
    With safetensors the graph is written beside them, with the suffix .json: read both with --arch OUT.json.
    Example: backdoorscan convert model.h5 model.onnx
    Example: backdoorscan convert model.h5 model.pt2 --pixels --valid clean.h5
    """
    from backdoorscan.formats import converting
    from backdoorscan.formats.images import load_images
    from backdoorscan.reports.files import conversion_table

    terminal: Terminal = context.obj
    _files.check_formats(terminal, format, output)
    read = shared.read_options(arch, input_range, mean, std, layout, input_shape, trust=trust)
    if not pixels and (valid or read.pinned):
        raise UsageError(
            "How the model was fed is only part of the new file with --pixels.", hint="Add --pixels, or leave it out."
        )
    seed = seed if seed is not None else shared.settings(terminal.config).seed or 0
    # Before the images are read, which may take long.
    converting.targets(model, out, to, read, force)
    shared.use_threads(threads)
    with terminal.watching() as observer:
        observer("converting", 0.0)
        images = None if valid is None else load_images(valid, limit=limit, seed=seed)
        report = converting.convert(model, out, read, to=to, pixels=pixels, images=images, force=force, seed=seed)
    _files.emit(terminal, report, format, output, lambda place: conversion_table(report, place))
