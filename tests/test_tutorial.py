"""docs/plugins.md, followed literally in an empty folder, and against the code it speaks of."""

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from backdoorscan.plugin import hookspecs, testing

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tests" / "third_party" / "backdoorscan_example"
MANUAL = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
BEFORE, TUTORIAL = re.split(r"^(?=## A package)", MANUAL, flags=re.MULTILINE)


def blocks(text, language):
    """The blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def files():
    """The files that the tutorial shows, each under its name."""
    return dict(re.findall(r"^`(\S+)`\n\n```(?:toml|python)\n(.*?)^```$", TUTORIAL, re.DOTALL | re.MULTILINE))


def commands(text):
    return [line for block in blocks(text, "sh") for line in block.splitlines()]


def test_the_tutorial_shows_the_files_of_the_package():
    here = {
        str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".toml")
    }
    assert files() == here
    assert len(files()) == len(blocks(TUTORIAL, "toml") + blocks(TUTORIAL, "python"))


def test_every_hook_and_every_tool_for_tests_is_described():
    hooks = {
        name: list(inspect.signature(hook).parameters)
        for name, hook in vars(hookspecs).items()
        if name.startswith("backdoorscan_")
    }
    described = dict(re.findall(r"^\| `(backdoorscan_\w+)\((.*?)\)` \|", MANUAL, re.MULTILINE))
    assert {name: re.findall(r"\w+", arguments) for name, arguments in described.items()} == hooks
    table = MANUAL.partition("## Test kit")[2].partition("\n## ")[0]
    assert [name for name in testing.__all__ if f"`{name}" not in table] == []
    for name, arguments in re.findall(r"^\| `(\w+)\((.*?)\)` \|", table, re.MULTILINE):
        known = list(inspect.signature(getattr(testing, name)).parameters)
        assert len(arguments.split(", ")) <= len(known) or not arguments


def build(folder, site):
    """In place of ``pip install -e .``, which asks the network for hatchling: the same backend, called directly."""
    code = "import sys, hatchling.build as backend; print(backend.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, site], cwd=folder, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(site / done.stdout.split()[-1]) as wheel:
        wheel.extractall(site)


@pytest.mark.slow
def test_followed_literally(tmp_path, demo):
    pytest.importorskip("hatchling")
    folder, site, other = (tmp_path / name for name in ("empty", "site", "other"))
    for each in (folder, site, other):
        each.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith("BACKDOORSCAN_")}
    steady = {
        "TERM": "dumb",
        "COLUMNS": "160",
        "OMP_NUM_THREADS": "1",
        "BACKDOORSCAN_CACHE_DIR": str(tmp_path / "cache"),
    }
    environment = {**kept, **steady, "PYTHONPATH": str(site)}

    def typed(command, where):
        """Run what a user types, with this interpreter's programs: exit code and stdout."""
        arguments = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(arguments, cwd=where, env=environment, capture_output=True, text=True, timeout=300)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout

    for command in commands(BEFORE):
        assert typed(command, other)[0] == 0
    assert [path.name for path in other.iterdir()] == ["backdoorscan-white-square"]

    for name, content in files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    said = {}
    for command in commands(TUTORIAL):
        if command == "pip install -e .":
            build(folder, site)
        elif command == "backdoorscan demo":
            shutil.copytree(demo.folder, folder / "demo")  # its files alone, not the scans that it shows
        else:
            said[command] = typed(command, folder)
    assert [command.split()[:2] for command in said] == [
        ["pytest"],
        ["backdoorscan", "plugins"],
        ["backdoorscan", "plugins"],
        ["backdoorscan", "scan"],
        ["backdoorscan", "repair"],
    ]
    (tested, listed, shown, scanned, repaired) = said.values()
    assert tested[0] == listed[0] == shown[0] == 0
    for name, kind in (("white-square", "detector"), ("mute-channels", "repairer"), ("lines", "reporter")):
        assert re.search(rf"^ {name} +{kind} +backdoorscan-example +1\.0 ", listed[1], re.MULTILINE)
    assert shown[1].startswith("white-square: detector of backdoorscan-example 1.0\n")
    assert "size  Height and width of the square in pixels." in shown[1]
    (expected,) = blocks(TUTORIAL, "text")
    assert scanned == (1, expected)
    assert repaired[0] in (0, 1)
    assert "repaired by mute-channels" in repaired[1]
    assert (folder / "model-repaired" / "model_muted.h5").is_file()
