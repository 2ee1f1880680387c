"""The verb *repair* on small files."""

import html
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from backdoorscan import evaluate, policy, repair
from backdoorscan.errors import ArtifactError, ExitCode, MethodError, OutputError, UnknownNameError, UsageError
from backdoorscan.findings import Finding, Verdict
from backdoorscan.formats.weights.loader import TorchStateDict
from backdoorscan.images import LabelledImages
from backdoorscan.measured import NOT_WRITTEN, RepairReport
from backdoorscan.ops.rejecting import grow_head
from backdoorscan.plugin.method import option
from backdoorscan.plugin.repairer import Candidate, Repairer
from backdoorscan.plugin.reporter import Terminal
from backdoorscan.repairing import RepairOptions
from backdoorscan.reports.html import Html
from backdoorscan.reports.markdown import Markdown
from backdoorscan.reports.table import Table


@dataclass(frozen=True, kw_only=True)
class Mend(Repairer):
    """Cuts the trigger's channel off, ``good`` times, and then fails if it should."""

    id = "mend"
    good: int = option(1, help="Candidates.", minimum=0)
    breaks: bool = option(False, help="Whether the last candidate cannot be written.")

    def repair(self, classifier, images, findings, context):
        candidates = []
        for number in range(self.good):
            twin = classifier.clone()
            twin.network.conv2.weight.data[5] = 0
            candidates.append(Candidate(f"n={number}", twin, {"findings": len(findings), "channels_pruned": 1}))
        if self.breaks:
            twin = classifier.clone()
            twin.network.fc.bias = torch.nn.Parameter(torch.zeros(6))
            candidates.append(Candidate("broken", twin))
        return candidates


@dataclass(frozen=True, kw_only=True)
class Unwilling(Mend):
    """Cannot."""

    id = "unwilling"

    def repair(self, classifier, images, findings, context):
        raise MethodError("Not on this one.")


@dataclass(frozen=True, kw_only=True)
class Pupil(Mend):
    """Learns from poisoned images."""

    id = "pupil"
    needs_triggers = True
    poisoned = "images"

    def repair(self, classifier, images, findings, context):
        known = context.poisoned
        labels = None if known is None else known.labels.tolist()
        (candidate,) = super().repair(classifier, images, findings, context)
        return [replace(candidate, facts={"findings": len(findings), "labels": labels})]


@dataclass(frozen=True, kw_only=True)
class Strict(Pupil):
    """Learns from poisoned images with their true labels."""

    id = "strict"
    poisoned = "true labels"
    auto = ({},)


@dataclass(frozen=True, kw_only=True)
class Rejecting(Mend):
    """Grows the head."""

    id = "rejecting"

    def repair(self, classifier, images, findings, context):
        return [Candidate("grown", grow_head(classifier)[0], rejects=True)]


@pytest.fixture
def mended(model_file, registry_of, tmp_path):
    """``mended(method, ...)``: the report of a repair into ``tmp_path / 'out'``."""

    def run(method="mend", settings=None, poisoned=True, findings=(), **options):
        file = model_file(2)
        return repair(
            file.path,
            file.images,
            poisoned if isinstance(poisoned, LabelledImages) else file.poisoned if poisoned else None,
            file.read,
            RepairOptions(
                **{"method": method, "settings": settings or {}, "output": tmp_path / "out", "rescan": False} | options
            ),
            findings=findings,
            registry=registry_of(repairers=[Mend, Unwilling, Pupil, Strict, Rejecting]),
        )

    return run


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_before_and_after(mended, tmp_path):
    report = mended()
    assert (report.before.clean_accuracy, report.before.attack_success_rate) == (1, 1)
    (row,) = report.candidates
    assert (row.name, row.kind, row.files) == ("n=0", "repaired", [str(tmp_path / "out" / "net_n=0.pt")])
    assert (row.scores.clean_accuracy, row.scores.attack_success_rate) == (1, 0)
    assert policy.repair_exit_code(report) is ExitCode.OK
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["candidates"][0]["channels_pruned"] == 1


def test_the_repaired_file_is_in_the_users_format_and_only_repaired(mended, tmp_path):
    mended()
    before, after = torch.load(tmp_path / "net.pt"), torch.load(tmp_path / "out" / "net_n=0.pt")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["conv2.weight"]


def test_the_original_is_left_alone(mended, model_file, tmp_path):
    model_file(2)
    before = (tmp_path / "net.pt").stat().st_size
    content = {name: tensor.clone() for name, tensor in torch.load(tmp_path / "net.pt").items()}
    mended()
    assert (tmp_path / "net.pt").stat().st_size == before
    assert all(torch.equal(tensor, content[name]) for name, tensor in torch.load(tmp_path / "net.pt").items())


