"""A repository with a backdoored, a clean and a corrupt model goes through the pipeline twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from backdoorscan.errors import ExitCode

SCHEMA = Path(__file__).parents[1] / "reports" / "schemas" / "sarif-schema-2.1.0.json"


@pytest.fixture(scope="module")
def jobs(pipeline: Any, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The first run and the second."""
    runner = pipeline.Runner(repository, tmp_path_factory.mktemp("runner"))
    return runner.scan(models="models"), runner.scan(models="models")


def test_the_job_fails_because_of_the_backdoor(jobs: tuple[Any, Any]) -> None:
    for job in jobs:
        assert job.code == ExitCode.FOUND, job.log
        assert job.outputs["exit-code"] == "1"
        (annotation,) = [line for line in job.log.splitlines() if line.startswith("::error")]
        assert "A backdoor was found, and part of the scan failed" in annotation


def test_the_summary_names_the_bad_and_the_unreadable_file(jobs: tuple[Any, Any]) -> None:
    for job in jobs:
        rows = {line.split("`")[1]: line for line in job.summary.splitlines() if line.startswith("| `models/")}
        assert "backdoored" in rows["models/backdoored.pt2"].split("|")[2]
        assert "clean" in rows["models/clean.pt2"].split("|")[2]
        assert "incomplete" in rows["models/corrupt.pt2"].split("|")[2]
        assert "The zip archive is broken" in job.summary


def test_the_sarif_file_is_valid_and_has_both(jobs: tuple[Any, Any]) -> None:
    checker = jsonschema.Draft4Validator(json.loads(SCHEMA.read_text()), format_checker=jsonschema.FormatChecker())
    for job in jobs:
        assert job.outputs["sarif"] == str(Path(job.outputs["reports"], "report.sarif"))
        sarif = job.report("sarif")
        checker.validate(sarif)
        levels = {
            run["artifacts"][0]["location"]["uri"]: [result["level"] for result in run["results"]]
            for run in sarif["runs"]
        }
        assert levels == {
            "models/backdoored.pt2": ["error"],
            "models/clean.pt2": [],
            "models/corrupt.pt2": ["warning"],
        }
        # One category for each, or an upload of one would replace the others.
        assert len({run["automationDetails"]["id"] for run in sarif["runs"]}) == len(levels)


def test_the_second_run_examines_nothing_again(jobs: tuple[Any, Any]) -> None:
    first, second = ({run["model"]["path"]: run for run in job.report("json")["runs"]} for job in jobs)
    assert not any(run["cached"] for run in first.values())
    assert {path: run["cached"] for path, run in second.items() if not run["error"]} == {
        "models/backdoored.pt2": True,
        "models/clean.pt2": True,
    }
    assert jobs[1].report("json")["cost"]["gradient_samples"] == 0
    assert {path: run["verdict"] for path, run in first.items()} == {p: run["verdict"] for p, run in second.items()}
