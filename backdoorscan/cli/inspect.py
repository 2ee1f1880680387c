"""``backdoorscan inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from backdoorscan.cli import _files
from backdoorscan.cli import _options as shared
from backdoorscan.cli._console import Terminal
from backdoorscan.errors import ExitCode


def inspect(
    context: typer.Context,
    model: shared.Model,
    arch: shared.Arch = None,
    trust: shared.Trust = False,
    layout: shared.Layout = None,
    input_shape: shared.InputShape = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show all layers and files, however many there are.")
    ] = False,
    threads: shared.Threads = 1,
    format: _files.Format = None,
    output: shared.Output = None,
) -> None:
    """Say what a model file is and holds: format, digest, layers, head, what would be pruned. No images are needed.

    Exit code 2 with a report: the file could not be read; the report says why.
    Example: backdoorscan inspect model.h5
    Example: backdoorscan inspect weights.pt --arch net.py:Net --input-shape 3,32,32 -f json
    """
    from backdoorscan.formats import inspecting
    from backdoorscan.reports.files import inspection_table

    terminal: Terminal = context.obj
    _files.check_formats(terminal, format, output)
    read = shared.read_options(arch, None, None, None, layout, input_shape, trust=trust)
    shared.use_threads(threads)
    with terminal.watching() as observer:
        observer("reading the model", 0.0)
        report = inspecting.inspect(model, read)
    _files.emit(terminal, report, format, output, lambda place: inspection_table(report, place, everything))
    if report.error is not None:
        raise typer.Exit(ExitCode.ERROR)
