"""Charts as files, and what importing the reporters costs."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from backdoorscan.errors import OutputError
from backdoorscan.reports.album import save_figures
from backdoorscan.reports.words import ranges, visible


def test_saves_every_chart_of_a_scan(make: SimpleNamespace, tmp_path: Path) -> None:
    files = save_figures(make.scan(), tmp_path / "new" / "figures")
    assert [path.name for path in files] == [
        "neural-cleanse-trigger-sizes.png",
        "neural-cleanse-anomaly-index.png",
        "neural-cleanse-loss-curves.png",
        "neural-cleanse-sizes-curves.png",
        "neural-cleanse-predictions.png",
        "neural-cleanse-trigger-of-label-1.png",
    ]
    for path in files:
        assert np.asarray(Image.open(path).convert("L")).std() > 5


def test_saves_repairs_and_evaluations(make: SimpleNamespace, tmp_path: Path) -> None:
    assert [path.name for path in save_figures(make.repair(), tmp_path)] == ["before-after.png"]
    assert [path.name for path in save_figures(make.evaluation(), tmp_path)] == ["rates.png"]


def test_same_report_gives_the_same_files(make: SimpleNamespace, tmp_path: Path) -> None:
    first, second = (save_figures(make.repair(), tmp_path / name) for name in ("a", "b"))
    assert first[0].read_bytes() == second[0].read_bytes()


def test_names_of_files_cannot_leave_the_folder(make: SimpleNamespace, tmp_path: Path) -> None:
    report = make.scan(make.run(detectors=[make.detector(id="../../x")]))
    assert {path.parent for path in save_figures(report, tmp_path)} == {tmp_path}


def test_a_folder_that_cannot_be_written(make: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Cannot write figures"):
        save_figures(make.repair(), tmp_path / "file")


def test_drawing_leaves_the_users_settings_alone(make: SimpleNamespace, tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    save_figures(make.repair(), tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_tables_do_not_import_matplotlib() -> None:
    code = """
import sys
from backdoorscan.plugin.reporter import Terminal
from backdoorscan.registry import installed
from backdoorscan.measured import EvaluationReport, Scores
from backdoorscan.report import Cost
ids = [plugin.id for plugin in installed().of_kind("reporter")]
assert "html" in ids, ids
facts = {"path": "m", "kind": "classifier"}
report = EvaluationReport(0, {}, Cost(), facts, {"count": 1}, None, None, Scores(1.0, macro_precision=1.0))
installed().find("reporter", "table").component().render(report, Terminal())
import backdoorscan.reports.figures, backdoorscan.reports.album
print({"matplotlib", "jinja2", "PIL"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "matplotlib" not in done.stdout


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain é ×.h5", "plain é ×.h5"), ("\x1b[2J", "\\x1b[2J"), ("a\u202eb", "a\\u202eb"), ("a\nb", "a\\x0ab")],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible("a\nb", lines=True) == "a\nb"


def test_ranges() -> None:
    assert ranges([3, 1, 2, 9, 9]) == "1-3,9"
    assert ranges([]) == ""
