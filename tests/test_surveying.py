"""The verb *scan* over several models."""

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from backdoorscan import policy
from backdoorscan.classifier import Classifier
from backdoorscan.engine.keeping import Keeping
from backdoorscan.errors import MethodError, UnknownNameError
from backdoorscan.findings import Evidence, Finding, Judgement, Verdict
from backdoorscan.images import LabelledImages
from backdoorscan.manifest import Entry
from backdoorscan.plugin.detector import Detector
from backdoorscan.report import ScanReport
from backdoorscan.scanning import ScanOptions
from backdoorscan.surveying import survey
from backdoorscan.trigger import Trigger

WATCHED: "weakref.WeakSet[Classifier]" = weakref.WeakSet()
"""The classifiers that are alive, of those made since a test began to watch."""


@dataclass(frozen=True, kw_only=True)
class Bias(Detector):
    """Takes the first bias of the head for the p-value of label 1; large ones stand for a failure."""

    id = "bias"
    seen: ClassVar[list[float]] = []
    most_alive: ClassVar[list[int]] = []

    def examine(self, unit, classifier, images, context):
        value = round(float(list(classifier.parameters())[-1].detach()[0]), 4)
        self.seen.append(value)
        self.most_alive.append(len(WATCHED))
        if value >= 5:
            raise MethodError("Too large.")
        many = torch.rand(5, 2, *classifier.input_shape[1:])
        triggers = [Trigger(many[label, :1], many[label, 1:], label) for label in range(5)]
        return Evidence(figures={"value": value}, triggers=triggers, gradient_samples=10)

    def judge(self, evidence):
        (part,) = evidence
        p_value = min(1.0, part.figures["value"])
        findings = [Finding(target_label=1, p_value=p_value, score=1.0, trigger=part.triggers[1])]
        return Judgement(findings=findings, p_value=p_value)


@pytest.fixture
def files(model_file, tmp_path) -> Callable[..., list[Entry]]:
    """``files(0.5, 0.001)``: tiny models whose evidence is that, as entries."""
    base = model_file(None)
    Bias.seen.clear()
    Bias.most_alive.clear()

    def make(*values: float, **facts) -> list[Entry]:
        weights = torch.load(base.path, weights_only=True)
        *_, last = weights
        entries = []
        for number, value in enumerate(values):
            weights[last] = weights[last].clone()
            weights[last][0] = value
            file = tmp_path / "many" / f"{number}.pt"
            file.parent.mkdir(exist_ok=True)
            torch.save(weights, file)
            # Everything pinned: the tests are about many files, not about how each is fed.
            read = replace(base.read, input_range=(0.0, 1.0))
            entries.append(Entry(file=file, read=read, **facts))
        return entries

    return make


@pytest.fixture
def run(model_file, registry_of, tmp_path) -> Callable[..., ScanReport]:
    images = model_file(None).images

    def start(entries, *, given=images, keep=False, observer=lambda _stage, _part: None, tell=None, **options):
        keeping = Keeping(tmp_path / "kept", resume=options.pop("resume", False), tell=tell or (lambda _text: None))
        return survey(
            entries,
            given,
            ScanOptions(**options),
            observer=observer,
            registry=registry_of(detectors=[Bias]),
            keeping=keeping if keep else None,
        )

    return start


def verdicts(report: ScanReport) -> list[str]:
    return [str(run.verdict) for run in report.runs]


def gate(report: ScanReport, entries) -> int:
    return policy.gate(zip(report.runs, [entry.fail_on for entry in entries], strict=True))


def test_a_run_for_each_in_order_and_the_worst_verdict(files, run):
    entries = files(0.5, 0.001, 0.02, 0.6)
    report = run(entries)
    assert [run.error + run.detectors[0].error for run in report.runs] == [""] * 4
    assert verdicts(report) == ["clean", "backdoored", "inconclusive", "clean"]
    assert (report.verdict, report.complete, report.cached) == (Verdict.BACKDOORED, True, False)
    assert [run.model["path"] for run in report.runs] == [str(entry.file) for entry in entries]
    assert report.cost.gradient_samples == 40
    assert gate(report, entries) == 1
    assert ScanReport.from_json(report.to_json()).to_json() == report.to_json()


