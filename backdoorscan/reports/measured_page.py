"""The pages of a repair and of an evaluation: networks and their measured rates."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backdoorscan.errors import ExitCode
from backdoorscan.policy import REPAIRED, repair_exit_code
from backdoorscan.report import CandidateRow, EvaluationReport, RepairReport, Report, Scores
from backdoorscan.reports import pages
from backdoorscan.reports.album import evaluation_charts, network_name, repair_charts
from backdoorscan.reports.evidence import Generic
from backdoorscan.reports.words import command, number, percent, plain

_KNOWN = {
    *("schema", "seed", "versions", "cost", "model", "images", "poisoned", "method", "options", "before", "candidates"),
    *("clean_accuracy", "attack_success_rate", "false_reject_rate", "caught_rate", "target_label"),
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
    best = _best(report)
    listings, others = _others(report)
    return MeasuredPage(
        title=f"Repair: {plain(report.model.get('path'), 80)}",
        kind=f"repair report, method {plain(report.method, 60)}",
        provenance=pages.provenance(report),
        banner=_repair_banner(report, best),
        numbers=_repair_numbers(report, best),
        heading="Before and after",
        table=_repair_table(report, best),
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
    return MeasuredPage(
        title=f"Evaluation: {plain(report.model.get('path'), 80)}",
        kind="evaluation report",
        provenance=pages.provenance(report),
        banner=pages.Banner("info", "Evaluation", plain(report.model.get("path")), [_rates(scores)]),
        numbers=[
            ("clean accuracy", percent(scores.clean_accuracy)),
            ("attack success", percent(scores.attack_success_rate)),
            ("false rejects", percent(scores.false_reject_rate)),
            ("caught", percent(scores.caught_rate)),
        ],
        heading="Rates",
        table=pages.Sheet(
            "What was measured", ("network", *_COLUMNS), [pages.Row([plain(report.model.get("kind")), *_cells(scores)])]
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


_COLUMNS = ("clean accuracy", "attack success", "false rejects", "caught")


def _cells(scores: Scores) -> list[str]:
    rates = (scores.clean_accuracy, scores.attack_success_rate, scores.false_reject_rate, scores.caught_rate)
    return [percent(rate) for rate in rates]


def _rates(scores: Scores) -> str:
    text = f"{percent(scores.clean_accuracy)} of the clean images are classified correctly"
    if scores.attack_success_rate is None:
        return text + "; the attack was not measured."
    return text + f"; the attack succeeds on {percent(scores.attack_success_rate)} of the poisoned images."


def _best(report: RepairReport) -> CandidateRow | None:
    """The network with the least attack success and lost accuracy together; ``None`` where no attack was measured."""

    def harm(row: CandidateRow) -> float:
        return (row.scores.attack_success_rate or 0.0) - row.scores.clean_accuracy

    measured = [row for row in report.candidates if row.scores.attack_success_rate is not None]
    return min(measured, key=harm, default=None)


def _repair_banner(report: RepairReport, best: CandidateRow | None) -> pages.Banner:
    path = plain(report.model.get("path"))
    if best is None:
        text = "No poisoned images were given: the table shows what the repair costs, not what it gains."
        return pages.Banner("warn", "Repaired, attack not measured", path, [text])
    left_in = repair_exit_code(report) is ExitCode.FOUND
    before = percent(report.before.attack_success_rate)
    text = (
        f"{network_name(best)} does best: attack success {before} before, "
        f"{percent(best.scores.attack_success_rate)} after; clean accuracy "
        f"{percent(report.before.clean_accuracy)} before, {percent(best.scores.clean_accuracy)} after "
        f"({_points(best.scores.clean_accuracy - report.before.clean_accuracy)})."
    )
    note = f"A network counts as repaired up to {REPAIRED:.0%} attack success."
    if left_in:
        return pages.Banner(
            "bad", "The backdoor still works", path, [text, "None of the networks written is safe. " + note]
        )
    return pages.Banner("good", "The attack is broken", path, [text, note])


def _points(change: float) -> str:
    return f"{100 * change:+.2f} points".replace("-", "−")


def _repair_numbers(report: RepairReport, best: CandidateRow | None) -> pages.Pairs:
    numbers = [
        ("clean accuracy before", percent(report.before.clean_accuracy)),
        ("attack success before", percent(report.before.attack_success_rate)),
    ]
    if best is not None:
        numbers += [
            ("clean accuracy, best", percent(best.scores.clean_accuracy)),
            ("attack success, best", percent(best.scores.attack_success_rate)),
            ("false rejects, best", percent(best.scores.false_reject_rate)),
        ]
    return [*numbers, ("networks written", str(len(report.candidates)))]


def _repair_table(report: RepairReport, best: CandidateRow | None) -> pages.Sheet:
    names = [name for name in dict.fromkeys(n for row in report.candidates for n in row.facts) if _plain(report, name)]
    rows = [pages.Row(["B, as it came", *_cells(report.before), "", *("" for _ in names)])]
    for row in report.candidates:
        change = _points(row.scores.clean_accuracy - report.before.clean_accuracy)
        facts = [plain(row.facts[name], 60) if name in row.facts else "" for name in names]
        name = network_name(row) + (" (best)" if row is best else "")
        rows.append(pages.Row([name, *_cells(row.scores), change, *facts]))
    columns = ("network", *_COLUMNS, "accuracy change", *(plain(name, 40).replace("_", " ") for name in names))
    return pages.Sheet("The network as it came, and each repaired one", columns, rows)


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