def test_what_is_reported_is_what_the_files_do(model_file, tmp_path):
    file = model_file(2)
    options = RepairOptions(settings={"drop": "2,"}, output=tmp_path / "out")
    report = repair(file.path, file.images, file.poisoned, file.read, options)
    assert [(row.name, row.kind) for row in report.candidates] == [("X=2", "repaired"), ("X=2", "goodnet")]
    assert files(tmp_path / "out") == ["net_X=2.goodnet.onnx", "net_X=2.pt"]
    for row in report.candidates:
        measured = evaluate(row.files[0], file.images, file.poisoned, file.read)
        assert measured.scores == row.scores
    repaired, goodnet = (row.scores for row in report.candidates)
    assert (repaired.attack_success_rate, goodnet.attack_success_rate, goodnet.caught_rate) == (0, 0, 1)
    assert goodnet.false_reject_rate == pytest.approx(1 - repaired.clean_accuracy)
    assert report.before.false_reject_rate is None


def test_without_poisoned_images_nothing_is_said_of_the_attack(mended):
    report = mended(poisoned=False)
    assert report.poisoned is None
    assert report.before.attack_success_rate is None
    assert report.candidates[0].scores.attack_success_rate is None


def test_findings_reach_the_method(mended):
    finding = Finding(target_label=2, p_value=0.0, score=1.0)
    assert mended(findings=[finding]).candidates[0].facts["findings"] == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "unwilling"}, MethodError),
        ({"settings": {"good": 2, "breaks": "yes"}}, Exception),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_repair_that_fails_leaves_nothing_half_written(mended, tmp_path, options, error, exists):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
        (out / "net_n=0.pt").write_text("of the user")
    with pytest.raises(error):
        mended(force=exists, **options)
    left = ["out", "out/net_n=0.pt"] if exists else []
    assert [name for name in files(tmp_path) if name not in ("net.pt", "arch.py")] == left
    assert not exists or (out / "net_n=0.pt").read_text() == "of the user"


def test_an_existing_folder_is_refused_before_any_work(mended, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        mended(method="unwilling")


def test_force_replaces_files_and_keeps_others(mended, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "net_n=0.pt").write_text("old")
    (tmp_path / "out" / "note.txt").write_text("mine")
    mended(force=True)
    assert (tmp_path / "out" / "note.txt").read_text() == "mine"
    assert torch.load(tmp_path / "out" / "net_n=0.pt").keys()
    assert files(tmp_path / "out") == ["net_n=0.pt", "note.txt"]


def test_a_folder_that_cannot_be_made(mended, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        mended(output=tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "mnd"}, UnknownNameError, "Did you mean 'mend'"),
        ({"settings": {"god": 1}}, UnknownNameError, "Did you mean 'good'"),
        ({"settings": {"good": -1}}, UsageError, "mend.good"),
    ],
)
def test_options_that_cannot_work(mended, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        mended(**options)
    assert not (tmp_path / "out").exists()


def test_by_default_the_folder_is_named_after_the_model(mended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mended(output=None)
    assert files(tmp_path / "net-repaired") == ["net_n=0.pt"]


def test_a_repair_that_leaves_the_backdoor_in_is_told(mended):
    report = mended()
    kept = replace(report.candidates[0], scores=report.before)
    assert policy.repair_exit_code(replace(report, candidates=[kept])) is ExitCode.FOUND


@pytest.fixture
def scans(monkeypatch):
    """The scans that a repair makes, none of which finds anything."""
    made = []

    def look_again(*arguments):
        made.append(arguments)
        return Verdict.CLEAN, [], 0

    monkeypatch.setattr("backdoorscan.comparing.look_again", look_again)
    return made


@pytest.fixture
def truly_labelled(model_file):
    """Poisoned images under the labels they have without the trigger."""
    file = model_file(2)
    labels = file.images.labels[file.images.labels != 2]
    return LabelledImages(file.poisoned.pixels, labels, "true labels")


def test_poisoned_images_to_learn_from_save_the_scan(mended, scans, truly_labelled):
    (row,) = mended("pupil", findings=None).candidates
    assert (len(scans), row.facts["labels"]) == (1, None)
    report = mended("pupil", findings=None, learn_from_poisoned=True, force=True)
    (row,) = report.candidates
    assert (len(scans), row.facts) == (1, {"findings": 0, "labels": [2] * 24})
    assert report.poisoned["count"] == row.scores.successful_attacks + row.scores.unsuccessful_attacks == 24
    settings = {"findings": None, "learn_from_poisoned": True, "force": True}
    (row,) = mended("strict", poisoned=truly_labelled, target=2, **settings).candidates
    assert len(scans) == 1
    assert set(row.facts["labels"]) == {0, 1, 3, 4}


def test_auto_hides_images_from_a_method_that_needs_other_labels(mended, scans, truly_labelled):
    settings = {"findings": None, "learn_from_poisoned": True, "force": True}
    (row,) = mended("auto", **settings).candidates
    assert (row.method, row.facts["labels"], len(scans)) == ("strict", None, 1)
    (row,) = mended("auto", poisoned=truly_labelled, target=2, **settings).candidates
    assert (len(row.facts["labels"]), len(scans)) == (24, 1)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("mend", {}, "mend does not learn from poisoned images"),
        ("pupil", {"poisoned": False}, "no poisoned images to learn from"),
        ("strict", {}, "only if their true labels are known"),
        ("strict", {"target": 2}, "only if their true labels are known"),  # they are all 2
    ],
)
def test_poisoned_images_that_cannot_be_learnt_from(mended, tmp_path, method, options, message):
    with pytest.raises(UsageError, match=message):
        mended(method, learn_from_poisoned=True, **options)
    assert not (tmp_path / "out").exists()


