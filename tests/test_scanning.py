"""The verb *scan* on small files."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from backdoorscan import policy, scan
from backdoorscan.errors import (
    ArtifactError,
    ExitCode,
    ImagesError,
    MethodError,
    PluginError,
    UnknownNameError,
    UsageError,
)
from backdoorscan.findings import Evidence, Finding, Judgement, Unit, Verdict
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import option
from backdoorscan.registry import installed
from backdoorscan.report import ScanReport
from backdoorscan.scanning import ScanOptions


@dataclass(frozen=True, kw_only=True)
class Told(Detector):
    """Finds what its options say."""

    id = "told"
    cost = 2.0
    blind_spots = ("the dark",)

    p_value: float = option(1.0, help="Of label 1.", minimum=0, maximum=1)

    def units(self, classifier, context):
        return [Unit(str(label), (label,)) for label in range(classifier.num_classes)]

    def examine(self, unit, classifier, images, context):
        return Evidence(figures={"label": unit.labels[0]}, gradient_samples=10)

    def judge(self, evidence):
        finding = Finding(target_label=1, p_value=self.p_value, score=2.0)
        return Judgement(findings=[finding], p_value=self.p_value, figures={"count": len(evidence)}, note="told so")


@dataclass(frozen=True, kw_only=True)
class Cheap(Told):
    """Cheaper, and never sees anything."""

    id = "cheap"
    cost = 1.0
    covers = ("the dark",)
    blind_spots = ("the cold",)


@dataclass(frozen=True, kw_only=True)
class Failing(Told):
    """Fails on its third unit."""

    id = "failing"
    cost = 3.0
    blind_spots = ()

    def examine(self, unit, classifier, images, context):
        if unit.id == "2":
            raise ValueError("odd")
        return super().examine(unit, classifier, images, context)


@dataclass(frozen=True, kw_only=True)
class Unwilling(Told):
    """Cannot work on this model."""

    id = "unwilling"

    def units(self, classifier, context):
        raise MethodError("Not on this one.")


@dataclass(frozen=True, kw_only=True)
class Idle(Told):
    """Runs only on request."""

    id = "idle"
    default = False


@pytest.fixture
def scanned(model_file, registry_of):
    """``scanned([detector classes], **options)``: the report on a clean file."""

    def run(classes, **options) -> ScanReport:
        file = model_file(None)
        return scan(file.path, file.images, file.read, ScanOptions(**options), registry=registry_of(detectors=classes))

    return run


def code(report: ScanReport) -> ExitCode:
    return policy.exit_code(report.verdict, report.complete)


@pytest.mark.parametrize(("target", "verdict"), [(2, "backdoored"), (None, "clean")])
def test_with_the_methods_of_this_installation(model_file, target, verdict):
    file = model_file(target)
    report = scan(file.path, file.images, file.read, ScanOptions(detectors=["neural-cleanse"]))
    (run,) = report.runs
    assert (report.verdict, run.verdict, report.complete) == (verdict, verdict, True)
    assert [finding.target_label for finding in run.findings] == ([] if target is None else [target])
    assert run.clean_accuracy == 1
    assert report.cost.gradient_samples == run.detectors[0].gradient_samples > 0
    assert run.model["input_range"] == [0, 1]
    json.dumps(report.to_json(), allow_nan=False)


def test_same_seed_same_report(model_file):
    file = model_file(2)
    settings = {"neural-cleanse": {"steps": 40}}
    options = ScanOptions(detectors=["neural-cleanse"], settings=settings, seed=5)
    one, other = (scan(file.path, file.images, file.read, options).to_json()["runs"][0] for _ in range(2))
    assert one["findings"] == other["findings"]
    assert one["detectors"][0]["evidence"] == other["detectors"][0]["evidence"]


def test_what_a_report_says_of_a_detector(scanned):
    report = scanned([Told], settings={"told": {"p_value": "0.001"}})
    (run,) = report.runs[0].detectors
    assert (run.id, run.version, run.options, run.p_value, run.note) == (
        "told",
        "2.0",
        {"p_value": 0.001},
        0.001,
        "told so",
    )
    assert run.evidence == {"count": 5, "units": [{"label": label} for label in range(5)]}
    assert (run.gradient_samples, report.cost.gradient_samples) == (50, 50)
    (finding,) = report.runs[0].findings
    assert (finding.detector, finding.target_label) == ("told", 1)
    assert code(report) is ExitCode.FOUND


@pytest.mark.parametrize(
    ("p_value", "alpha", "expected"),
    [(0.5, 0.01, ExitCode.OK), (0.02, 0.01, ExitCode.INCONCLUSIVE), (0.02, 0.05, ExitCode.FOUND)],
)
def test_alpha_decides(scanned, p_value, alpha, expected):
    assert code(scanned([Told], settings={"told": {"p_value": p_value}}, alpha=alpha)) is expected


def test_cheap_ones_first_and_only_default_ones(scanned):
    assert [run.id for run in scanned([Told, Cheap, Idle]).runs[0].detectors] == ["cheap", "told"]
    assert [run.id for run in scanned([Told, Idle], detectors=["idle", "idle"]).runs[0].detectors] == ["idle"]


def test_what_was_not_tested(scanned):
    assert scanned([Told]).runs[0].not_tested == ["the dark"]
    assert scanned([Told, Cheap]).runs[0].not_tested == ["the cold"]
    assert scanned([Cheap], labels=(0, 3)).runs[0].not_tested == ["the cold", "3 labels left out by --labels"]


@pytest.mark.parametrize("broken", [Failing, Unwilling])
@pytest.mark.parametrize("others", [[], [Told]])
def test_a_detector_that_fails_leaves_an_incomplete_report_that_never_passes(scanned, broken, others):
    report = scanned([broken, *others])
    assert not report.complete
    assert not report.runs[0].complete
    assert report.verdict is Verdict.INCONCLUSIVE
    assert code(report) is ExitCode.ERROR
    runs = {run.id: run for run in report.runs[0].detectors}
    assert ("odd" if broken is Failing else "Not on this one") in runs[broken.id].error
    assert [run.error for run in runs.values() if run.id != broken.id] == ["" for _ in others]


def test_a_proven_backdoor_outranks_a_failure(scanned):
    report = scanned([Failing, Told], settings={"told": {"p_value": 0}})
    assert (report.verdict, report.complete, code(report)) == (Verdict.BACKDOORED, False, ExitCode.FOUND)


def test_out_of_time_is_incomplete(scanned):
    report = scanned([Told], timeout=0.0)
    assert "ran out of time" in report.runs[0].detectors[0].error
    assert code(report) is ExitCode.ERROR


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0.0}, UsageError, "--alpha"),
        ({"alpha": 1.0}, UsageError, "--alpha"),
        ({"alpha": float("nan")}, UsageError, "--alpha"),
        ({"detectors": ["tol"]}, UnknownNameError, "Did you mean 'told'"),
        ({"settings": {"tolt": {}}}, UnknownNameError, "Did you mean 'told'"),
        ({"settings": {"told": {"p": 1}}}, UnknownNameError, "no option of told 'p'"),
        ({"settings": {"told": {"p_value": 2}}}, UsageError, "told.p_value = 2"),
        ({"settings": {"idle": {}}}, UsageError, "idle, which does not run"),
        ({"labels": (1, 5)}, UsageError, "--labels names 5"),
    ],
)
def test_options_that_cannot_work(scanned, options, error, message):
    with pytest.raises(error, match=message):
        scanned([Told, Idle], **options)


def test_without_any_detector(scanned):
    with pytest.raises(UnknownNameError):
        scanned([Idle])


def test_files_that_cannot_be_used(model_file, registry_of, tmp_path):
    file, registry = model_file(None), registry_of(detectors=[Told])
    with pytest.raises(ArtifactError, match="no model file"):
        scan(tmp_path / "none.pt", file.images, file.read, registry=registry)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ArtifactError, match="known format"):
        scan(tmp_path / "text.pt", file.images, file.read, registry=registry)
    large = LabelledImages(np.zeros((4, 1, 20, 20), np.uint8), np.zeros(4, np.int64), "large ones")
    with pytest.raises(ImagesError, match="large ones"):
        scan(file.path, large, file.read, registry=registry)
    wrong = LabelledImages(file.images.pixels, file.images.labels + 1, "shifted")
    with pytest.raises(ImagesError, match="label 5 does not exist"):
        scan(file.path, wrong, file.read, registry=registry)


def test_the_file_is_left_alone(model_file, registry_of):
    file = model_file(2)
    before = file.path.read_bytes()
    scan(file.path, file.images, file.read, registry=registry_of(detectors=[Told]))
    assert file.path.read_bytes() == before


def test_listeners_hear_of_everything_in_order(model_file, registry_of):
    file, registry = model_file(None), registry_of(detectors=[Told])
    heard = []
    registry.announce = lambda event, **facts: heard.append((event, sorted(facts)))
    scan(file.path, file.images, file.read, registry=registry)
    assert heard == [
        ("scan_started", ["artifact", "detectors"]),
        *[("unit_finished", ["detector", "evidence", "unit"])] * 5,
        ("scan_finished", ["report"]),
    ]


def test_an_observer_sees_progress(model_file, registry_of):
    file, seen = model_file(None), []
    scan(
        file.path,
        file.images,
        file.read,
        observer=lambda stage, part: seen.append((stage, part)),
        registry=registry_of(detectors=[Told]),
    )
    assert [part for stage, part in seen if stage == "told"] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_broken_plugin_that_was_asked_for(model_file, registry_of):
    file, registry = model_file(None), registry_of(detectors=[Told])
    registry.add(lambda: 1 / 0, "broken_one", "strange", "1")
    with pytest.raises(PluginError, match="broken-one"):
        scan(file.path, file.images, file.read, ScanOptions(detectors=["broken-one"]), registry=registry)
    assert scan(file.path, file.images, file.read, registry=registry).complete


def test_the_detectors_of_this_installation_run_by_default(model_file):
    file = model_file(None)
    quick = {"neural-cleanse": {"steps": 2}}
    report = scan(file.path, file.images, file.read, ScanOptions(settings=quick))
    expected = {plugin.id for plugin in installed().of_kind("detector") if plugin.component.default}
    assert {run.id for run in report.runs[0].detectors} == expected
