"""The pages of a repair and of an evaluation: networks and their measured rates."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backdoorscan.measured import CandidateRow, EvaluationReport, RepairReport, Scores
from backdoorscan.report import Report
from backdoorscan.reports import pages
from backdoorscan.reports.album import evaluation_charts, repair_charts
from backdoorscan.reports.columns import columns, true_attacks
from backdoorscan.reports.evidence import Generic
from backdoorscan.reports.outcome import Outcome, network_name, outcome, points, success
from backdoorscan.reports.telling import trust_sentences
from backdoorscan.reports.words import command, number, percent, plain

_KNOWN = {
    *("schema", "seed", "versions", "cost", "model", "images", "poisoned", "method", "options", "before", "candidates"),
    *("clean_accuracy", "macro_precision", "attack_success_rate", "successful_attacks", "unsuccessful_attacks"),
    *("false_reject_rate", "caught_rate", "reversed_success_rate", "reversed_attacks", "target_label"),
}
"""Keys of the reports that have a place of their own on the page."""


@dataclass(frozen=True, kw_only=True)
class MeasuredPage(pages.Page):
    """The page of a repair or an evaluation."""

    banner: pages.Banner
    numbers: pages.Pairs
    heading: str
    table: pages.Sheet
    measured: str
    charts: Sequence[pages.DrawnChart]
    files: Sequence[str]
    listings: Sequence[pages.Sheet]
    others: pages.Pairs
    model: pages.Pairs
    images: Sequence[tuple[str, pages.Pairs]]
    options: pages.Pairs
    command: str


def repair_page(report: RepairReport) -> MeasuredPage:
    """What the template shows of a repair."""
    result = outcome(report)
    lines = [*result.lines, *trust_sentences(report.model)]
    listings, others = _others(report)
    return MeasuredPage(
        title=f"Repair: {plain(report.model.get('path'), 80)}",
        kind=f"repair report, method {plain(report.method, 60)}",
        provenance=pages.provenance(report),
        banner=pages.Banner(result.kind, result.title, plain(report.model.get("path")), lines),
        numbers=_repair_numbers(report, result),
        heading="Before and after",
        table=_repair_table(report, result.best),
        measured=_measured(report.images, report.poisoned),
        charts=pages.drawn(repair_charts(report), "repair"),
        files=[file for row in report.candidates for file in row.files],
        listings=listings,
        others=others,
        model=pages.model_facts(report.model),
        images=_image_cards(report.images, report.poisoned),
        options=pages.option_facts(report.options),
        command=command(
            "repair",
            report.model,
            report.images,
            report.poisoned,
            [shlex.join(["--method", report.method]), f"--seed {report.seed}"],
            {report.method: report.options},
        ),
    )


def evaluation_page(report: EvaluationReport) -> MeasuredPage:
    """What the template shows of an evaluation."""
    listings, others = _others(report)
    target = report.target_label
    scores = report.scores
    shown = columns([scores])
    return MeasuredPage(
        title=f"Evaluation: {plain(report.model.get('path'), 80)}",
        kind="evaluation report",
        provenance=pages.provenance(report),
        banner=pages.Banner(
            "info", "Evaluation", plain(report.model.get("path")), [_rates(scores), *trust_sentences(report.model)]
        ),
        numbers=[
            ("clean accuracy", percent(scores.clean_accuracy)),
            ("macro precision", percent(scores.macro_precision)),
            ("true attack success", percent(scores.attack_success_rate)),
            ("false rejects", percent(scores.false_reject_rate)),
            ("caught", percent(scores.caught_rate)),
        ],
        heading="Rates",
        table=pages.Sheet(
            "What was measured",
            ("network", *shown),
            [pages.Row([plain(report.model.get("kind")), *(cell(scores) for cell in shown.values())])],
        ),
        measured=_measured(report.images, report.poisoned),
        charts=pages.drawn(evaluation_charts(report), "evaluation"),
        files=(),
        listings=listings,
        others=others,
        model=pages.model_facts(report.model),
        images=_image_cards(report.images, report.poisoned),
        options=[] if target is None else [("target label", str(target))],
        command=command(
            "evaluate",
            report.model,
            report.images,
            report.poisoned,
            [*([] if target is None else [f"--target {target}"]), f"--seed {report.seed}"],
            {},
        ),
    )


def _rates(scores: Scores) -> str:
    text = f"{percent(scores.clean_accuracy)} of the clean images are classified correctly"
    if scores.attack_success_rate is None:
        return text + "; the attack was not measured."
    rate = percent(scores.attack_success_rate)
    return text + f"; the true attack succeeds on {rate} of the poisoned images ({true_attacks(scores)})."


def _repair_numbers(report: RepairReport, result: Outcome) -> pages.Pairs:
    numbers = [("clean accuracy before", percent(report.before.clean_accuracy))]
    if result.measure:
        numbers.append((f"{result.measure} before", percent(success(report.before))))
    if result.best is not None:
        scores = result.best.scores
        numbers.append(("clean accuracy, best", percent(scores.clean_accuracy)))
        if result.measure:
            numbers.append((f"{result.measure}, best", percent(success(scores))))
        if scores.false_reject_rate is not None:
            numbers.append(("false rejects, best", percent(scores.false_reject_rate)))
    return [*numbers, ("networks written", str(len(report.candidates)))]


def _repair_table(report: RepairReport, best: CandidateRow | None) -> pages.Sheet:
    names = [name for name in dict.fromkeys(n for row in report.candidates for n in row.facts) if _plain(report, name)]
    shown = columns([report.before, *(row.scores for row in report.candidates)])
    before = [cell(report.before) for cell in shown.values()]
    rows = [pages.Row(["B, as it came", *before, "", *("" for _ in names)])]
    for row in report.candidates:
        change = points(row.scores.clean_accuracy - report.before.clean_accuracy)
        facts = [plain(row.facts[name], 60) if name in row.facts else "" for name in names]
        name = network_name(row) + (" (best)" if row is best else "")
        rows.append(pages.Row([name, *(cell(row.scores) for cell in shown.values()), change, *facts]))
    titles = ("network", *shown, "accuracy change", *(plain(name, 40).replace("_", " ") for name in names))
    return pages.Sheet("The network as it came, and each repaired one", titles, rows)


def _plain(report: RepairReport, name: str) -> bool:
    """Whether a fact fits into a cell."""
    return not any(isinstance(row.facts.get(name), Mapping | list | tuple) for row in report.candidates)


def _measured(images: Mapping[str, object], poisoned: Mapping[str, object] | None) -> str:
    text = f"Measured on {number(images.get('count'), ',')} clean images"
    if poisoned is None:
        return text + "; no poisoned images were given."
    return text + f" and {number(poisoned.get('count'), ',')} poisoned ones."


def _image_cards(
    images: Mapping[str, object], poisoned: Mapping[str, object] | None
) -> Sequence[tuple[str, pages.Pairs]]:
    cards = [("Clean images", pages.image_facts(images))]
    return cards if poisoned is None else [*cards, ("Poisoned images", pages.image_facts(poisoned))]


def _others(report: Report) -> tuple[list[pages.Sheet], pages.Pairs]:
    """Parts of the report that this page has no place for."""
    found = Generic()
    for name, value in report.to_json().items():
        if name not in _KNOWN:
            found.add(name, value)
    if isinstance(report, RepairReport):
        for row in report.candidates:
            nested = {k: v for k, v in row.facts.items() if isinstance(v, Mapping | list | tuple)}
            found.add(network_name(row), nested)
    return [pages.listing_sheet(listing) for listing in found.listings], found.pairs
