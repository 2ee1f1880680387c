"""What ``inspect`` and ``convert`` say, for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from backdoorscan.classifier import InputConvention
from backdoorscan.formats.converting import Conversion
from backdoorscan.formats.inspecting import Inspection, Layer
from backdoorscan.plugin.reporter import Terminal
from backdoorscan.reports.printing import printed
from backdoorscan.reports.words import plain, visible

SHOWN = 24
"""Layers in a table that does not show all of them."""

_FILES = 5
_NAMES = 8


def inspection_table(report: Inspection, terminal: Terminal, everything: bool = False) -> str:
    """An inspection as text of at most ``terminal.width`` columns.

    Args:
        report: What was found.
        terminal: Where it goes.
        everything: Whether to show all layers and files, however many there are.
    """
    return printed(_inspection(report, everything), terminal)


def conversion_table(report: Conversion, terminal: Terminal) -> str:
    """A conversion as text of at most ``terminal.width`` columns."""
    how = "the input of the original" if report.pixels is None else f"images in [0, 1], fed as {_fed(report.pixels)}"
    facts = [
        ("from", f"{report.model['path']} ({report.model['format']}, SHA-256 {report.model['sha256']})"),
        *(("written", f"{file['path']} ({file['bytes']:,} bytes, SHA-256 {file['sha256']})") for file in report.files),
        ("input", f"N×{_size(report.input_shape)} {report.layout if len(report.input_shape) == 3 else ''}, {how}"),
        ("output", f"N×{report.num_classes}"),
        (
            "difference",
            f"at most {report.difference:.3g} ({report.tolerance:.3g} is allowed), "
            f"as {' and '.join(report.compared)} run it",
        ),
    ]
    return printed([_grid(facts)], terminal)


def _inspection(report: Inspection, everything: bool) -> Iterator[RenderableType]:
    yield Text(visible(report.path), style="bold")
    yield _grid(_facts(report, everything))
    if report.error is not None:
        yield Text(visible(report.error.what), style="bold red")
        for line in (report.error.why, report.error.hint):
            if line:
                yield Text(visible(line), style="red")
        return
    for note in report.notes:
        yield Text(visible(f"note: {note}"), style="yellow")
    if report.layers:
        yield from _layers(report.layers, everything)


def _facts(report: Inspection, everything: bool) -> Iterator[tuple[str, str]]:
    yield "format", report.format or "unknown"
    yield "SHA-256", report.sha256
    yield "size", f"{report.bytes:,} bytes"
    if report.parts:
        parts = sorted(report.parts.items())
        shown = parts if everything else parts[:_FILES]
        lines = [f"{name} ({count:,} bytes)" for name, count in shown]
        yield "files", "\n".join([*lines, *_more(len(parts) - len(shown))])
    if report.error is not None:
        return
    for key, value in report.details.items():
        if key != "trace_error":
            if isinstance(value, Mapping):
                value = [f"{name} {own}" for name, own in value.items()]
            yield key.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list | tuple) else plain(value)
    if report.input_shape is None:
        yield "input", f"any, {report.layout}"
    else:
        last = len(report.input_shape) == 3 and report.layout == "NHWC"
        shape = (*report.input_shape[1:], report.input_shape[0]) if last else report.input_shape
        yield "input", f"N×{_size(shape)}" + (f" {report.layout}" if len(shape) == 3 else "")
    if report.convention is not None:
        yield "fed", f"{_fed(report.convention)}, as the file says"
    yield "preprocessing", _names(report.preprocessing)
    yield "classes", plain(report.num_classes)
    yield "final activation", report.final_activation or "none"
    yield "head", "–" if report.head is None else f"{report.head['layer']}, {report.head['outputs']} outputs"
    pruned = report.prunable
    yield "would be pruned", "–" if pruned is None else f"{pruned['layer']}, {pruned['channels']} channels"
    yield "decides by the image", _names(report.decisions)
    if report.branches:
        yield "joined branches", _names(report.branches)
    yield "parameters", "–" if report.parameters is None else f"{report.parameters:,}"


def _layers(layers: Sequence[Layer], everything: bool) -> Iterator[RenderableType]:
    folded = not everything and len(layers) > SHOWN
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("layer", "kind", "output", "parameters"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for layer in (*layers[: SHOWN // 2], *layers[-SHOWN // 2 :]) if folded else layers:
        if folded and layer is layers[-SHOWN // 2]:
            table.add_row(f"… {len(layers) - SHOWN} more", "", "(--all shows them)", "")
        shape = "–" if layer.output_shape is None else _size(layer.output_shape)
        count = f"{layer.parameters:,}" if layer.parameters else ""
        table.add_row(Text(visible(layer.name)), Text(visible(layer.kind)), shape, count)
    yield table


def _grid(facts: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(Text(visible(name), style="dim"), Text(visible(value, lines=True)))
    return grid


def _size(shape: Sequence[int | None]) -> str:
    return "×".join("any" if size is None else str(size) for size in shape)


def _fed(convention: InputConvention) -> str:
    return str(replace(convention, layout="")).strip()


def _names(names: Sequence[str]) -> str:
    return ", ".join([*names[:_NAMES], *_more(len(names) - _NAMES)]) or "none"


def _more(count: int) -> list[str]:
    return [f"… {count} more"] if count > 0 else []
