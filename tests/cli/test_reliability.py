"""What goes wrong around a scan: full disks, somebody else at work in the same place, many models."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from backdoorscan import files
from backdoorscan.cli import run
from backdoorscan.demo import DemoFiles
from backdoorscan.errors import ExitCode

Cli = Callable[..., Any]
QUICK = ["-d", "neural-cleanse", "-O", "neural-cleanse.steps=3"]
FULL = Path("/dev/full")
SCAN = ["scan", "model.h5", "--valid", "clean.h5", "--limit", "60", "-d", "oracle"]


def without_cost(report: Any) -> Any:
    """A report without what differs from run to run."""
    if isinstance(report, dict):
        return {key: without_cost(value) for key, value in report.items() if key not in ("cost", "seconds", "cached")}
    return [without_cost(value) for value in report] if isinstance(report, list) else report


@pytest.fixture
def place(elsewhere: Path, demo: DemoFiles, third_party: Callable[..., Any], oracle: Callable[..., str]) -> Path:
    """The current folder with a model and images, and a detector that is sure of a backdoor."""
    third_party(oracle(p_value=0.0005))
    shutil.copy(demo.model, elsewhere)
    shutil.copy(demo.clean, elsewhere)
    return elsewhere


needs_full_device = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.fixture
def no_space(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """``with no_space(): ...``: the disk has room for names, and for nothing in the files."""
    real = files._beside

    def beside(path: Path) -> Path:
        place = real(path)
        if path.suffix:  # others are folders
            place.symlink_to(FULL)
        return place

    @contextlib.contextmanager
    def full() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(files, "_beside", beside)
            yield

    return full


@needs_full_device
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["-f", "html", "-o", "report.html"], "report.html"),
        (["-f", "json", "--write-baseline", "baseline.toml"], "baseline.toml"),
        ([*QUICK, "-f", "json", "--save-figures", "figures"], "figures"),
    ],
)
def test_a_full_disk_is_an_error_and_leaves_no_part_of_a_file(
    flags: list[str], name: str, place: Path, cli: Cli, no_space: Any, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    assert cli(*SCAN, *flags).code == ExitCode.FOUND
    before = contents(place)
    assert any(file.startswith(name) for file in before)
    with no_space():
        result = cli(*SCAN, *flags)
    assert result.code == ExitCode.ERROR
    assert f"backdoorscan: Cannot write {'figures to ' if name == 'figures' else ''}{name}." in result.err
    assert "No space left on device" in result.err
    assert contents(place) == before


@needs_full_device
def test_a_full_disk_keeps_no_answer_but_gives_it(place: Path, cli: Cli, no_space: Any) -> None:
    with no_space():
        result = cli(*SCAN, "-f", "json")
    assert (result.code, result.json["verdict"]) == (ExitCode.FOUND, "backdoored")
    (warning,) = result.err.splitlines()
    assert warning.startswith("warning: nothing is kept in the cache: Cannot write ")
    assert [file for file in Path(os.environ["BACKDOORSCAN_CACHE_DIR"]).rglob("*") if not file.is_dir()] == []
    again = cli(*SCAN, "-f", "json")
    assert (again.json["cached"], without_cost(again.json)) == (False, without_cost(result.json))


@needs_full_device
def test_a_full_disk_leaves_no_part_of_a_repair(
    place: Path, cli: Cli, no_space: Any, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    before = contents(place)
    repair = ["repair", "model.h5", "--valid", "clean.h5", "--channels", 3, "--no-rescan", "-o", "out/deep"]
    with no_space():
        result = cli(*repair)
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "Cannot write" in result.err and "No space left on device" in result.err
    assert contents(place) == before
    assert not (place / "out").exists()


@needs_full_device
def test_a_report_that_cannot_go_to_stdout_is_an_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = FULL.open("w")
    with contextlib.redirect_stdout(full):
        code = run([*SCAN, "-f", "json"])
    with contextlib.suppress(OSError):  # it tries once more
        full.close()
    assert code == ExitCode.ERROR
    error = capsys.readouterr().err
    assert "backdoorscan: Cannot write the report to stdout.\n  [Errno 28] No space left on device\n" in error


@needs_full_device
def test_whatever_cannot_go_to_stdout_is_an_error() -> None:
    with FULL.open("w") as full:
        command = [sys.executable, "-m", "backdoorscan", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == ExitCode.ERROR
    first, why = done.stderr.splitlines()
    assert first in ("backdoorscan: Cannot write to stdout.", "backdoorscan: There is no space left to write to.")
    assert "No space left on device" in why


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc, where not even root makes files")
@pytest.mark.parametrize(
    "flags",
    [
        ["-f", "html=/proc/report.html"],
        ["-f", "json", "--write-baseline", "/proc/baseline.toml"],
        [*QUICK, "-f", "json", "--save-triggers", "/proc/triggers.npz"],
        [*QUICK, "-f", "json", "--save-figures", "/proc/figures"],
    ],
)
def test_a_folder_that_takes_no_files_is_an_error(flags: list[str], place: Path, cli: Cli) -> None:
    result = cli(*SCAN, *flags)
    assert result.code == ExitCode.ERROR
    assert f"backdoorscan: Cannot write {'figures to ' if '--save-figures' in flags else ''}/proc/" in result.err
    assert "Internal error" not in result.err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc, where not even root makes files")
def test_a_cache_and_a_repair_where_no_files_can_be(place: Path, cli: Cli) -> None:
    scanned = cli(*SCAN, "--cache-dir", "/proc/cache", "-f", "json")
    assert (scanned.code, scanned.json["verdict"]) == (ExitCode.FOUND, "backdoored")
    assert scanned.err.startswith("warning: nothing is kept in the cache: Cannot write /proc/cache/")
    repair = ["repair", "model.h5", "--valid", "clean.h5", "--channels", 3, "--no-rescan", "-o", "/proc/repaired"]
    repaired = cli(*repair)
    assert repaired.code == ExitCode.ERROR
    repaired.assert_one_message()
    assert repaired.err.startswith("backdoorscan: Cannot write to /proc.\n")


ENDING = """
from backdoorscan import hookimpl
from backdoorscan.plugin.reporter import Reporter

