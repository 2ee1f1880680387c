"""What ``backdoorscan plugins new`` writes: a package with one plugin that works and its test."""

from __future__ import annotations

import importlib.util
import re
from enum import StrEnum
from pathlib import Path
from string import Template

import backdoorscan
from backdoorscan.errors import OutputError, UsageError
from backdoorscan.files import whole_folder

_TEMPLATES = Path(__file__).with_name("templates")
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LONGEST = 32
"""Characters of a name: longer ones would break the lines of the templates."""


class Kind(StrEnum):
    """What kind of plugin to write."""

    DETECTOR = "detector"
    REPAIRER = "repairer"
    REPORTER = "reporter"


_EXAMPLES = {
    Kind.DETECTOR: "backdoorscan scan model.h5 --valid clean.h5 -d $name",
    Kind.REPAIRER: "backdoorscan repair model.h5 --valid clean.h5 --method $name",
    Kind.REPORTER: "backdoorscan scan model.h5 --valid clean.h5 -f $name",
}


def write_package(name: str, kind: Kind, folder: Path | None = None) -> list[Path]:
    """Write a package with one plugin.

    Args:
        name: What users will type, in kebab-case.
        kind: Which template.
        folder: Where to; ``backdoorscan-NAME`` if ``None``.

    Returns:
        The files, in the order in which to read them.

    Raises:
        UsageError: The name cannot be one, or is taken.
        OutputError: The folder exists, or the disk refused.
    """
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        raise UsageError(
            f"A plugin cannot be called {name!r}.",
            why=f"Users type it: lower-case words joined by hyphens, a letter first, at most {_LONGEST} characters.",
            hint="For example: backdoorscan plugins new white-square",
        )
    distribution = f"backdoorscan-{name}"
    module = distribution.replace("-", "_")
    folder = folder or Path(distribution)
    _check_free(name, kind, module)
    if folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder} exists already.", hint="Choose another name, or another folder with -o.")
    words = {
        "name": name,
        "kind": kind.value,
        "distribution": distribution,
        "module": module,
        "class_name": "".join(part.capitalize() for part in (*name.split("-"), kind.value)),
        "versions": _versions(),
        "example": Template(_EXAMPLES[kind]).substitute(name=name),
    }
    templates = {
        "README.md": "README.md",
        "pyproject.toml": "pyproject.toml",
        f"{module}.py": f"{kind}.py",
        f"test_{module}.py": f"test_{kind}.py",
    }
    with whole_folder(folder) as place:
        for file, template in templates.items():
            text = (_TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")
            (place / file).write_text(Template(text).substitute(words), encoding="utf-8")
    return [folder / file for file in templates]


def _check_free(name: str, kind: Kind, module: str) -> None:
    """Complain about a name under which the plugin could not be installed beside those that are.

    Raises:
        UsageError: Somebody has it.
    """
    from backdoorscan.registry import installed

    owner = next((plugin for plugin in installed().of_kind(kind) if plugin.id == name), None)
    if owner:
        raise UsageError(f"There is a {kind} '{name}' already: of {owner.distribution}.", hint="Choose another name.")
    if importlib.util.find_spec(module):
        raise UsageError(f"There is a Python package {module} already.", hint="Choose another name.")


def _versions() -> str:
    """The versions of backdoorscan that keep the contract of this one: see docs/plugins.md."""
    major, minor = (int(part) for part in backdoorscan.__version__.split(".")[:2])
    return f">={major}.{minor},<{major + 1}" if major else f">=0.{minor},<0.{minor + 1}"
