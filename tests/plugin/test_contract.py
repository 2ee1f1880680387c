"""The check of output formats: the project's own pass it, and each kind of fault is told."""

import pytest

from backdoorscan.errors import UsageError
from backdoorscan.measured import EvaluationReport, RepairReport
from backdoorscan.plugin.reporter import Reporter
from backdoorscan.plugin.testing import ContractError, check_reporter, sample_reports, success_rate
from backdoorscan.registry import installed
from backdoorscan.report import Report, ScanReport

REPORTERS = [plugin.component for plugin in installed().of_kind("reporter")]


class Fine(Reporter):
    """The kind of report."""

    id = "fine"
    summary = "The kind of report."

    def render(self, report, terminal):
        return f"{report.schema}\n"


class Misnamed(Fine):
    id = "Not Fine"


class Unsaid(Fine):
    summary = ""


class Endless(Fine):
    def render(self, report, terminal):
        return report.schema


class Printing(Fine):
    def render(self, report, terminal):
        print("rendering")
        return "\n"


class Counting(Fine):
    calls = 0

    def render(self, report, terminal):
        Counting.calls += 1
        return f"{self.calls}\n"


class Changing(Fine):
    def render(self, report, terminal):
        if isinstance(report, ScanReport):
            report.runs[0].model["path"] = "changed"
        return "\n"


class Leaking(Fine):
    refuses = (RepairReport, EvaluationReport)

    def render(self, report, terminal):
        return report.runs[0].model["path"] + "\n"


class Undeclared(Fine):
    def render(self, report, terminal):
        if isinstance(report, RepairReport):
            raise UsageError("No place for repairs.")
        return "\n"


class Refusing(Fine):
    refuses = (Report,)


@pytest.mark.parametrize("component", [Fine, *REPORTERS], ids=lambda component: component.id)
def test_keeps_the_contract(component):
    check_reporter(component)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (int, "int is no Reporter"),
        (Misnamed, "'Not Fine' is not in kebab-case"),
        (Unsaid, "summary = '' is not one line"),
        (Endless, "End in a newline"),
        (Printing, "prints 'rendering"),
        (Counting, "says something else a second time"),
        (Changing, "changed a ScanReport"),
        (Leaking, "escape codes"),
        (Undeclared, r"RepairReport raises: No place for repairs.*`refuses`"),
        (Refusing, "refuses every kind"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_fault_is_told(component, message):
    with pytest.raises(ContractError, match=message):
        check_reporter(component)


def test_the_samples_are_of_every_kind_and_survive_json():
    reports = sample_reports()
    assert {type(report) for report in reports} == {ScanReport, RepairReport, EvaluationReport}
    for report in reports:
        assert type(report).from_json(report.to_json()).to_json() == report.to_json()


def test_success_of_a_trigger(triple):
    classifier, images, trigger = triple(2)
    assert success_rate(classifier, images, trigger) == 1
    twin, _, _ = triple(None)
    assert success_rate(twin, images, trigger) == 0
    assert success_rate(classifier, images.take((images.labels == 2).nonzero()[0]), trigger) == 0