class Ending(Reporter):
    id = "ending"
    summary = "Wants to choose the exit code."
    def render(self, report, terminal):
        raise SystemExit(0)

@hookimpl
def backdoorscan_reporters():
    return [Ending]
"""


def test_whoever_ends_the_program_does_not_choose_its_exit_code(
    place: Path, cli: Cli, third_party: Callable[..., Any], oracle: Callable[..., str]
) -> None:
    third_party(oracle("quitter", judge="raise SystemExit(0)"), "quitters")
    third_party(ENDING, "enders")
    assert cli("scan", "model.h5", "--valid", "clean.h5", "-d", "quitter").code == ExitCode.ERROR
    assert cli(*SCAN, "-f", "ending").code == ExitCode.ERROR
    listener = "@hookimpl\ndef backdoorscan_scan_started():\n    raise SystemExit(0)\n"
    third_party(f"from backdoorscan import hookimpl\n{listener}", "starters")
    result = cli(*SCAN, "--no-cache")
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "ended the program" in result.err


MEETING = """
while len(list(__import__("pathlib").Path("meeting").iterdir())) < 2:
            context.progress(0.5)
            __import__("pathlib").Path("meeting", str(__import__("os").getpid())).touch()
"""


def test_two_scans_at_once_share_a_cache(
    elsewhere: Path, demo: DemoFiles, third_party: Callable[..., Any], oracle: Callable[..., str], cli: Cli
) -> None:
    env = third_party(oracle(examine=MEETING.strip(), p_value=0.5)).env
    (elsewhere / "meeting").mkdir()
    (elsewhere / "m").mkdir()
    for path in (demo.model, demo.clean_model):
        shutil.copy(path, elsewhere / "m")
    scan = ["scan", "m", "--valid", str(demo.clean), "-d", "oracle", "--jobs", "1", "-f", "json", "--timeout", "120"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "backdoorscan", *scan],
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [ExitCode.OK] * 2, said
    reports = [json.loads(out) for out, _ in said]
    assert [run["cached"] for report in reports for run in report["runs"]][::2] == [False, False]
    kept = Path(os.environ["BACKDOORSCAN_CACHE_DIR"])
    assert [file.suffix for file in kept.rglob("*") if file.is_file()] == [".json"] * 2
    third = cli(*scan)
    assert (third.code, third.json["cached"]) == (ExitCode.OK, True)
    assert without_cost(reports[0]) == without_cost(reports[1]) == without_cost(third.json)


def test_the_report_on_several_models_does_not_depend_on_the_jobs(demo: DemoFiles, cli: Cli) -> None:
    scan = ["scan", demo.model, demo.clean_model, "--valid", demo.clean, "--limit", "60", "-d", "head-weights", *QUICK]
    alone, apart = (cli(*scan, "--jobs", jobs, "--no-cache", "-f", "json") for jobs in (1, 4))
    assert (alone.code, alone.json["complete"]) == (apart.code, True)
    assert without_cost(alone.json) == without_cost(apart.json)
