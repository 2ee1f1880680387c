"""Help pages: options under headings, examples at the end. Plain text, so that nothing is imported to draw it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

EXAMPLE = "Example: "
"""What a line of a command's docstring begins with that is shown as it stands, under the options."""

VALUES = {"int": "N", "int range": "N", "float": "X", "float range": "X", "path": "FILE", "str": "TEXT"}
"""What stands for a value that has no name of its own."""


class Command(TyperCommand):
    """A command whose options are grouped by their ``rich_help_panel``."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the docstring without its examples."""
        _write_text(self.help, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, a heading for each group."""
        _write_options(self.get_params(ctx), ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples."""
        _write_examples(self.help, formatter)


class Group(TyperGroup):
    """Commands that are grouped by their ``rich_help_panel``."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the docstring without its examples."""
        _write_text(self.help, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, then the options, a heading for each group."""
        rows = [
            (getattr(command, "rich_help_panel", None), (name, command.get_short_help_str(limit=200)))
            for name, command in self.commands.items()
        ]
        _write_groups(rows, "Commands", formatter)
        _write_options(self.get_params(ctx), ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples."""
        _write_examples(self.help, formatter)


def usage_hint(error: typer.TyperException) -> str:
    """What to do about a command line that could not be understood."""
    context = getattr(error, "ctx", None)
    if context is None:
        return "backdoorscan --help lists the commands."
    option, root = getattr(error, "option_name", ""), context.find_root()
    if context is not root and any(option in own.opts for own in root.command.get_params(root)):
        return f"It goes before the command: {root.command_path} {option} {context.info_name} ..."
    return f"{context.command_path} --help lists what there is."


def _write_text(text: str | None, formatter: Any) -> None:
    formatter.write_paragraph()
    with formatter.indentation():
        formatter.write_text("\n".join(line for line in (text or "").splitlines() if not line.startswith(EXAMPLE)))


def _write_examples(text: str | None, formatter: Any) -> None:
    examples = [line.removeprefix(EXAMPLE) for line in (text or "").splitlines() if line.startswith(EXAMPLE)]
    if examples:
        with formatter.section("Examples"):
            for example in examples:
                formatter.write(f"  {example}\n")


def _write_options(params: Iterable[Any], context: typer.Context, formatter: Any) -> None:
    rows = []
    for param in params:
        if record := param.get_help_record(context):
            usual = "Arguments" if param.param_type_name == "argument" else "Options"
            name, text = record
            if param.param_type_name == "argument":
                name = name.partition(" <")[0]
            name = re.sub(r"<([\w ]+)>", lambda match: VALUES.get(match[1], match[0]), name)
            rows.append((getattr(param, "rich_help_panel", None) or usual, (name, text)))
    _write_groups(rows, "Options", formatter)


def _write_groups(rows: Iterable[tuple[str | None, tuple[str, str]]], usual: str, formatter: Any) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for heading, row in rows:
        groups.setdefault(heading or usual, []).append(row)
    for heading, entries in groups.items():
        with formatter.section(heading):
            formatter.write_dl(entries)
