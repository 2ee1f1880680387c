"""The documents say what the code does."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

from backdoorscan.cli import app, run
from backdoorscan.errors import ExitCode
from backdoorscan.formats.images import load_images
from backdoorscan.registry import installed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METHODS = [plugin for kind in ("detector", "repairer") for plugin in installed().of_kind(kind)]


def test_the_readme_lists_every_method_as_the_registry_does():
    rows = [f"| {p.id} | {p.kind} | {p.summary} |" for p in sorted(METHODS, key=lambda p: (p.kind, p.id))]
    listed = [
        line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| [\w-]+ \| (det|rep)", line)
    ]
    assert listed == rows


def test_the_readme_lists_every_exit_code():
    codes = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [int(code) for code in codes] == [int(code) for code in ExitCode]


@pytest.mark.parametrize("plugin", METHODS, ids=lambda p: f"{p.kind}-{p.id}")
def test_every_method_and_each_of_its_options_is_described(plugin):
    text = (ROOT / "docs" / "methods.md").read_text()
    start = re.search(rf"^## {re.escape(plugin.id)}$", text, re.MULTILINE)
    assert start, f"docs/methods.md has no section on {plugin.id}"
    section = text[start.end() :].split("\n## ")[0]
    missing = [spec.name for spec in plugin.component.options() if f"`{spec.name}`" not in section]
    assert missing == []


def commands(path):
    """What a page tells readers to type, as the arguments of the program."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    lines = [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("backdoorscan ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_can_be_typed(page):
    for words in commands(page):
        program = get_command(app)
        with program.make_context("backdoorscan", list(words)) as context:
            rest = [*context._protected_args, *context.args]
            while rest:
                program = program.commands[rest[0]]
                with program.make_context(rest[0], rest[1:], parent=context) as below:
                    rest = [*getattr(below, "_protected_args", []), *below.args]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_methods_and_formats_in_commands_exist(page):
    kinds = {"-d": "detector", "--detector": "detector", "--attack": "attack", "-m": "repairer", "--method": "repairer"}
    known = {kind: {plugin.id for plugin in installed().of_kind(kind)} for kind in (*kinds.values(), "reporter")}
    of_the_tutorial = {"white-square", "mute-channels", "lines"}
    for words in commands(page):
        for flag, value in pairwise(words):
            if flag in kinds:
                assert value in known[kinds[flag]] | {"auto"} | of_the_tutorial, words
            if flag in ("-f", "--format"):
                assert value.partition("=")[0] in known["reporter"] | of_the_tutorial, words


@pytest.mark.slow
def test_the_commands_of_the_readme_do_what_it_says(tmp_path, demo, monkeypatch, capsys):
    monkeypatch.setenv("BACKDOORSCAN_CACHE_DIR", str(tmp_path / "cache"))
    folder = shutil.copytree(demo.folder, tmp_path / "demo")
    (folder / "models").mkdir()
    for model in (demo.model, demo.clean_model):
        shutil.copy(model, folder / "models")
    images = load_images(demo.poisoned)
    Image.fromarray(images.pixels[0, 0]).save(folder / "picture.png")
    monkeypatch.chdir(folder)
    ended = {}
    for words in commands(ROOT / "README.md"):
        ended[" ".join(words)] = run(words), capsys.readouterr()
    codes = {line: code for line, (code, _) in ended.items()}
    assert codes == {line: FOUND_BY.get(line.split()[0], ExitCode.OK) for line in codes}, ended
    assert {"scan", "report", "repair", "evaluate", "predict"} <= {line.split()[0] for line in codes}
    assert all(
        path.exists() for path in map(Path, ("scan.sarif", "scan.html", "scan.json", "pruned", "model-repaired"))
    )


FOUND_BY = {"scan": ExitCode.FOUND, "report": ExitCode.FOUND}
"""The demo's network is backdoored; repairs of it succeed."""


def slug(heading):
    """The anchor that both GitHub and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in {slug(line) for line in re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)}, target


def test_every_page_of_the_manual_is_in_its_contents():
    named = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")}
    start = (ROOT / "docs" / "index.md").read_text()
    assert [name for name in sorted(named - {"index.md"}) if f"({name}" not in start] == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed (extra docs)")
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "screenshot.svg").exists()


def test_the_screenshot_is_a_scan_of_the_demo_and_small():
    drawn = (ROOT / "docs" / "screenshot.svg").read_text()
    text = re.sub(r"<[^>]+>", "", drawn).replace("&#160;", " ")
    assert len(drawn) < 100_000
    assert "$ backdoorscan scan model.h5 --valid clean.h5" in text
    assert "BACKDOORED" in text
    assert "next: backdoorscan repair" in text
    assert not re.search(r"/(home|tmp|root|work)/|@font-face|href=", drawn)
