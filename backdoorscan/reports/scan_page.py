"""The page of a scan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from backdoorscan.findings import Verdict
from backdoorscan.report import DetectorRun, ModelRun, ScanReport
from backdoorscan.reports import evidence, pages, pictures
from backdoorscan.reports.album import label_charts
from backdoorscan.reports.telling import INCOMPLETE, TITLES, finding_sentence, reasons, smallest_p, trust_sentences
from backdoorscan.reports.words import command, number, percent, plain, probability, ranges
from backdoorscan.trigger import Trigger

_TONES = {Verdict.CLEAN: "good", Verdict.BACKDOORED: "bad", Verdict.INCONCLUSIVE: "warn"}

_PICTURE_BYTES = 1_500_000
"""Of trigger pictures on a page: beyond it triggers are left out, and the page says so."""


@dataclass(frozen=True)
class Picture:
    """A picture in the gallery; ``through`` says that one can see through it."""

    source: str
    caption: str
    alt: str
    through: bool = False


@dataclass(frozen=True)
class TriggerCard:
    """A trigger in the gallery."""

    title: str
    text: str
    pictures: Sequence[Picture]
    flagged: bool


@dataclass(frozen=True)
class DetectorView:
    """A detector's section."""

    title: str
    error: str
    note: str
    charts: Sequence[pages.DrawnChart]
    labels: pages.Sheet
    figures: pages.Pairs
    listings: Sequence[pages.Sheet]
    options: pages.Pairs


@dataclass(frozen=True)
class RunView:
    """A model's part of the page."""

    banner: pages.Banner
    numbers: pages.Pairs
    findings: pages.Sheet
    p_note: str
    triggers: Sequence[TriggerCard]
    trigger_note: str
    triggers_left_out: str
    detectors: Sequence[DetectorView]
    model: pages.Pairs
    images: pages.Pairs
    command: str


@dataclass(frozen=True, kw_only=True)
class ScanPage(pages.Page):
    """The page of a scan."""

    overall: pages.Banner
    runs: Sequence[RunView]


def scan_page(report: ScanReport) -> ScanPage:
    """What the template shows of a scan."""
    title = TITLES[report.verdict]
    paths = ", ".join(str(run.model.get("path")) for run in report.runs)
    return ScanPage(
        title=f"{title}: {plain(paths, 80)}",
        kind="scan report",
        provenance=pages.provenance(report, _decided(report)),
        overall=pages.Banner(_TONES[report.verdict], title, ""),
        runs=[_run_view(run, report, position) for position, run in enumerate(report.runs, start=1)],
    )


def _decided(report: ScanReport) -> pages.Pairs:
    budget = [("false-alarm budget per model", f"{report.alpha:g}")]
    return [*budget, ("answered from", "the cache")] if report.cached else budget