def test_each_has_its_own_alpha_and_name(files, run):
    first, second = files(0.02, 0.02)
    entries = [replace(first, alpha=0.05, name="lax"), replace(second, labels=(1, 2))]
    report = run(entries)
    assert verdicts(report) == ["backdoored", "inconclusive"]
    assert (report.alpha, [run.alpha for run in report.runs]) == (0.01, [0.05, None])
    assert [run.model.get("name") for run in report.runs] == ["lax", None]
    assert "3 labels left out by --labels" in report.runs[1].not_tested


def broken(folder: Path, kind: str) -> Entry:
    file = folder / "bad.pt"
    if kind == "text":
        file.write_text("hello")
    elif kind == "empty":
        file.touch()
    return Entry(file=file)


@pytest.mark.parametrize(
    ("kind", "says", "has_digest"),
    [
        ("missing", "no model file", False),
        ("empty", "is empty", False),
        ("text", "known format", True),
    ],
)
def test_a_bad_file_does_not_stop_the_rest_and_does_not_pass(files, run, tmp_path, kind, says, has_digest):
    first, last = files(0.5, 0.6)
    entries = [first, broken(tmp_path, kind), last]
    report = run(entries)
    assert verdicts(report) == ["clean", "inconclusive", "clean"]
    bad = report.runs[1]
    assert says in bad.error
    assert (bad.complete, report.complete, bool(bad.model["sha256"])) == (False, False, has_digest)
    assert gate(report, entries) == 2
    assert gate(report, [replace(entry, fail_on=policy.FailOn.NEVER) for entry in entries]) == 2
    assert gate(run([*entries, *files(0.5, 0.001)[1:]]), [*entries, first]) == 1


def test_other_things_that_go_wrong_with_one(files, run):
    entries = files(0.5, 0.6, 7.0, 0.7)
    large = LabelledImages(np.zeros((4, 1, 20, 20), np.uint8), np.zeros(4, np.int64), "large ones")
    entries[0] = replace(entries[0], labels=(77,))
    entries[1] = replace(entries[1], valid="nowhere.h5")
    report = run(entries)
    assert [run.error.partition("\n")[0] for run in report.runs] == [
        "--labels names 77.",
        "nowhere.h5 does not exist.",
        "",
        "",
    ]
    assert "Too large" in report.runs[2].detectors[0].error
    assert [run.complete for run in report.runs] == [False, False, False, True]
    unfit = run(entries[3:] * 2, given=large)
    assert ["large ones" in run.error for run in unfit.runs] == [True, True]


def test_an_error_nobody_thought_of_is_one_models_error(files, run, monkeypatch):
    entries = files(0.5, 0.6)
    real, asked = torch.nn.Module.parameters, []

    def parameters(self, *arguments):
        asked.append(1)
        if len(asked) == 1:
            raise RecursionError("deep")
        return real(self, *arguments)

    monkeypatch.setattr("backdoorscan.classifier.Classifier.parameters", parameters, raising=False)
    report = run(entries)
    assert ["RecursionError: deep" in str(run.to_json()) for run in report.runs] == [True, False]
    assert [run.complete for run in report.runs] == [False, True]


def test_options_that_cannot_work_for_any(files, run):
    with pytest.raises(UnknownNameError):
        run(files(0.5, 0.6), detectors=["bais"])


def test_identical_ones_are_scanned_once(files, run, tmp_path):
    first, second = files(0.001, 0.5)
    (tmp_path / "copy.pt").write_bytes(first.file.read_bytes())
    copy = replace(first, file=tmp_path / "copy.pt", name="copy")
    report = run([first, second, copy, replace(first, alpha=0.3), first])
    assert Bias.seen == [0.001, 0.5, 0.001]  # with another alpha it is another scan
    assert verdicts(report) == ["backdoored", "clean", "backdoored", "backdoored", "backdoored"]
    assert [run.cached for run in report.runs] == [False, False, True, False, True]
    assert (report.runs[2].model["path"], report.runs[2].model["name"]) == (str(copy.file), "copy")
    assert report.cost.gradient_samples == 30


