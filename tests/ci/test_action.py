"""The GitHub Action: what its scripts make of inputs, of names that are commands, and of a program that breaks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backdoorscan.errors import ExitCode

ROOT = Path(__file__).parents[2]
REPORTS = 'import sys\nfor word in sys.argv:\n    if "=/" in word: open(word.split("=")[-1], "w").write("{report}")\n'


@pytest.fixture
def runner(pipeline: Any, tmp_path: Path) -> Any:
    """A runner whose repository is empty."""
    for name in ("empty", "runner"):
        (tmp_path / name).mkdir()
    return pipeline.Runner(tmp_path / "empty", tmp_path / "runner")


@pytest.fixture
def broken(pipeline: Any, runner: Any, tmp_path: Path) -> Callable[[str], Any]:
    """``broken("raise ...")``: a runner where ``backdoorscan`` is this program."""

    def make(source: str) -> Any:
        (tmp_path / "bin").mkdir()
        python = tmp_path / "bin" / "python"
        python.symlink_to(sys.executable)
        if source:
            program = tmp_path / "bin" / "backdoorscan"
            program.write_text(f"#!{sys.executable}\n{source}")
            program.chmod(0o755)
        return pipeline.Runner(runner.repository, runner.temporary, python)

    return make


def reporting(complete: bool, then: str) -> str:
    """A program that writes every report that it was asked for."""
    return REPORTS.replace("{report}", json.dumps({"complete": complete}).replace('"', '\\"')) + then


def test_inputs_are_words_and_nothing_in_them_is_obeyed(broken: Any, runner: Any) -> None:
    program = broken("import json, sys\njson.dump(sys.argv[1:], open('words', 'w'))\n")
    models = ["models", "--fail-on=never", "$(touch here) `touch here` ; touch here", "a \"b\" 'c'", "ü&|*.h5"]
    program.scan(
        models="\n".join(["", *models, "  "]),
        valid="clean images.npz",
        fail_on="high; touch here",
        baseline="--no-cache",
        arguments="--limit=1000\n--detector=neural-cleanse --no-cache",
    )
    words = json.loads((runner.repository / "words").read_text())
    end = words.index("--")
    assert words[end + 1 :] == models
    assert {"--valid=clean images.npz", "--fail-on=high; touch here", "--baseline=--no-cache"} <= set(words[:end])
    assert {"--limit=1000", "--detector=neural-cleanse --no-cache"} <= set(words[:end])
    assert not any(word.startswith("--manifest") for word in words)
    assert [path.name for path in runner.repository.iterdir()] == ["words"]


def test_the_runner_obeys_nothing_that_the_program_prints(broken: Any) -> None:
    job = broken("print('::add-mask::a'); import sys; print('::error::x', file=sys.stderr)\n").scan()
    lines = [line for line in job.log.splitlines() if line]
    token = lines[0].removeprefix("::stop-commands::")
    assert len(token) >= 32
    assert lines[1 : lines.index(f"::{token}::")] == ["::add-mask::a", "::error::x"]


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (reporting(True, "sys.exit(0)"), ExitCode.OK),
        (reporting(True, "sys.exit(1)"), ExitCode.FOUND),
        (reporting(True, "sys.exit(3)"), ExitCode.INCONCLUSIVE),
        (reporting(False, "sys.exit(2)"), ExitCode.ERROR),
        (reporting(True, "sys.exit(99)"), ExitCode.ERROR),
        ("import no_such_module", ExitCode.ERROR),
        ("import sys; sys.exit(0)", ExitCode.ERROR),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ExitCode.ERROR),
        ("import sys; sys.exit(130)", ExitCode.INTERRUPTED),
        ("", ExitCode.ERROR),
    ],
)
def test_no_exit_code_passes_for_an_answer_without_its_reports(source: str, code: int, broken: Any) -> None:
    job = broken(source).scan(models="models")
    assert (job.code, job.outputs["exit-code"]) == (code, str(int(code)))
    assert bool(job.outputs["sarif"]) == ("complete" in source)
    assert job.summary
    assert ("::error" in job.log) == (code != ExitCode.OK)


WAITING = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
print("waiting", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_cancelled_ends_the_program_and_tells(number: int, broken: Any) -> None:
    runner = broken(WAITING)
    with subprocess.Popen(
        runner.command, cwd=runner.repository, env=runner.environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "waiting\n" in iter(process.stdout.readline, "")
        process.send_signal(number)
        log, _ = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "The scan was interrupted" in log
    assert "exit-code=130" in (runner.temporary / "output").read_text()


def test_what_a_program_printed_last_cannot_end_its_place_in_the_summary(broken: Any) -> None:
    job = broken("print('x' * 100); print('```\\n# Passed'); raise SystemExit(2)\n").scan()
    assert "No trustworthy answer" in job.summary
    assert re.search(r"\n(````+)text\n.*```\n# Passed\n\1\n$", job.summary, re.DOTALL)


def test_a_tool_error_of_the_real_program(runner: Any) -> None:
    job = runner.scan(models="none.h5", valid="none.npz")
    assert (job.code, job.outputs["sarif"]) == (ExitCode.ERROR, "")
    assert "none.npz" in job.summary


FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "$RUNNER_TEMP/calls"
if [ "$2 $3" = "-m venv" ]; then mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; fi
"""