def _run_view(run: ModelRun, report: ScanReport, position: int) -> RunView:
    cards, left_out = _gallery(run, _PICTURE_BYTES // len(report.runs))
    shape = _trigger_shape(run)
    sampled = shape is not None and bool(pictures.samples(run.images, shape))
    base = "an image of the clean set" if sampled else "a mid-grey image: the report carries no sample"
    return RunView(
        banner=_banner(run, report.alpha),
        numbers=_numbers(run, report.alpha),
        findings=_findings(run),
        p_note=f"p-value: the probability that a clean model gives evidence this strong, over all labels examined. "
        f"A finding counts up to {report.alpha:g}.",
        triggers=cards,
        trigger_note="Reversed from the model: the pattern where the mask lets it through (checkered where it does "
        f"not), the mask (white replaces the pixel), and the trigger on {base}.",
        triggers_left_out=f"{left_out} more triggers are in the JSON report." if left_out else "",
        detectors=[_detector_view(detector, run, position) for detector in run.detectors],
        model=pages.model_facts(run.model),
        images=[*pages.image_facts(run.images), ("clean accuracy", percent(run.clean_accuracy))],
        command=_command(run, report),
    )


def _banner(run: ModelRun, alpha: float) -> pages.Banner:
    sentences = [finding_sentence(finding, alpha) for finding in run.findings[:3]]
    if len(run.findings) > 3:
        sentences.append(f"{len(run.findings) - 3} more labels are listed below.")
    sentences += [*reasons(run, alpha), *trust_sentences(run.model)]
    sentences += [f"Note: {note}." for note in run.notes]
    if run.not_tested:
        sentences.append("Not tested: " + ", ".join(run.not_tested) + ".")
    if not run.complete:
        sentences.append(INCOMPLETE)
    return pages.Banner(_TONES[run.verdict], TITLES[run.verdict], plain(run.model.get("path")), sentences)


def _numbers(run: ModelRun, alpha: float) -> pages.Pairs:
    labels = ranges([finding.target_label for finding in run.findings])
    return [
        ("suspected labels", labels or "none"),
        ("smallest p-value", probability(smallest_p(run))),
        ("counts up to", f"{alpha:g}"),
        ("clean accuracy", percent(run.clean_accuracy)),
        ("classes", plain(run.model.get("num_classes"))),
        ("elapsed", f"{run.cost.wall_seconds:,.1f} s"),
    ]


def _findings(run: ModelRun) -> pages.Sheet:
    columns = ("target label", "source", "detector", "p-value", "score", "trigger L1", "area", "success")
    rows = [
        (
            str(finding.target_label),
            "any" if finding.source_label is None else str(finding.source_label),
            finding.detector,
            probability(finding.p_value),
            number(finding.score, ".2f"),
            "–" if finding.trigger is None else f"{finding.trigger.l1:.1f} px",
            "–" if finding.trigger is None else f"{finding.trigger.area:.1%}",
            percent(finding.attack_success_rate),
        )
        for finding in run.findings[: evidence.SHOWN]
    ]
    part = f", the first {len(rows)} of {len(run.findings)}" if len(rows) < len(run.findings) else ""
    return pages.Sheet(f"Suspected backdoors, most suspicious first{part}", columns, [pages.Row(row) for row in rows])


def _detector_view(detector: DetectorRun, run: ModelRun, position: int) -> DetectorView:
    rows = evidence.label_rows(detector, run.findings)
    rest = evidence.generic(detector, bool(rows))
    facts = [
        ("version", detector.version),
        ("smallest p-value", probability(detector.p_value)),
        ("gradient samples", f"{detector.gradient_samples:,}"),
        ("elapsed", f"{detector.seconds:,.1f} s"),
    ]
    return DetectorView(
        title=detector.id,
        error=f"Failed: {detector.error}" if detector.error else "",
        note=detector.note,
        charts=pages.drawn(label_charts(detector, run.findings), pages.owner_name("m", position, detector.id)),
        labels=_label_sheet(rows),
        figures=[*facts, *((name.replace("_", " "), value) for name, value in rest.pairs)],
        listings=[pages.listing_sheet(listing) for listing in rest.listings],
        options=pages.option_facts(detector.options),
    )


def _label_sheet(every: Sequence[evidence.LabelRow]) -> pages.Sheet:
    rows = evidence.shown_rows(every)
    columns = ("label", "trigger L1", "success", "anomaly index", "deviation of predictions", "steps")
    caption = "Smallest trigger first; flagged labels are marked ▶"
    if len(rows) < len(every):
        caption += f"; the {len(rows)} smallest of {len(every):,}, all are in the JSON report"
    return pages.Sheet(caption, columns, [pages.Row(_label_cells(row), row.flagged) for row in rows])


def _label_cells(row: evidence.LabelRow) -> list[str]:
    return [
        f"▶ {row.label}" if row.flagged else str(row.label),
        f"{row.l1:.1f} px" if row.succeeded else "none found",
        percent(row.attack_success_rate),
        number(row.anomaly_index, ".2f"),
        number(row.prediction_deviation, ".2f"),
        plain(row.steps),
    ]


def _trigger_shape(run: ModelRun) -> tuple[int, ...] | None:
    found = chain((f.trigger for f in run.findings), (t for d in run.detectors for t in d.triggers))
    return next((tuple(trigger.pattern.shape) for trigger in found if trigger is not None), None)


def _gallery(run: ModelRun, budget: int) -> tuple[list[TriggerCard], int]:
    """The flagged triggers and the smallest others, as many as the page can carry, and how many are left out."""
    cards: list[TriggerCard] = []
    left_out = 0
    for trigger, title, text, flagged in _triggers(run):
        card = TriggerCard(title, text, list(_pictures(trigger, run.images, flagged)), flagged) if budget > 0 else None
        budget -= sum(len(picture.source) for picture in card.pictures) if card else 0
        if card and budget >= 0:
            cards.append(card)
        else:
            left_out += 1
    return cards, left_out


def _triggers(run: ModelRun) -> Iterator[tuple[Trigger, str, str, bool]]:
    suspected = {(finding.detector, finding.target_label) for finding in run.findings}
    for finding in run.findings:
        if finding.trigger is not None:
            text = f"{finding.detector}, flagged with p = {probability(finding.p_value)}; " + _size(finding.trigger)
            if finding.attack_success_rate is not None:
                text += f", {percent(finding.attack_success_rate)} success"
            yield finding.trigger, f"Label {finding.target_label}", text, True
    for detector in run.detectors:
        useless = {row.label for row in evidence.label_rows(detector, run.findings) if not row.succeeded}
        for trigger in detector.triggers:
            if (detector.id, trigger.target) not in suspected:
                text = f"{detector.id}; {_size(trigger)}" + ("; it does not work" if trigger.target in useless else "")
                name = f"Label {trigger.target}" if trigger.target >= 0 else "All labels"
                yield trigger, name, text, False


def _size(trigger: Trigger) -> str:
    return f"{trigger.l1:.1f} pixels, {trigger.area:.1%} of the image"


def _pictures(trigger: Trigger, images: Mapping[str, object] | None, flagged: bool) -> Iterator[Picture]:
    shape = tuple(trigger.pattern.shape)
    which = f"of label {trigger.target}"
    yield Picture(
        pictures.data_uri(pictures.trigger_pixels(trigger)), "pattern × mask", f"Pattern times mask {which}", True
    )
    yield Picture(pictures.data_uri(pictures.mask_pixels(trigger)), "mask", f"Mask {which}")
    bases: list[tuple[npt.NDArray[np.float32], str]] = [(s, "sample") for s in pictures.samples(images, shape)]
    for base, name in (bases or [(pictures.grey(shape), "grey")])[: 4 if flagged else 1]:
        stamped = pictures.data_uri(pictures.stamped_pixels(trigger, base))
        if flagged and name == "sample":
            yield Picture(pictures.data_uri(pictures.as_pixels(base)), "clean sample", "A clean sample image")
        yield Picture(stamped, f"stamped on {name}", f"The trigger {which} stamped on a {name} image")


def _command(run: ModelRun, report: ScanReport) -> str:
    flags = [f"--alpha {report.alpha:g}", f"--seed {report.seed}"]
    labels = sorted({label for detector in run.detectors for label in evidence.examined(detector)})
    if labels and any("--labels" in text for text in run.not_tested):
        flags.append(f"--labels {ranges(labels)}")
    settings = {detector.id: detector.options for detector in run.detectors}
    return command("scan", run.model, run.images, None, [*_chosen(run), *flags], settings)


def _chosen(run: ModelRun) -> list[str]:
    import shlex

    return [shlex.join(["-d", detector.id]) for detector in run.detectors]