def test_unlearning_takes_the_true_labels(model_file, truly_labelled, scans, tmp_path):
    file = model_file(2)
    settings = {"sample": 3200, "batch_size": 16, "rate": 0.03}
    options = RepairOptions(
        method="unlearn",
        settings=settings,
        output=tmp_path / "out",
        learn_from_poisoned=True,
        target=2,
        rescan=False,
    )
    report = repair(file.path, file.images, truly_labelled, file.read, options)
    (row,) = report.candidates
    assert scans == []
    assert (report.before.successful_attacks, report.before.unsuccessful_attacks) == (24, 0)
    assert row.facts["poisoned_images"] == 24
    assert row.scores.attack_success_rate <= 0.1
    assert row.scores.clean_accuracy >= 0.9


@pytest.mark.parametrize(
    ("method", "settings", "options"),
    [
        ("prune", {"drop": "2,"}, {}),
        ("unlearn", {"rounds": 1, "sample": 320}, {"rescan": False}),
        ("retrain", {"steps": 10, "head_steps": 10}, {"rescan": False, "learn_from_poisoned": True}),
    ],
)
def test_the_same_seed_gives_the_same_report_and_the_same_files(model_file, tmp_path, method, settings, options):
    file = model_file(2)
    out = tmp_path / "out"
    options = RepairOptions(method=method, settings=settings, output=out, seed=7, **options)
    reports, contents = [], []
    for _ in range(2):
        data = repair(file.path, file.images, file.poisoned, file.read, options).to_json()
        for measured in ("wall_seconds", "cpu_seconds", "peak_memory_mb"):
            del data["cost"][measured]
        reports.append(json.dumps(data, sort_keys=True))
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
        shutil.rmtree(out)
    assert reports[0] == reports[1]
    assert contents[0] == contents[1]
    assert contents[0].keys() == {Path(name).name for row in data["candidates"] for name in row["files"]}


def test_a_repair_that_fails_leaves_no_folders_behind(mended, tmp_path):
    with pytest.raises(MethodError):
        mended("unwilling", output=tmp_path / "a" / "b" / "out")
    assert not (tmp_path / "a").exists()


def test_a_format_that_cannot_take_the_larger_head_leaves_the_goodnet_and_says_why(mended, tmp_path, monkeypatch):
    (row,) = mended("rejecting").candidates
    assert [Path(name).name for name in row.files] == ["net_grown.goodnet.onnx", "net_grown.pt"]
    assert NOT_WRITTEN not in row.facts

    def fails(*_, **__):
        raise ArtifactError("A tensor does not fit.", why="It is stored in half precision.")

    monkeypatch.setattr(TorchStateDict, "write_extended", fails)
    report = mended("rejecting", force=True)
    (row,) = report.candidates
    assert [Path(name).name for name in row.files] == ["net_grown.goodnet.onnx"]
    why = "GoodNet grown was not written as torch-state-dict, the model's own format: It is stored in half precision."
    for reporter in (Table(), Markdown(), Html()):
        text = html.unescape(reporter.render(report, Terminal(width=200)))
        assert why in text.replace("\\_", "_")
    assert RepairReport.from_json(json.loads(json.dumps(report.to_json()))).candidates[0].facts == row.facts
