"""``backdoorscan plugins``."""

from __future__ import annotations

import inspect
import json
import sys
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(help="List the installed methods and formats, or show one.", invoke_without_command=True)


@app.callback()
def plugins(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the installed methods and formats, with the error of each broken plugin."""
    if context.invoked_subcommand:
        return
    from backdoorscan.registry import installed

    found = installed().plugins
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
    Console(highlight=False).print(table)


@app.command()
def show(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="As `backdoorscan plugins` lists it.")],
) -> None:
    """Print what a method does, its paper and its options."""
    from backdoorscan.errors import PluginError, UnknownNameError
    from backdoorscan.plugin.method import Method
    from backdoorscan.registry import installed

    matches = [plugin for plugin in installed().plugins if plugin.id == identifier]
    if not matches:
        raise UnknownNameError("plugin", identifier, {plugin.id for plugin in installed().plugins})
    for plugin in matches:
        if plugin.component is None:
            raise PluginError(f"The plugin '{identifier}' of {plugin.distribution} is broken.", why=plugin.error)
        print(f"{plugin.id}: {plugin.kind} of {plugin.distribution} {plugin.version}\n")
        print(inspect.getdoc(plugin.component) or plugin.summary)
        if not issubclass(plugin.component, Method):
            continue
        if plugin.component.paper:
            print(f"\nPaper: {plugin.component.paper}")
        specs = plugin.component.options()
        if specs:
            print(f"\nOptions (-O {plugin.id}.NAME=VALUE, or a table [tool.backdoorscan.{plugin.id}]):")
        width = max((len(spec.name) for spec in specs), default=0)
        for spec in specs:
            print(f"  {spec.name:{width}}  {spec.help} [{spec.type_name}, default {spec.default!r}]")