@pytest.fixture
def install(runner: Any, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """``install(models="a")``: the step that installs, with a Python that only notes how it is called."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def start(**inputs: str) -> dict[str, str]:
        inputs = {"models": "", "manifest": "", "packages": "", **inputs}
        (runner.temporary / "output").write_text("")
        subprocess.run(
            ["bash", ROOT / "action" / "install.sh"],
            env=runner.environment
            | {f"INPUT_{name.upper()}": value for name, value in inputs.items()}
            | {"INPUT_PYTHON": str(python), "RUNNER_OS": "Linux", "GITHUB_RUN_ID": "1", "GITHUB_RUN_ATTEMPT": "1"},
            cwd=runner.repository,
            check=True,
        )
        return dict(line.split("=", 1) for line in (runner.temporary / "output").read_text().splitlines())

    return start


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_installing(install: Any, runner: Any) -> None:
    outputs = install(packages="timm>=1.0\n$(touch here)")
    assert os.access(outputs["python"], os.X_OK)
    assert Path(outputs["cache"]).is_dir()
    calls = (runner.temporary / "calls").read_text().splitlines()
    # A module pip.py or venv.py of the repository is not what is run.
    assert all(call.startswith("-I -m ") for call in calls)
    assert f"--constraint {ROOT / 'constraints.txt'}" in calls[-1]
    assert calls[-1].endswith(f" {ROOT}")
    listed = Path(re.findall(r"--requirement (\S+)", calls[-1])[-1])
    assert listed.read_text() == "timm>=1.0\n$(touch here)\n"
    assert list(runner.repository.iterdir()) == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_cache_is_found_by_the_next_run_of_the_same_models(install: Any) -> None:
    first, second, other = install(models="a"), install(models="a"), install(models="b")
    assert first["keys"] == second["keys"] != other["keys"]
    assert first["key"].startswith(first["keys"])
    assert first["key"] != first["keys"]


class Asked(dict[str, str]):
    """An environment that notes what it is asked for."""

    def get(self, name: str, default: Any = None) -> Any:
        return self.setdefault(name, default)


def test_the_action_is_what_its_scripts_expect(yaml: Any, module_of: Callable[[Path], Any]) -> None:
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    action = yaml.safe_load(text)
    steps = action["runs"]["steps"]
    # Where an expression stands in a script, what an input holds becomes part of the script.
    assert [step["run"] for step in steps if "${{" in step.get("run", "")] == []
    assert [step["uses"] for step in steps if not re.search(r"@[0-9a-f]{40}$", step.get("uses", "@" + 40 * "0"))] == []
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(action["inputs"])
    named = {step["id"]: step for step in steps if "id" in step}
    given = {name: {key for key in named[name]["env"] if key.startswith("INPUT_")} for name in ("install", "scan")}
    assert given["install"] == set(re.findall(r"\$(INPUT_\w+)", (ROOT / "action" / "install.sh").read_text()))
    module_of(ROOT / "action" / "scan.py").command("backdoorscan", asked := Asked(), Path())
    assert given["scan"] == set(asked)
    assert named["python"]["with"]["update-environment"] is False
    assert "upload-sarif" in steps[-1]["uses"]
    assert steps[-1]["if"].startswith("always() && ")


def test_the_action_has_the_outputs_of_its_script(yaml: Any, broken: Any) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    job = broken("").scan()
    assert {name: f"${{{{ steps.scan.outputs.{name} }}}}" for name in job.outputs} == {
        name: output["value"] for name, output in action["outputs"].items()
    }


def test_the_line_of_the_step_that_scans(yaml: Any, broken: Any) -> None:
    runner = broken(reporting(True, "sys.exit(1)"))
    steps = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"]
    (line,) = [step["run"] for step in steps if step.get("id") == "scan"]
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", line],
        cwd=runner.repository,
        env=runner.environment | {"BACKDOORSCAN_PYTHON": str(runner.python), "INPUT_MODELS": "m.h5"},
    )
    assert done.returncode == ExitCode.FOUND
