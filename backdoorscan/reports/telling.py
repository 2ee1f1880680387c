"""What a scan came to, in sentences: the same in every format that has sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from backdoorscan.findings import Finding, Verdict
from backdoorscan.report import ModelRun, ScanReport
from backdoorscan.reports.words import percent, plain, probability

TITLES = {
    Verdict.CLEAN: "No backdoor found",
    Verdict.BACKDOORED: "Backdoored",
    Verdict.INCONCLUSIVE: "Inconclusive",
}

ACCEPTED = "accepted by the baseline"

INCOMPLETE = "The scan is incomplete: no verdict of clean is possible."


def budget(run: ModelRun, report: ScanReport) -> float:
    """The largest p-value that counts for a model."""
    return report.alpha if run.alpha is None else run.alpha


def trust_sentences(model: Mapping[str, object]) -> Iterator[str]:
    """What there is to know of a model that was read with ``--trust``; nothing of others."""
    if model.get("trusted"):
        kinds = f"from {plain(model.get('converted_from'), 40)} to {plain(model.get('converted_to'), 40)}"
        yield f"Read with --trust: converted {kinds} in a sandbox, where code from the file ran."


def finding_sentence(finding: Finding, alpha: float) -> str:
    """A finding: the label, its trigger, and the p-value beside ``alpha``, the largest that proves one; 1 for any."""
    victims = "any class" if finding.source_label is None else f"class {finding.source_label}"
    text = f"Label {finding.target_label}: "
    if finding.trigger is not None:
        text += f"a trigger of {finding.trigger.l1:.1f} pixels ({finding.trigger.area:.1%} of the image) "
        if finding.attack_success_rate is not None:
            text += f"sends {percent(finding.attack_success_rate)} of held-out images of {victims} there; "
        else:
            text += f"sends images of {victims} there; "
    elif finding.source_label is not None:
        text += f"images of {victims} are sent there; "
    text += f"p = {probability(finding.p_value)}"
    if alpha < 1:
        text += f", at most {alpha:g}: proven" if finding.p_value <= alpha else f", above {alpha:g}: not proven"
    accepted = f" It is {ACCEPTED}: {finding.suppressed}." if finding.suppressed else ""
    return f"{text} ({finding.detector}).{accepted}"


def smallest_p(run: ModelRun) -> float | None:
    """The smallest p-value of any detector by itself; ``None`` if none has an answer."""
    return min((d.p_value for d in run.detectors if d.p_value is not None), default=None)


def reasons(run: ModelRun, alpha: float) -> Iterator[str]:
    """Why a scan without findings has the verdict that it has."""
    if run.error:
        yield f"The model could not be scanned: {plain(' '.join(run.error.split()), 500)}"
    elif run.verdict is Verdict.CLEAN:
        smallest = probability(smallest_p(run))
        yield f"No finding has p up to {alpha:g}; the smallest of a detector by itself is {smallest}."
    elif not run.detectors:
        yield "No detector was run, for on the clean images the model is no better than guessing."
    elif not run.findings:
        answered = [d.id for d in run.detectors if d.p_value is not None]
        yield f"Only {', '.join(answered)} could answer." if answered else "No detector could answer."
