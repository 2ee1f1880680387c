"""The command line. ``main`` is the only place where an exception becomes an exit code."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import backdoorscan
from backdoorscan.cli import bench, convert, demo, evaluate, inspect, plugins, predict, repair, report, scan
from backdoorscan.cli._console import Color, Terminal
from backdoorscan.cli._help import Command, Group, usage_hint
from backdoorscan.errors import BackdoorscanError, ExitCode

_COMPLETING = "_BACKDOORSCAN_COMPLETE"
"""What a shell sets that asks for completions."""

app = typer.Typer(
    name="backdoorscan",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"backdoorscan {backdoorscan.__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("-V", "--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but the report and errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show where errors happened.")] = False,
    color: Annotated[Color, typer.Option(envvar="BACKDOORSCAN_COLOR", help="Whether to use colour.")] = Color.AUTO,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Show no progress bars.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(envvar="BACKDOORSCAN_CONFIG", help="Settings; else the nearest pyproject.toml's."),
    ] = None,
) -> None:
    """Find and repair backdoors in neural networks that somebody else trained.

    Exit codes: 0 clean, or repaired; 1 backdoor found, or a repair left it in; 2 no trustworthy answer (usage,
    unreadable or unsafe file, failed method); 3 inconclusive; 130 interrupted.
    """
    if verbose:
        logging.basicConfig(stream=sys.stderr, format="%(message)s")
        logging.getLogger("backdoorscan").setLevel(logging.DEBUG)
    context.obj = Terminal(quiet=quiet, color=color, progress=not no_progress, config=config)


app.command("scan", cls=Command, rich_help_panel="Models")(scan.scan)
app.command("repair", cls=Command, rich_help_panel="Models")(repair.repair)
app.command("evaluate", cls=Command, rich_help_panel="Models")(evaluate.evaluate)
app.command("predict", cls=Command, rich_help_panel="Models")(predict.predict)
app.command("report", cls=Command, rich_help_panel="Models")(report.report)
app.command("inspect", cls=Command, rich_help_panel="Models")(inspect.inspect)
app.command("convert", cls=Command, rich_help_panel="Models")(convert.convert)
app.command("demo", cls=Command, rich_help_panel="More")(demo.demo)
app.command("bench", cls=Command, rich_help_panel="More")(bench.bench)
app.add_typer(plugins.app, name="plugins", cls=Group, rich_help_panel="More")


def main() -> NoReturn:
    """Run the program and exit."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try again, and exit with 120
        if code != ExitCode.ERROR:
            _complain("Cannot write to stdout.", str(error))
        code = ExitCode.ERROR
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the program.

    Args:
        arguments: As on the command line, without the program's name.

    Returns:
        The exit code.
    """
    verbose = any(argument in ("-v", "--verbose") for argument in arguments)
    try:
        code = app(args=list(arguments), prog_name="backdoorscan", standalone_mode=False) or ExitCode.OK
    except SystemExit as stop:
        # The reader of our output went away, or a plugin wanted to choose the exit code: there is no verdict to tell.
        completes = any(argument.endswith("-completion") for argument in arguments) or _COMPLETING in os.environ
        return ExitCode.OK if completes and not stop.code else ExitCode.ERROR
    except typer.TyperException as error:
        if arguments:
            _complain(" ".join(error.format_message().split()), "", usage_hint(error))
        else:
            print(error.format_message(), file=sys.stderr)
        return ExitCode.ERROR
    except BackdoorscanError as error:
        if verbose:
            traceback.print_exc()
        _complain(error.what, error.why, error.hint)
        return error.exit_code
    except MemoryError:
        _complain("There is not enough memory.", "", "Use fewer images (--limit) or a smaller batch.")
        return ExitCode.ERROR
    except Exception as error:
        # Whatever it is, it must not look like a verdict: Python itself would exit with 1.
        if verbose:
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            _complain("There is no space left to write to.", str(error))
            return ExitCode.ERROR
        hint = "This is a bug: please report it." + ("" if verbose else " -v shows where it happened.")
        _complain(f"Internal error: {type(error).__name__}: {error}", "", hint)
        return ExitCode.ERROR
    if code == ExitCode.INTERRUPTED:
        _complain("Interrupted.")
    return int(code)


def _complain(what: str, why: str = "", hint: str = "") -> None:
    """One message on stderr: what, why, what to do."""
    print(f"backdoorscan: {what}", file=sys.stderr)
    for line in (why, hint):
        if line:
            print(f"  {line}", file=sys.stderr)
