"""The step of the action that scans: the action's inputs in, reports, outputs, a summary and an exit code out.

It needs nothing but the standard library: where backdoorscan is broken, the job must still end as a tool error.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

FORMATS = ("json", "sarif", "junit", "markdown")
ERROR, INTERRUPTED = 2, 130
TITLES = {
    1: "A backdoor was found",
    ERROR: "No trustworthy answer: the scan failed",
    3: "Inconclusive: the scan is no pass",
    INTERRUPTED: "The scan was interrupted",
}
LAST_LINES = 30
"""Lines of the program's output that are shown where it left no report."""


def command(program: str, inputs: Mapping[str, str], reports: Path) -> list[str]:
    """The command line of the scan.

    Args:
        program: backdoorscan.
        inputs: The environment; ``INPUT_MODELS`` and ``INPUT_ARGUMENTS`` have one word per line, never split further.
        reports: The folder for the reports.
    """
    options = {name: inputs.get(f"INPUT_{name.upper()}", "") for name in ("manifest", "valid", "fail_on", "baseline")}
    return [
        *(program, "--no-progress", "--color", "never", "scan"),
        *(f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value),
        *_lines(inputs.get("INPUT_ARGUMENTS", "")),
        "--format=table",
        *(f"--format={name}={reports / f'report.{name}'}" for name in FORMATS),
        "--",  # a file may be called --fail-on=never
        *_lines(inputs.get("INPUT_MODELS", "")),
    ]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def run(words: Sequence[str]) -> tuple[int, str]:
    """Run a program and pass on what it prints, of which the runner must obey nothing: it quotes names of files.

    Returns:
        Its exit code, and the last lines that it printed.
    """
    last: deque[str] = deque(maxlen=LAST_LINES)
    token = secrets.token_hex(16)
    _say(f"::stop-commands::{token}\n")
    try:
        with subprocess.Popen(  # noqa: S603
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
        ) as process:
            # A job that is cancelled or out of time: the program ends by itself, and keeps what is finished.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: process.send_signal(signal.SIGINT))
            for line in process.stdout or ():
                last.append(line)
                _say(line)
        code = process.returncode
    except OSError as error:
        last.append(f"{error}\n")
        code = ERROR
    _say(f"\n::{token}::\n")
    return code, "".join(last)


def answer(code: int, reports: Path) -> int:
    """The job's exit code: a code without its reports is no answer, and Python itself ends with 1 where it breaks."""
    whole = all((reports / f"report.{name}").is_file() for name in FORMATS)
    return code if code == INTERRUPTED or (code in (0, 1, 3) and whole) else ERROR


def told(code: int, printed: str) -> str:
    """The summary of a scan without a report, in Markdown: what the program printed, as code that it cannot end."""
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", printed)), default=0))
    return f"## ⚠️ {TITLES.get(code, TITLES[ERROR])}\n\n{fence}text\n{printed.rstrip()}\n{fence}\n"


def main() -> int:
    """Scan, tell the job, and return its exit code."""
    reports = Path(tempfile.mkdtemp(prefix="backdoorscan-reports-", dir=os.environ["RUNNER_TEMP"]))
    code, printed = run(command(str(Path(sys.executable).with_name("backdoorscan")), os.environ, reports))
    code = answer(code, reports)
    sarif, summary = reports / "report.sarif", reports / "report.markdown"
    text = summary.read_text(encoding="utf-8") if summary.is_file() else told(code, printed)
    _append("GITHUB_STEP_SUMMARY", text)
    outputs = {"exit-code": code, "reports": reports, "sarif": sarif if sarif.is_file() else ""}
    _append("GITHUB_OUTPUT", "".join(f"{name}={value}\n" for name, value in outputs.items()))
    if code:
        # A backdoor outranks an error as an exit code; it must not hide it.
        partly = code == 1 and not json.loads((reports / "report.json").read_text(encoding="utf-8"))["complete"]
        more = ", and part of the scan failed" if partly else ""
        _say(f"::error title=backdoorscan::{TITLES[code]}{more} (exit code {code}). The job's summary says more.\n")
    return code


def _append(variable: str, text: str) -> None:
    with Path(os.environ[variable]).open("a", encoding="utf-8") as file:
        file.write(text)


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
