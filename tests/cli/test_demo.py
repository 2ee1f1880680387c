"""``backdoorscan demo``: the whole story in one command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backdoorscan.demo import DemoFiles
from backdoorscan.errors import ExitCode

Cli = Callable[..., Any]


def test_demo_catches_and_repairs_the_bad_network(demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    result = cli("demo", "story")
    assert result.code == ExitCode.OK, result.err
    tables = ["story/clean_model.h5  CLEAN", "story/model.h5  BACKDOORED", "story/model.h5  repaired by prune"]
    assert [line for line in result.out.splitlines() if line in tables] == tables
    for command in ("scan story/clean_model.h5", "scan story/model.h5", "repair story/model.h5"):
        assert f"$ backdoorscan {command} --valid story/clean.h5" in result.err
    assert [path.name for path in elsewhere.iterdir()] == ["story"]
    files = {path.name for path in (elsewhere / "story").iterdir()}
    assert files == {path.name for path in demo.folder.iterdir()} | {"model-repaired"}
    for path in demo.folder.iterdir():  # the same seed trains the same networks
        assert (elsewhere / "story" / path.name).read_bytes() == path.read_bytes(), path.name
    written = {path.name for path in (elsewhere / "story" / "model-repaired").iterdir()}
    drops = ("2", "4", "10")
    assert written == {f"model_X={drop}{suffix}" for drop in drops for suffix in (".h5", ".goodnet.onnx")}


def test_demo_can_be_interrupted(demo: DemoFiles, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("backdoorscan.demo.make_demo", lambda *_, **__: demo)
    monkeypatch.setattr("backdoorscan.scanning.scan", stop)
    result = cli("demo", "story")
    assert (result.code, result.out) == (ExitCode.INTERRUPTED, "")


def test_demo_does_not_write_among_other_files(cli: Cli, elsewhere: Path) -> None:
    (elsewhere / "thesis").mkdir()
    (elsewhere / "thesis" / "thesis.tex").write_text("mine")
    result = cli("demo", "thesis")
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "--force" in result.err
    assert [path.name for path in (elsewhere / "thesis").iterdir()] == ["thesis.tex"]
