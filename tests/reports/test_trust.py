"""What reports for people say of a model that was read with ``--trust``."""

from __future__ import annotations

import html
from types import SimpleNamespace

import pytest

from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.reports.html import Html
from backdoorscan.reports.markdown import Markdown
from backdoorscan.reports.table import Table

TRUSTED = {"trusted": True, "converted_from": "pickle", "converted_to": "pt2"}
SAID = "Read with --trust: converted from pickle to pt2 in a sandbox, where code from the file ran."


@pytest.mark.parametrize("reporter", [Table, Markdown, Html])
@pytest.mark.parametrize("kind", ["scan", "repair", "evaluation"])
def test_it_is_said(reporter: type[Reporter], kind: str, make: SimpleNamespace) -> None:
    facts = make.model(kind="classifier")
    for model, expected in ((facts, 0), ({**facts, **TRUSTED}, 1)):
        report = make.scan(make.run(model=model)) if kind == "scan" else getattr(make, kind)(model=model)
        assert html.unescape(reporter().render(report, Terminal(width=200))).count(SAID) == expected


def test_the_command_that_repeats_a_run_trusts_too(make: SimpleNamespace) -> None:
    text = Markdown().render(make.scan(make.run(facts=TRUSTED)), Terminal())
    assert "backdoorscan repair model.h5 \\\n  --trust \\\n" in text
