"""The verb *scan* on small files."""

import json
import re
from dataclasses import dataclass, replace
from unittest.mock import ANY

import numpy as np
import pytest
import torch

from backdoorscan import policy, scan, scanning
from backdoorscan.classifier import Classifier
from backdoorscan.costing import Forecast, forecast
from backdoorscan.engine.keeping import Keeping
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
from backdoorscan.formats.loading import load_model
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import option
from backdoorscan.plugin.reporter import Terminal
from backdoorscan.registry import installed
from backdoorscan.report import ScanReport
from backdoorscan.reports.markdown import Markdown
from backdoorscan.reports.table import Table
from backdoorscan.scanning import ScanOptions, plan_detectors


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


def untrained(file):
    """The file with weights drawn at random, and how its images are fed pinned."""
    random = torch.Generator().manual_seed(0)
    state = torch.load(file.path, weights_only=True)
    drawn = {name: torch.randn(tensor.shape, generator=random) for name, tensor in state.items()}
    torch.save(drawn, file.path)
    return replace(file, read=replace(file.read, input_range=(0.0, 1.0)))


def test_an_untrained_network_is_inconclusive_whatever_detectors_would_say(model_file, registry_of):
    file = untrained(model_file(None))
    options = ScanOptions(settings={"told": {"p_value": 0}})
    heard = []
    report = scanning.scan(
        file.path, file.images, file.read, options, registry=registry_of(detectors=[Told]), foretold=heard.append
    )
    (run,) = report.runs
    assert heard == []
    assert (report.verdict, report.complete, code(report)) == (Verdict.INCONCLUSIVE, True, ExitCode.INCONCLUSIVE)
    assert policy.gate([(run, policy.DEFAULT_FAIL_ON)]) is ExitCode.INCONCLUSIVE
    assert (run.findings, run.detectors, run.not_tested) == ([], [], ["the dark"])
    assert "no better than guessing" in run.notes[0] and "60 images" in run.notes[0]
    assert run.clean_accuracy < 0.4
    for reporter in (Table(), Markdown()):
        text = " ".join(reporter.render(report, Terminal()).split())
        assert "No detector was run" in text and run.notes[0] in text


def test_one_image_proves_nothing_of_a_network(model_file, registry_of):
    file = untrained(model_file(None))
    options = ScanOptions(settings={"told": {"p_value": 0}})
    one = file.images.take(np.arange(1))
    report = scan(file.path, one, file.read, options, registry=registry_of(detectors=[Told]))
    assert report.verdict is Verdict.BACKDOORED


class TestForecast:
    """What is told before the work."""

    @pytest.fixture
    def told(self, model_file, registry_of):
        """The forecasts of a scan."""

        def run(classes, keeping=None, **options) -> list[Forecast]:
            file, heard = model_file(None), []
            registry = registry_of(detectors=classes)
            scanning.scan(
                file.path,
                file.images,
                file.read,
                ScanOptions(**options),
                registry=registry,
                keeping=keeping,
                foretold=heard.append,
            )
            return heard

        return run

    def test_of_the_default_scan(self, told):
        (forecast,) = told([Told], jobs=2)
        assert (forecast.gradient_samples, forecast.jobs, forecast.at_most) == (46_000, 2, False)
        assert forecast.seconds > 0
        assert re.fullmatch(r"about \d+ (s|min|h): 46,000 gradient samples on 2 threads", str(forecast))

    def test_of_a_part_of_it(self, told):
        (forecast,) = told([Told, Cheap], detectors=["cheap"], labels=(1, 2))
        assert str(forecast).startswith("at most about ")
        assert forecast.gradient_samples == 40_000

    @pytest.mark.parametrize("options", [{"detectors": ["idle"]}, {"settings": {"told": {"p_value": 0.5}}}])
    def test_of_other_methods_and_options_nothing_is_known(self, told, options):
        assert told([Told, Idle], **options) == []

    def test_a_scan_that_goes_on_is_shorter_by_nobody_knows_what(self, told, tmp_path):
        assert told([Told], keeping=Keeping(tmp_path, reports=False, resume=True)) == []

    def test_it_changes_nothing(self, model_file, registry_of):
        file = model_file(2)
        loaded = load_model(file.path, file.images, file.read)
        before = {name: value.clone() for name, value in loaded.classifier.state_dict().items()}
        state = torch.random.get_rng_state()
        usual = [detector for _, detector in plan_detectors(ScanOptions(), registry_of(detectors=[Told]))]
        assert forecast(loaded.classifier, usual, usual, 5, 1) is not None
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in loaded.classifier.parameters())
        assert all(torch.equal(value, before[name]) for name, value in loaded.classifier.state_dict().items())

    def test_many_labels_cost_no_more_than_a_shortlist(self, model_file):
        file = model_file(None)
        classifier = load_model(file.path, file.images, file.read).classifier
        assert forecast(classifier, [], [], 65, 1) == replace(forecast(classifier, [], [], 5000, 1), seconds=ANY)

    def test_a_network_without_gradients(self):
        class Steps(torch.nn.Module):
            def forward(self, images):
                return torch.nn.functional.one_hot(images.flatten(1).argmax(1), 4).float()

        assert forecast(Classifier(Steps(), input_shape=(1, 2, 2), num_classes=4), [], [], 4, 1) is None
