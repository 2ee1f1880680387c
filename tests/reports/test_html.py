"""The page: complete, escaped, self-contained, the same every time, and small."""

import base64
import dataclasses
import html
import io
import itertools
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from PIL import Image

from backdoorscan.errors import ExitCode
from backdoorscan.findings import Finding, Verdict
from backdoorscan.measured import Attacks, RepairReport, Scores
from backdoorscan.plugin.reporter import Terminal
from backdoorscan.policy import repair_exit_code
from backdoorscan.report import DetectorRun, Report
from backdoorscan.reports.html import Html
from backdoorscan.reports.table import Table

VOID = {"meta", "br", "img", "link", "input", "hr"}
HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}$x^2$"


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def shown(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


def page(report: Report) -> Page:
    return Page(Html().render(report, Terminal()))


@pytest.fixture(scope="module", params=["scan", "repair", "evaluation"])
def report(request: pytest.FixtureRequest, make: SimpleNamespace) -> Report:
    return getattr(make, request.param)()


@pytest.fixture(scope="module")
def found(report: Report) -> Page:
    return page(report)


def test_is_one_well_formed_page_that_loads_nothing(found: Page) -> None:
    assert found.text.startswith("<!DOCTYPE html>")
    assert found.text.endswith("</html>\n")
    assert len(found.all("h1")) == 1
    assert found.all("html") == [{"lang": "en"}]
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in found.tags}
    for tag, attrs in found.tags:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert attrs.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attrs)
    assert not re.search(r"url\((?!#)|@import", found.text)
    assert "default-src 'none'" in found.text


def test_is_accessible(found: Page) -> None:
    assert all(attrs["alt"] for attrs in found.all("img"))
    pictures = [attrs for attrs in found.all("svg") if "aria-hidden" not in attrs]
    assert pictures
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in pictures)
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(found.all("caption")) == len(found.all("table"))
    assert all("scope" in attrs for attrs in found.all("th"))
    identifiers = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))


def test_same_report_gives_the_same_bytes(report: Report, found: Page) -> None:
    assert found.text == Html().render(report, Terminal(width=20, color=True))


def test_light_and_dark_take_the_same_charts(found: Page) -> None:
    text = found.text
    assert "prefers-color-scheme: dark" in text
    charts = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--ink)" in charts
    colours = set(re.findall(r"#[0-9a-f]{6}\b", charts))
    assert colours <= {"#fefefe"}, colours


def test_scan_shows_verdict_evidence_and_how_to_repeat(make: SimpleNamespace) -> None:
    shown = page(make.scan()).shown
    for words in (
        "Backdoored",
        "Label 1: a trigger of 4.0 pixels (6.2% of the image) sends 99.00% of held-out images of any class there",
        "p = 0.0004, at most 0.01: proven",
        "Not tested: all-to-all backdoors.",
        "Size of the smallest trigger of each label",
        "2: the paper's threshold",
        "Trigger size over the search",
        "Predictions with each label's trigger stamped",
        "no trigger found",
        "ab" * 32,
        "stamped on sample",
        "torch 2.13.0",
    ):
        assert words in shown, words
    assert "backdoorscan scan model.h5 \\ --valid clean.h5 \\ --limit 380 \\ -d neural-cleanse" in shown
    assert "-O neural-cleanse.steps=150" in shown


def test_verdicts_are_told_apart(make: SimpleNamespace) -> None:
    clean = make.run(verdict=Verdict.CLEAN, findings=[], detectors=[make.detector(p_value=0.34)])
    assert "No backdoor found" in page(make.scan(clean, verdict=Verdict.CLEAN)).shown
    unclear = make.run(verdict=Verdict.INCONCLUSIVE, findings=[], complete=False)
    shown = page(make.scan(unclear, verdict=Verdict.INCONCLUSIVE)).shown
    assert "Inconclusive" in shown
    assert "no verdict of clean is possible" in shown


def test_several_models_share_a_page(make: SimpleNamespace) -> None:
    clean = make.run(facts={"path": "other.h5"}, verdict=Verdict.CLEAN, findings=[])
    found = page(make.scan(make.run(), clean))
    assert "No backdoor found: other.h5" in found.shown
    assert {"model-1", "model-2"} <= {attrs.get("id") for attrs in found.all("article")}


@pytest.mark.parametrize("channels", [1, 3])
def test_triggers_are_pictures_of_the_right_colours(channels: int, make: SimpleNamespace) -> None:
    found = page(make.scan(make.run(channels)))
    sources = {attrs["alt"]: attrs["src"] for attrs in found.all("img")}
    opened = {alt: Image.open(io.BytesIO(base64.b64decode(src.split(",")[1]))) for alt, src in sources.items()}
    stamped = opened["The trigger of label 1 stamped on a sample image"]
    assert stamped.size == (128, 128)
    assert stamped.getpixel((0, 0)) == (200, 200, 200)
    assert stamped.getpixel((6 * 16, 6 * 16)) == ((255, 255, 255) if channels == 1 else (255, 0, 0))
    assert opened["Pattern times mask of label 1"].getpixel((0, 0))[3] == 0
    assert opened["Mask of label 1"].getpixel((6 * 16, 6 * 16)) == (255, 255, 255)


