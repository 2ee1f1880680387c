"""Where the command line writes: the report to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from backdoorscan.errors import OutputError
from backdoorscan.files import write_whole

if TYPE_CHECKING:
    from backdoorscan.report import Report


class Color(StrEnum):
    """When to use colour."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True)
class Terminal:
    """The global options.

    Attributes:
        quiet: Whether to say nothing but the report and errors.
        color: When to use colour.
        progress: Whether progress bars are welcome.
        config: ``--config``.
    """

    quiet: bool = False
    color: Color = Color.AUTO
    progress: bool = True
    config: Path | None = None

    def say(self, text: str) -> None:
        """Tell the user something that is not the report."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def check_output(self, output: Path | None) -> None:
        """Complain before any work about a report file that could not be written after it.

        Raises:
            OutputError: It is a folder, or its folder does not exist.
        """
        if output is None or str(output) == "-":
            return
        if output.is_dir():
            raise OutputError(f"{output} is a folder.", hint="Give the name of a file.")
        if not output.absolute().parent.is_dir():
            raise OutputError(f"Cannot write {output}: there is no folder {output.absolute().parent}.")

    def emit(self, report: Report, format: str, output: Path | None) -> None:
        """Write a report to stdout or to a file.

        Raises:
            UnknownNameError: No such format.
            OutputError: The file cannot be written.
        """
        from backdoorscan.plugin import reporter
        from backdoorscan.registry import installed

        component = installed().find("reporter", format).component
        if not (isinstance(component, type) and issubclass(component, reporter.Reporter)):
            raise OutputError(f"The format {format} cannot be used.")
        if output is None or str(output) == "-":
            colored = self.color is Color.ALWAYS or (self.color is Color.AUTO and self._stdout_has_color())
            width = Console(file=sys.stdout).width if sys.stdout.isatty() else 100
            sys.stdout.write(component().render(report, reporter.Terminal(width=width, color=colored)))
            sys.stdout.flush()
            return
        text = component().render(report, reporter.Terminal())
        write_whole(output, text.encode())
        self.say(f"wrote {output}")

    @staticmethod
    def _stdout_has_color() -> bool:
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            return False
        return sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))

    @contextmanager
    def watching(self) -> Iterator[Callable[[str, float], None]]:
        """An observer that draws progress bars on stderr while the context lasts; elsewhere it does nothing.

        Whatever the user's architecture or a plugin prints meanwhile goes to stderr: stdout is for the report alone.
        """
        with redirect_stdout(sys.stderr), self._progress() as observer:
            yield observer

    @contextmanager
    def _progress(self) -> Iterator[Callable[[str, float], None]]:
        if self.quiet or not self.progress or not sys.stderr.isatty():
            yield lambda _stage, _fraction: None
            return
        from rich.progress import (
            BarColumn,
            Progress,
            TaskID,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # Units of hours tell something only now and then: the speed is that of the whole run, not of half a minute.
        period = 7 * 24 * 3600.0
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, speed_estimate_period=period) as progress:
            tasks: dict[str, TaskID] = {}

            def observe(stage: str, fraction: float) -> None:
                if stage not in tasks:
                    for task in progress.tasks:  # what never told a part of it done was a step on the way
                        if task.completed == 0:
                            progress.update(task.id, visible=False)
                    tasks[stage] = progress.add_task(stage, total=1.0)
                elif fraction < 1 and progress.tasks[progress.task_ids.index(tasks[stage])].finished:
                    progress.reset(tasks[stage])  # another round of the same
                progress.update(tasks[stage], completed=fraction)

            yield observe
