"""``backdoorscan plugins``."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from backdoorscan import __version__
from backdoorscan.cli._console import Terminal
from backdoorscan.cli._scaffold import Kind, write_package

if TYPE_CHECKING:
    from backdoorscan.registry import Plugin

app = typer.Typer(
    help="List the installed methods and formats, show one, or begin one of your own.", invoke_without_command=True
)


@app.callback()
def plugins(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the installed methods and formats, with the error of each broken plugin."""
    if context.invoked_subcommand:
        return
    from backdoorscan.registry import installed

    terminal: Terminal = context.obj
    found = installed().plugins
    for line in _made_for_others({plugin.distribution for plugin in found}):
        terminal.say(line)
    if as_json:
        names = ("id", "kind", "distribution", "version", "summary", "error")
        print(json.dumps([{name: getattr(plugin, name) for name in names} for plugin in found], indent=2))
        return
    if not found:
        print("No plugins are registered. Install the project: pip install -e .", file=sys.stderr)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("id", "kind", "distribution", "version", "summary"):
        table.add_column(column, overflow="fold")
    for plugin in found:
        summary = Text(f"broken: {plugin.error}", style="red") if plugin.error else Text(plugin.summary)
        table.add_row(plugin.id, plugin.kind, plugin.distribution, plugin.version, summary)
    terminal.show(table)


def _made_for_others(distributions: Iterable[str]) -> Iterator[str]:
    """A line on every distribution that asks for another version of backdoorscan than this one."""
    from packaging.requirements import InvalidRequirement, Requirement

    for name in sorted(distributions):
        try:
            asked = [Requirement(text) for text in metadata.requires(name) or ()]
        except (metadata.PackageNotFoundError, InvalidRequirement):
            continue
        for requirement in asked:
            ours, versions = requirement.name == "backdoorscan" and not requirement.marker, requirement.specifier
            if ours and not versions.contains(__version__, prereleases=True):
                yield f"{name} is made for backdoorscan{versions}; this is {__version__}. Look for another {name}."


@app.command()
def show(
    context: typer.Context,
    identifier: Annotated[str, typer.Argument(metavar="ID", help="As `backdoorscan plugins` lists it.")],
) -> None:
    """Print what a method does, its paper and its options."""
    from backdoorscan.errors import PluginError, UnknownNameError
    from backdoorscan.registry import installed

    matches = [plugin for plugin in installed().plugins if plugin.id == identifier]
    if not matches:
        raise UnknownNameError("plugin", identifier, {plugin.id for plugin in installed().plugins})
    terminal: Terminal = context.find_root().obj
    for plugin in matches:
        if plugin.component is None:
            raise PluginError(f"The plugin '{identifier}' of {plugin.distribution} is broken.", why=plugin.error)
        terminal.show(*_described(plugin))


def _described(plugin: Plugin) -> Iterator[Text]:
    from backdoorscan.plugin.method import Method

    yield Text.assemble((plugin.id, "bold"), f": {plugin.kind} of {plugin.distribution} {plugin.version}\n")
    yield Text(inspect.getdoc(plugin.component) or plugin.summary)
    if not (isinstance(plugin.component, type) and issubclass(plugin.component, Method)):
        return
    if plugin.component.paper:
        yield Text.assemble(("\nPaper:", "bold"), f" {plugin.component.paper}")
    specs = plugin.component.options()
    if specs:
        where = f" (-O {plugin.id}.NAME=VALUE, or a table [tool.backdoorscan.{plugin.id}]):"
        yield Text.assemble(("\nOptions", "bold"), where)
    width = max((len(spec.name) for spec in specs), default=0)
    for spec in specs:
        default = f" [{spec.type_name}, default {spec.default!r}]"
        yield Text.assemble("  ", (f"{spec.name:{width}}", "bold"), f"  {spec.help}", (default, "dim"))


@app.command()
def new(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What users will type, such as white-square.")],
    kind: Annotated[Kind, typer.Option(help="What to write.")] = Kind.DETECTOR,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Where to. [default: backdoorscan-NAME]")
    ] = None,
) -> None:
    """Begin a plugin: write a package with one that works, and its test.

    Example: backdoorscan plugins new white-square && cd backdoorscan-white-square && pip install -e . && pytest
    """
    terminal: Terminal = context.find_root().obj
    files = write_package(name, kind, output)
    for file in files:
        print(file)
    terminal.say(f"next: cd {files[0].parent} && pip install -e . && pytest")