@pytest.mark.parametrize(
    "sample",
    [
        None,
        "text",
        [{"shape": [1, 8, 8], "uint8": "!"}],
        [{"shape": [1, 8, 8], "uint8": "eJwDAAAAAAE="}],
        [{"shape": [10**6, 10**6, 3], "uint8": ""}],
        [{"shape": [3, 4, 4], "uint8": "eJxjYBgFAAAwAAE="}],
    ],
)
def test_without_a_usable_sample_triggers_are_stamped_on_grey(sample: object, make: SimpleNamespace) -> None:
    shown = page(make.scan(make.run(images=make.images(sample=sample)))).shown
    assert "stamped on grey" in shown
    assert "mid-grey" in shown


def test_repair_names_the_best_network_and_the_cost(make: SimpleNamespace) -> None:
    shown = page(make.repair()).shown
    assert "The attack is broken" in shown
    assert "B′ X=2 does best: true attack success 99.71% before, 0.60% after" in shown
    assert "338 of 339" in shown
    assert "94.37%" in shown
    assert "−4.74 points" in shown
    assert "out/model_X=2.goodnet.onnx" in shown
    assert "--method prune" in shown
    assert "The backdoor still works" in page(make.repair(after=0.9)).shown
    assert "attack not measured" in page(make.repair(after=None)).shown


def test_a_repair_measured_by_reversed_triggers_alone_says_so(make: SimpleNamespace) -> None:
    report = make.repair(after=None)

    def with_reversed(after: float, hits: int) -> RepairReport:
        def changed(scores: Scores, rate: float, successful: int) -> Scores:
            return dataclasses.replace(
                scores, reversed_success_rate=rate, reversed_attacks=Attacks(successful, 4_000 - successful)
            )

        rows = [dataclasses.replace(row, scores=changed(row.scores, after, hits)) for row in report.candidates]
        return dataclasses.replace(report, before=changed(report.before, 0.985, 3_921), candidates=rows)

    shown = page(with_reversed(0.004, 12)).shown
    assert "The reversed triggers no longer work" in shown
    assert "success of the reversed triggers 98.50% before, 0.40% after" in shown
    assert "12 of 4,000" in shown
    assert "true attack" not in shown.replace("the success of true attacks and of", "")  # what the chart says
    text = Table().render(with_reversed(0.5, 1_900), Terminal(width=200))
    assert "The reversed triggers still work" in text
    assert (
        "attacks of the reversed triggers, as they are, that succeed: B 3,921 of 4,000, B′ X=2 1,900 of 4,000" in text
    )
    assert "true attack " not in text


@pytest.mark.parametrize(
    ("after", "changes", "title"),
    [
        (0.006, {"verdict": Verdict.BACKDOORED}, "The second scan finds a backdoor"),
        (None, {"verdict": Verdict.BACKDOORED}, "The second scan finds a backdoor"),
        (0.006, {"within_budget": False}, "The repair costs more than the budget"),
        (0.9, {"within_budget": False}, "The backdoor still works"),
    ],
)
def test_why_a_repair_fails(after: float | None, changes: dict[str, object], title: str, make: SimpleNamespace) -> None:
    report = make.repair(after=after)
    failed = dataclasses.replace(report, candidates=[dataclasses.replace(row, **changes) for row in report.candidates])
    assert repair_exit_code(failed) is ExitCode.FOUND
    assert title in page(failed).shown
    assert title in Table().render(failed, Terminal())


def test_the_best_network_is_one_that_passes(make: SimpleNamespace) -> None:
    report = make.repair()
    first, second = report.candidates
    changed = [dataclasses.replace(first, verdict=Verdict.BACKDOORED), second]
    assert "GoodNet X=2 does best" in page(dataclasses.replace(report, candidates=changed)).shown


def test_facts_that_only_some_candidates_have(make: SimpleNamespace) -> None:
    report = make.repair()
    extended = dataclasses.replace(report.candidates[0], facts={"rounds": 3, "per_class_drop": {"0": 0.1, "1": 0.2}})
    shown = page(dataclasses.replace(report, candidates=[extended, report.candidates[1]])).shown
    assert "rounds" in shown
    assert "per_class_drop.0" in shown


def test_evaluation(make: SimpleNamespace) -> None:
    shown = page(make.evaluation()).shown
    assert "92.89% of the clean images are classified correctly" in shown
    assert "the true attack succeeds on 0.60% of the poisoned images (2 of 339)" in shown
    assert "backdoorscan evaluate model.h5" in shown
    assert "--target 1" in shown