def test_what_was_scanned_before_is_answered_one_by_one(files, run, tmp_path):
    entries, told = files(0.5, 0.001, 0.6), []
    assert not run(entries[:2], keep=True).cached
    report = run(entries, keep=True, tell=told.append)
    assert Bias.seen == [0.5, 0.001, 0.6]
    assert [run.cached for run in report.runs] == [True, True, False]
    assert (report.cached, report.cost.gradient_samples, told) == (False, 10, [])
    again = run([*entries, entries[0]], keep=True)
    assert (again.cached, again.cost.gradient_samples) == (True, 0)
    assert verdicts(again) == ["clean", "backdoored", "clean", "clean"]
    assert [run.findings[0].trigger is not None for run in again.runs if run.findings] == [True]
    weights = torch.load(entries[0].file, weights_only=True)
    torch.save(
        weights | {name: value + 0.001 for name, value in weights.items() if name == list(weights)[-1]}, entries[0].file
    )
    assert [run.cached for run in run(entries, keep=True).runs] == [False, True, True]


def test_images_are_read_once_for_each_path(files, run, monkeypatch, model_file):
    read, images = [], model_file(None).images

    def load(source, **options):
        read.append((source, options))
        return images

    monkeypatch.setattr("backdoorscan.surveying.load_images", load)
    entries = files(0.5, 0.6, 0.7, 0.8)
    entries[1:] = [replace(entry, valid=valid) for entry, valid in zip(entries[1:], ["a", "b", "a"], strict=True)]
    assert run(entries, seed=3).complete
    assert read == [("a", {"limit": None, "seed": 3}), ("b", {"limit": None, "seed": 3})]


def test_progress_counts_the_models(files, run):
    seen = []
    run(files(0.5, 0.6), observer=lambda stage, part: seen.append((stage, part)))
    stages = list(dict.fromkeys(stage for stage, _ in seen))
    assert stages[1:3] == ["model 1 of 2, 0.pt: reading the model", "model 1 of 2, 0.pt: bias"]
    assert "model 2 of 2, 1.pt: bias" in stages
    overall = [part for stage, part in seen if stage == "all models"]
    assert overall == sorted(overall)
    assert 0 < overall[0] <= 0.5 <= overall[-1] == 1


def test_resuming_goes_on_with_the_models_that_are_left(files, run, monkeypatch):
    entries, told = files(0.5, 0.001, 0.6), []
    with monkeypatch.context() as patch:
        patch.setattr(
            Bias,
            "judge",
            lambda self, evidence: 1 / 0 if evidence[0].figures["value"] == 0.001 else Judgement(p_value=1.0),
        )
        first = run(entries, keep=True)
    assert [run.complete for run in first.runs] == [True, False, True]
    second = run(entries, keep=True, resume=True, tell=told.append)
    assert Bias.seen == [0.5, 0.001, 0.6]  # its unit was finished
    assert told == [f"{entries[1].file}: resuming: 1 finished unit taken over"]
    assert [run.cached for run in second.runs] == [True, False, True]
    assert second.complete


def test_ctrl_c_ends_it(files, run, monkeypatch):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bias, "examine", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(files(0.5, 0.6))


def test_many_models_leave_no_network_and_no_spare_trigger_behind(files, run, monkeypatch):
    made = Classifier.__init__

    def watched(self, *arguments, **options):
        made(self, *arguments, **options)
        WATCHED.add(self)

    monkeypatch.setattr(Classifier, "__init__", watched)
    WATCHED.clear()
    values = [0.1 + number / 1000 for number in range(37)]
    report = run(files(*values, 0.001, 0.002, 0.003), keep=True)
    assert len(report.runs) == len(Bias.seen) == 40
    assert max(Bias.most_alive) == 1
    assert len(WATCHED) == 0
    kept = [trigger for run in report.runs for part in run.detectors for trigger in part.triggers]
    assert [trigger.target for trigger in kept] == [1, 1, 1]
    found = [finding.trigger for run in report.runs for finding in run.findings]
    for trigger in (*kept, *found):
        assert trigger.mask.untyped_storage().nbytes() == 4 * trigger.mask.numel()


