"""The import law, and what else holds for the code as a whole."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import backdoorscan

ROOT = Path(__file__).parents[1]
CORE = ROOT / "backdoorscan"
PLUGINS = ROOT / "plugins" / "backdoorscan_plugins"

FLOORS = {
    "errors": 0,
    **dict.fromkeys(("artifact", "images", "classifier", "graph", "trigger", "findings", "goodnet"), 1),
    **dict.fromkeys(("report", "measured", "files"), 1),
    "ops": 2,
    "plugin": 3,
    **dict.fromkeys(("formats", "reports", "engine", "registry", "config", "policy", "costing", "cache"), 4),
    **dict.fromkeys(("baseline", "manifest"), 4),
    **dict.fromkeys(("api", "scanning", "surveying", "comparing", "repairing", "evaluating", "demo", "bench"), 5),
    **dict.fromkeys(("cli", "__main__"), 6),
}
PLUGIN_FLOOR = 3

FILES = sorted([*CORE.rglob("*.py"), *PLUGINS.rglob("*.py")])
FRONT_DOOR = CORE / "__init__.py"  # it names what lies above it, and loads that lazily


def floor(module: str) -> int:
    """The floor of ``backdoorscan.x.y``; of the package itself, and of names defined there, 0."""
    parts = module.split(".")
    if len(parts) == 1:
        return 0
    if (CORE / parts[1]).is_dir() or (CORE / f"{parts[1]}.py").is_file():
        return FLOORS[parts[1]]
    # A public name: it counts as what it stands for.
    return floor(backdoorscan._HOMES[parts[1]]) if parts[1] in backdoorscan._HOMES else 0


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "backdoorscan":
                yield from (f"backdoorscan.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def own_floor(file: Path) -> int:
    if PLUGINS in file.parents:
        return PLUGIN_FLOOR
    return floor("backdoorscan." + file.relative_to(CORE).with_suffix("").parts[0])


def too_high(source: str, own: int) -> list[str]:
    return [
        module
        for module in imports(ast.parse(source))
        if module.partition(".")[0] == "backdoorscan" and floor(module) > own
    ]


@pytest.mark.parametrize("file", [f for f in FILES if f != FRONT_DOOR], ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_stay_on_their_floor_or_below(file):
    assert not too_high(file.read_text(), own_floor(file))
    if PLUGINS not in file.parents:
        assert not [m for m in imports(ast.parse(file.read_text())) if m.startswith("backdoorscan_plugins")]


@pytest.mark.parametrize(
    ("source", "own", "wrong"),
    [
        ("from backdoorscan.registry import installed", 3, True),
        ("from backdoorscan import policy", 3, True),
        ("from backdoorscan import scan", 3, True),
        ("import backdoorscan.cli.scan", 5, True),
        ("def f():\n    from backdoorscan.scanning import scan", 4, True),
        ("from backdoorscan import hookimpl, graph", 3, False),
        ("from backdoorscan import __version__", 0, False),
        ("import torch", 0, False),
    ],
)
def test_the_law_is_enforced(source, own, wrong):
    assert bool(too_high(source, own)) is wrong


def test_every_module_has_a_floor():
    modules = {path.stem for path in CORE.iterdir() if path.is_dir() or path.suffix == ".py"} - {
        "__init__",
        "__pycache__",
    }
    assert modules <= FLOORS.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_longer_than_400_lines(file):
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    "code",
    [
        "from backdoorscan.cli import run; assert run(['--help']) == 0",
        "import backdoorscan, backdoorscan.plugin.hookspecs",
    ],
    ids=["help", "import"],
)
def test_torch_is_not_imported_for(code):
    code += "; import sys; print('\\n' + str('torch' in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_entry_points_are_the_modules_on_disk():
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["backdoorscan"]
    named = {value.removeprefix("backdoorscan_plugins.") for value in entries.values() if "_plugins." in value}
    on_disk = {path.stem for path in PLUGINS.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert named == on_disk - {"__init__"}
    assert {name for name, value in entries.items() if "_plugins." in value} == named
