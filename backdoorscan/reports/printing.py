"""What rich draws, as text."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.console import Console, RenderableType

from backdoorscan.plugin.reporter import Terminal


def printed(parts: Iterable[RenderableType], terminal: Terminal) -> str:
    """The parts one below the other, as text of at most ``terminal.width`` columns, ending in a newline."""
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=terminal.width,
        force_terminal=terminal.color,
        color_system="256" if terminal.color else None,
        no_color=not terminal.color,
        highlight=False,
        safe_box=not terminal.color,
        legacy_windows=False,
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
