"""``backdoorscan evaluate`` of a network, a repaired one and a GoodNet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from backdoorscan.demo import DemoFiles

Cli = Callable[..., Any]

RATES = ["clean_accuracy", "attack_success_rate", "false_reject_rate", "caught_rate"]


def evaluate(cli: Cli, model: object, demo: DemoFiles, *arguments: object) -> Any:
    return cli("evaluate", model, "--valid", demo.clean, "--poisoned", demo.poisoned, *arguments)


def test_network(demo: DemoFiles, cli: Cli, validate: Callable[[Any], None]) -> None:
    command = ["evaluate", demo.model, "--valid", demo.test, "--poisoned", demo.poisoned, "-f", "json"]
    result = cli(*command)
    assert (result.code, result.err) == (0, "")
    validate(result.json)
    assert result.json["schema"] == "backdoorscan.evaluation/1"
    assert result.json["model"]["kind"] == "classifier"
    rates = [result.json[name] for name in RATES]
    assert rates == [pytest.approx(demo.accuracy), pytest.approx(demo.attack_success), None, None]


@pytest.mark.parametrize("kind", ["repaired", "goodnet"])
@pytest.mark.parametrize("name", ["X=4", "X=10"])
def test_scores_are_those_of_the_repair(
    name: str, kind: str, candidates: Any, demo: DemoFiles, cli: Cli, validate: Callable[[Any], None]
) -> None:
    row = candidates[name, kind]
    report = evaluate(cli, row["files"][0], demo, "-f", "json").json
    validate(report)
    assert report["model"]["kind"] == ("goodnet" if kind == "goodnet" else "classifier")
    assert report["model"]["num_classes"] == 10
    for rate in RATES:
        assert report[rate] == (row[rate] if row[rate] is None else pytest.approx(row[rate], abs=0.003))


def test_schema_wants_the_feeding_of_a_network_but_not_of_a_goodnet(
    candidates: Any, demo: DemoFiles, cli: Cli, validate: Callable[[Any], None]
) -> None:
    report = evaluate(cli, candidates["X=4", "goodnet"]["files"][0], demo, "-f", "json").json
    assert "input_range" not in report["model"]
    report["model"]["kind"] = "classifier"
    with pytest.raises(Exception, match="is a required property"):
        validate(report)


def test_without_poisoned_images(demo: DemoFiles, cli: Cli, validate: Callable[[Any], None]) -> None:
    command = ["evaluate", demo.clean_model, "--valid", demo.test]
    report = cli(*command, "-f", "json").json
    validate(report)
    assert report["poisoned"] is report["attack_success_rate"] is report["target_label"] is None
    assert report["clean_accuracy"] == pytest.approx(demo.clean_model_accuracy)
    assert "no poisoned images were given" in cli(*command).out


def test_target_of_poisoned_images_with_true_labels(demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    """Stamped images of all classes with the labels they had: those of the target class do not count."""
    with h5py.File(demo.test) as file:
        pixels, labels = file["data"][()], file["label"][()]
    with h5py.File(demo.poisoned) as file:
        pixels[labels != demo.target] = file["data"][()]
    with h5py.File("true.h5", "w") as file:
        file["data"], file["label"] = pixels, labels
    command = ["evaluate", demo.model, "--valid", demo.test, "--poisoned", "true.h5", "--target", demo.target]
    report = cli(*command, "-f", "json").json
    assert report["target_label"] == demo.target
    assert report["attack_success_rate"] == pytest.approx(demo.attack_success)


def test_target_that_the_labels_name_already_changes_nothing(demo: DemoFiles, cli: Cli) -> None:
    report = evaluate(cli, demo.model, demo, "--target", demo.target, "-f", "json").json
    assert report["attack_success_rate"] == pytest.approx(demo.attack_success)


def test_table(candidates: Any, demo: DemoFiles, cli: Cli) -> None:
    row = candidates["X=4", "goodnet"]
    result = evaluate(cli, row["files"][0], demo)
    lines = result.out.splitlines()
    assert (result.code, result.err, lines[0]) == (0, "", row["files"][0])
    (cells,) = (line.split() for line in lines if line.startswith(" goodnet"))
    attacks = [str(row["successful_attacks"]), "of", "339"]
    names = ("clean_accuracy", "macro_precision", "attack_success_rate", "false_reject_rate", "caught_rate")
    accuracy, precision, success, *others = (f"{row[name]:.2%}" for name in names)
    assert cells == ["goodnet", accuracy, precision, success, *attacks, *others]
    assert lines[-1] == "measured on 380 clean images and 339 poisoned ones"


def test_report_to_a_file_is_the_same_report(demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    printed = evaluate(cli, demo.model, demo, "-f", "json").json
    result = evaluate(cli, demo.model, demo, "-f", "json", "-o", "scores.json")
    assert (result.code, result.out, result.err) == (0, "", "wrote scores.json\n")
    written = json.loads((elsewhere / "scores.json").read_text())
    del printed["cost"], written["cost"]
    assert written == printed


def test_limit_samples_the_clean_images(demo: DemoFiles, cli: Cli) -> None:
    report = evaluate(cli, demo.model, demo, "--limit", 50, "-f", "json").json
    assert (report["images"]["count"], report["poisoned"]["count"]) == (50, 339)


def test_poisoned_images_of_another_size(demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    with h5py.File("small.h5", "w") as file:
        file["data"], file["label"] = np.zeros((5, 1, 8, 8), np.uint8), np.zeros(5)
    result = cli("evaluate", demo.model, "--valid", demo.clean, "--poisoned", "small.h5")
    assert result.code == 2
    result.assert_one_message()
    assert "small.h5" in result.err
