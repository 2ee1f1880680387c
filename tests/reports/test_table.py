"""Plain tables against golden files, and triggers drawn with characters.

After an intended change: ``UPDATE_GOLDEN=1 pytest tests/reports/test_table.py``, and look at the difference.
"""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from backdoorscan.findings import Finding
from backdoorscan.plugin.reporter import Terminal
from backdoorscan.reports.drawing import WIDEST, draw, place
from backdoorscan.reports.table import Table
from backdoorscan.trigger import Trigger

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("kind", ["scan", "repair", "evaluation"])
def test_plain_tables(kind: str, make: SimpleNamespace) -> None:
    text = Table().render(getattr(make, kind)(), Terminal(width=100))
    path = GOLDEN / f"{kind}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8")


def test_narrow_terminals_get_no_drawing(make: SimpleNamespace) -> None:
    assert "trigger of label" not in Table().render(make.scan(), Terminal(width=30))


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_draw_half_blocks(channels: int, make: SimpleNamespace) -> None:
    text = Table().render(make.scan(make.run(channels)), Terminal(color=True))
    assert text.count("▀") == 8 * 4
    drawn = draw(make.trigger(1, channels), color=True)
    colours = {span.style.color.triplet for span in drawn.spans} | {span.style.bgcolor.triplet for span in drawn.spans}
    assert ((255, 255, 255) if channels == 1 else (255, 0, 0)) in {tuple(colour) for colour in colours}


def test_plain_output_has_no_escape_codes_whatever_is_in_the_report(make: SimpleNamespace) -> None:
    detector = make.detector(note="\x1b[2Jnote", error="\x1b]0;title\x07")
    report = make.scan(make.run(facts={"path": "\x1b[31mred\nfake: CLEAN"}, detectors=[detector]))
    text = Table().render(report, Terminal())
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert "red\\x0afake" in text
    files = [SimpleNamespace(**vars(row) | {"files": ["\x1b[31m"]}) for row in make.repair().candidates]
    assert "\x1b" not in Table().render(make.repair(candidates=files), Terminal())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (55, 47), (1, 1), (224, 224), (7, 90)])
def test_drawings_stay_small_and_keep_single_pixels(height: int, width: int) -> None:
    mask = torch.zeros(1, height, width)
    mask[0, height // 2, width // 2] = 1
    trigger = Trigger(mask, torch.ones(3, height, width), 0)
    for color in (True, False):
        lines = draw(trigger, color).plain.splitlines()
        assert len(lines) <= WIDEST // 2
        assert max(map(len, lines)) <= WIDEST
    assert draw(trigger, color=False).plain == "@"
    assert place(trigger) == f"rows {height // 2}–{height // 2}, columns {width // 2}–{width // 2}"


def test_empty_masks() -> None:
    trigger = Trigger(torch.full((1, 4, 4), 0.01), torch.ones(1, 4, 4), 0)
    assert draw(trigger, color=False).plain == ""
    assert "thinly" in place(trigger)


def test_at_most_three_triggers_side_by_side(make: SimpleNamespace) -> None:
    findings = [
        Finding(detector="d", target_label=label, p_value=0.001, score=1.0, trigger=make.trigger(1))
        for label in range(5)
    ]
    text = Table().render(make.scan(make.run(findings=findings)), Terminal(width=200))
    assert text.count("trigger of label") == 3