THOUSAND = """
import json, sys
from pathlib import Path
import torch
from backdoorscan.engine.keeping import Keeping
from backdoorscan.formats.loading import ReadOptions
from backdoorscan.images import LabelledImages
from backdoorscan.manifest import Entry
from backdoorscan.scanning import ScanOptions
from backdoorscan.surveying import survey

torch.set_num_threads(1)
read = ReadOptions(arch="arch.py:net", input_range=(0.0, 1.0))
scope = {}
exec(Path("arch.py").read_text(), scope)
network = scope["net"]()
entries = []
for number in range(1000):
    network[-1].bias.data[0] = number / 1000
    torch.save(network.state_dict(), f"{number}.pt")
    entries.append(Entry(file=Path(f"{number}.pt"), read=read))
pixels = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
labels = network(torch.from_numpy(pixels)).argmax(1).numpy()
memory = {}

def observer(stage, part):
    if stage == "all models":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory[round(part * 1000)] = pages

report = survey(
    entries,
    LabelledImages(pixels, labels, "some"),
    ScanOptions(detectors=["head-weights"]),
    observer=observer,
    keeping=Keeping(Path("kept")),
)
done = {"runs": len(report.runs), "digests": len({run.model["sha256"] for run in report.runs})}
done["errors"] = sorted({run.error + part.error for run in report.runs for part in run.detectors})
print(json.dumps({**done, "early": memory[100], "late": memory[1000]}))
"""

LARGE = """
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 4))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell a process's memory")
def test_the_memory_does_not_grow_with_the_number_of_models(tmp_path):
    (tmp_path / "arch.py").write_text(LARGE)
    done = subprocess.run([sys.executable, "-c", THOUSAND], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["runs"], said["digests"], said["errors"]) == (1000, 1000, [""])
    # 900 networks take 96 MiB, their files as much; what a report keeps of 900 models is to be far less.
    growth = (said["late"] - said["early"]) * os.sysconf("SC_PAGESIZE") / 2**20
    assert growth < 32, said


ACROSS = """
import os, signal, time
from dataclasses import dataclass
from backdoorscan import hookimpl
from backdoorscan.findings import Evidence, Judgement
from backdoorscan.plugin.detector import Detector

@dataclass(frozen=True, kw_only=True)
class Process(Detector):
    "Says in which process it runs, or ends it."
    id = "process"

    def examine(self, unit, classifier, images, context):
        if float(list(classifier.parameters())[-1].detach()[0]) == 9.0:
            os.kill(os.getpid(), signal.SIGKILL)
        return Evidence(figures={"process": os.getpid()}, gradient_samples=1)

    def judge(self, evidence):
        print("this must not stand in a report")
        return Judgement(p_value=1.0)

@hookimpl
def backdoorscan_detectors():
    return [Process]
"""


def test_across_processes_one_that_dies_takes_no_other_with_it(files, model_file, tmp_path, monkeypatch, capfd):
    from backdoorscan.registry import installed

    folder = tmp_path / "stranger"
    info = folder / "stranger-1.dist-info"
    info.mkdir(parents=True)
    (folder / "stranger_plugin.py").write_text(ACROSS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[backdoorscan]\nstranger = stranger_plugin\n")
    monkeypatch.syspath_prepend(folder)
    installed.cache_clear()
    try:
        entries = files(0.5, 9.0, 0.6, 0.7)
        seen = []
        report = survey(
            entries,
            model_file(None).images,
            ScanOptions(detectors=["process"], jobs=2),
            observer=lambda stage, part: seen.append((stage, part)),
            keeping=Keeping(tmp_path / "kept"),
        )
    finally:
        installed.cache_clear()
    processes = [run.detectors[0].evidence["units"][0]["process"] for run in report.runs if not run.error]
    assert [bool(run.error) for run in report.runs] == [False, True, False, False]
    assert signal.Signals.SIGKILL.name in report.runs[1].error
    assert os.getpid() not in processes
    assert 2 <= len(set(processes)) + 1 <= 3
    assert report.cost.gradient_samples == 3
    assert any(stage == "all models" and part == 1 for stage, part in seen)
    assert capfd.readouterr().out == ""
