"""Where the command line writes: the report to stdout, everything else to stderr."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from backdoorscan.errors import BackdoorscanError, OutputError, PluginError, UsageError
from backdoorscan.files import write_whole

if TYPE_CHECKING:
    from rich.console import RenderableType

    from backdoorscan.plugin import reporter
    from backdoorscan.report import Report

_NEVER_FOLDED = 10_000
"""Columns."""


class Color(StrEnum):
    """When to use colour."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True)
class Destination:
    """One rendering of a report.

    Attributes:
        format: Its name.
        file: Where it goes; ``None`` for stdout.
    """

    format: str
    file: Path | None = None


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

    def destinations(self, formats: Sequence[str] | None, output: Path | None) -> list[Destination]:
        """What is written where.

        Args:
            formats: FORMAT, or FORMAT=FILE, for each rendering; none for a table.
            output: Where the only one of them goes.

        Returns:
            At most one goes to stdout; where all have a file, a table does, unless the user wants quiet.

        Raises:
            UsageError: Two of them go to one place, or it is not clear where one goes.
        """
        found = [_destination(text) for text in formats or ["table"]]
        if output is not None and str(output) != "-":
            if len(found) > 1 or found[0].file is not None:
                raise UsageError(
                    "The file for the report goes with one format.", hint=f"Name a file for each: -f FORMAT={output}."
                )
            return [Destination(found[0].format, output)]
        shown = [each.format for each in found if each.file is None]
        if len(shown) > 1:
            both = f"The formats {shown[0]} and {shown[1]} both go to stdout."
            raise UsageError(both, hint=f"Give one a file: -f {shown[1]}=FILE.")
        (file, count), *_ = Counter(each.file and each.file.absolute() for each in found).most_common(1)
        if count > 1:
            raise UsageError(f"Two formats go to {file}.", hint="Give each a file of its own.")
        return found if shown or self.quiet else [*found, Destination("table")]

    def check_formats(self, formats: Sequence[str] | None, output: Path | None, kind: type[Report]) -> None:
        """Complain before any work about formats that could not be written after it.

        Raises:
            UsageError: As ``destinations``; no such format, or one that has no place for this kind of report.
            PluginError: It is broken.
            OutputError: A file that could not be written.
        """
        from backdoorscan.reports.taxonomy import refuse

        for destination in self.destinations(formats, output):
            if issubclass(kind, _refused(_reporter(destination.format))):
                raise refuse(kind, destination.format)
            self.check_output(destination.file)

    def shows_table(self, formats: Sequence[str] | None, output: Path | None) -> bool:
        """Whether somebody reads a table on stdout."""
        return Destination("table") in self.destinations(formats, output)

    def emit(
        self,
        report: Report,
        formats: Sequence[str] | None,
        output: Path | None,
        *,
        render: Callable[[str, reporter.Terminal], str] | None = None,
        width: int = 100,
    ) -> None:
        """Write a report to stdout, to files, or both; what fails does not keep the others from being written.

        Args:
            report: What there is to tell.
            formats: As for ``destinations``.
            output: As for ``destinations``.
            render: Makes the text of a format; that format's reporter unless given.
            width: Columns where there is no terminal.

        Raises:
            UsageError: As ``check_formats``.
            OutputError: A file cannot be written.
        """
        from backdoorscan.plugin import reporter

        def by_reporter(format: str, terminal: reporter.Terminal) -> str:
            return _reporter(format)().render(report, terminal)

        render = render or by_reporter
        failed: list[BackdoorscanError] = []
        everything = self.destinations(formats, output)
        for file, format in [(each.file, each.format) for each in everything if each.file is not None]:
            try:
                write_whole(file, render(format, reporter.Terminal(width=width)).encode())
                self.say(f"wrote {file}")
            except BackdoorscanError as error:
                failed.append(error)
        # Last, as whoever reads it may go away.
        for format in [each.format for each in everything if each.file is None]:
            if sys.stdout.isatty():
                width = shutil.get_terminal_size().columns
            text = render(format, reporter.Terminal(width=width, color=self._colored()))
            try:
                sys.stdout.write(text)
                sys.stdout.flush()
            except BrokenPipeError:  # whoever read it went away
                raise
            except OSError as error:
                failed.append(OutputError("Cannot write the report to stdout.", why=str(error)))
        if len(failed) == 1:
            raise failed[0]
        if failed:
            raise OutputError(f"{len(failed)} reports were not written.", why=" ".join(each.what for each in failed))

    def show(self, *parts: RenderableType) -> None:
        """Print what is no report to stdout; lines are folded only where they would not fit on a terminal."""
        from backdoorscan.plugin import reporter
        from backdoorscan.reports.printing import printed

        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _NEVER_FOLDED
        sys.stdout.write(printed(parts, reporter.Terminal(width=width, color=self._colored())))

    def _colored(self) -> bool:
        return self.color is Color.ALWAYS or (self.color is Color.AUTO and self._stdout_has_color())

    @staticmethod
    def _stdout_has_color() -> bool:
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            return False
        return sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))

    @contextmanager
    def watching(self) -> Iterator[Callable[[str, float], None]]:
        """An observer that draws progress bars on stderr while the context lasts; elsewhere it does nothing.

        Whatever the user's architecture or a plugin prints meanwhile goes to stderr: stdout is for the report alone.

        Raises:
            PluginError: One of them wants to end the program.
        """
        try:
            with redirect_stdout(sys.stderr), self._progress() as observer:
                yield observer
        except SystemExit as stop:
            raise PluginError(
                "The architecture or a plugin ended the program.",
                why=f"It called sys.exit({stop.code!r}): an exit code of its own would look like a verdict.",
                hint="-v shows where it happened.",
            ) from stop

    def foretelling(self, what: str) -> Callable[[object], None] | None:
        """Says above the progress bars how long something takes; ``None`` where there are none, for nobody waits."""
        return (lambda forecast: self.say(f"{what} takes {forecast}")) if self._shows_progress() else None

    def _shows_progress(self) -> bool:
        return self.progress and not self.quiet and sys.stderr.isatty()

    @contextmanager
    def _progress(self) -> Iterator[Callable[[str, float], None]]:
        if not self._shows_progress():
            yield lambda _stage, _fraction: None
            return
        from rich.console import Console
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
        console = Console(stderr=True, no_color={Color.ALWAYS: False, Color.NEVER: True}.get(self.color))
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


def _destination(text: str) -> Destination:
    format, given, file = text.partition("=")
    if given and not file:
        raise UsageError(f"-f {text} names no file.", hint=f"For example -f {format}=report.{format}.")
    return Destination(format, Path(file) if given and file != "-" else None)


def _reporter(format: str) -> type[reporter.Reporter]:
    """The class of a format.

    Raises:
        UnknownNameError: There is none.
        OutputError: It is none.
    """
    from backdoorscan.plugin import reporter
    from backdoorscan.registry import installed

    component = installed().find("reporter", format).component
    if not (isinstance(component, type) and issubclass(component, reporter.Reporter)):
        raise OutputError(f"The format {format} cannot be used.")
    return component


def _refused(component: type[reporter.Reporter]) -> tuple[type[Report], ...]:
    """The kinds of report that a format has no place for."""
    return tuple(component.refuses)