def test_evidence_of_unknown_detectors_is_shown(make: SimpleNamespace) -> None:
    units = [
        {"layer": "conv1", "score": 0.25, "inner": [{"channel": 3, "gap": 0.5}]},
        {"layer": "conv2", "score": float("nan"), "inner": [{"channel": 9, "gap": None}]},
    ]
    evidence = {"entropy": {"mean": 1.25}, "list": list(range(50)), "odd": {1: [[1], [2]]}, "units": units, "none": []}
    other = DetectorRun(id="strip", version="3", options={"overlays": (1, 2)}, evidence=evidence, note="Only two.")
    broken = DetectorRun(id="broken", version="1", options={}, error="It needs more.")
    shown = page(make.scan(make.run(detectors=[other, broken]))).shown
    for words in ("entropy.mean 1.25", "conv2", "units.inner", "50 in all", "Only two.", "Failed: It needs more."):
        assert words in shown, words


@pytest.mark.parametrize(
    "row",
    [
        {"label": HOSTILE, "l1": 1.0},
        {"label": 1, "l1": None},
        {"label": True, "l1": 1},
        {"label": 2, "l1": 3.0, "curves": None, "predictions": {HOSTILE: 1}, "steps": HOSTILE},
        {"label": 2, "l1": 3.0, "curves": {"loss": [None, "x"], "l1": [0.0]}, "predictions": {"2": None}},
        HOSTILE,
        None,
    ],
)
def test_odd_evidence_does_no_harm(row: object, make: SimpleNamespace) -> None:
    evidence = {"anomaly_index": [1], "median_l1": HOSTILE, "units": [{"labels": [row]}]}
    found = page(make.scan(make.run(detectors=[make.detector(evidence=evidence)])))
    assert not found.all("script")


def test_hostile_text_is_escaped_everywhere(make: SimpleNamespace) -> None:
    detector = make.detector(
        id=HOSTILE,
        version=HOSTILE,
        note=HOSTILE,
        error=HOSTILE,
        options={HOSTILE: HOSTILE},
        evidence={HOSTILE: HOSTILE, "rows": [{HOSTILE: HOSTILE}], **make.detector().evidence},
    )
    finding = Finding(detector=HOSTILE, target_label=1, p_value=0.001, score=1.0, trigger=make.trigger(1))
    run = make.run(
        facts={"path": HOSTILE, "format": HOSTILE, HOSTILE: HOSTILE, "arch": HOSTILE},
        images=make.images(path=HOSTILE),
        findings=[finding],
        detectors=[detector],
        not_tested=[HOSTILE],
    )
    candidates = [dataclasses.replace(row, name=HOSTILE, files=[HOSTILE]) for row in make.repair().candidates]
    repair = make.repair(candidates=candidates, method=HOSTILE, options={HOSTILE: HOSTILE})
    evaluation = make.evaluation(model=make.model(kind=HOSTILE, path=HOSTILE))
    for report in (make.scan(run, versions={HOSTILE: HOSTILE}), repair, evaluation):
        found = page(report)
        assert not found.all("script")
        assert all(attrs["src"].startswith("data:image/png") for attrs in found.all("img"))
        assert not [attrs for _, attrs in found.tags if "onerror" in attrs]
        assert "{{ 7*7 }}" in found.text
        assert html.escape("<script>") in found.text


def test_invisible_characters_are_made_visible(make: SimpleNamespace) -> None:
    text = page(make.scan(make.run(facts={"path": "a\u202eb\x1b[31m\ud800c.h5"}))).text
    assert "a\\u202eb\\x1b[31m\\ud800c.h5" in text
    text.encode()


def test_many_labels_stay_small(make: SimpleNamespace) -> None:
    found = page(make.scan(make.run(3, 1283)))
    assert len(found.text.encode()) < 1_500_000
    assert "the 40 smallest of 1,283" in found.shown
    assert "▶ label 1" in found.shown


def test_large_triggers_do_not_swell_the_page(make: SimpleNamespace) -> None:
    import torch

    from backdoorscan.trigger import Trigger

    torch.manual_seed(0)
    triggers = [Trigger(torch.rand(1, 300, 300), torch.rand(3, 300, 300), label) for label in range(5, 12)]
    found = page(make.scan(make.run(3, 12, detectors=[make.detector(3, 12, triggers=triggers)])))
    assert len(found.text.encode()) < 5_000_000
    assert "more triggers are in the JSON report" in found.shown


def test_unknown_kinds_of_report_are_refused() -> None:
    with pytest.raises(TypeError, match="no page for object"):
        Html().render(object(), Terminal())  # type: ignore[arg-type]
