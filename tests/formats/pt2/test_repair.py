"""A .pt2 file is repaired, and its GoodNet written, in its own format."""

from __future__ import annotations

from pathlib import Path

import torch
from backdoorscan_plugins import fine_pruning

from backdoorscan.evaluating import evaluate
from backdoorscan.formats.pt2 import loader
from backdoorscan.formats.pt2.export import export
from backdoorscan.plugin import hookspecs
from backdoorscan.plugin.testing import planted
from backdoorscan.registry import Registry
from backdoorscan.repairing import RepairOptions, repair


def test_a_repair_in_the_files_own_format(tmp_path):
    classifier, images, _ = planted(2, classes=5, blocks=3, count=60)
    path = tmp_path / "net.pt2"
    path.write_bytes(export(classifier.network, torch.rand(2, *classifier.input_shape)))
    registry = Registry()
    registry.manager.add_hookspecs(hookspecs)
    registry.add(lambda: loader, "pt2", "core", "1")
    registry.add(lambda: fine_pruning, "fine_pruning", "core", "1")
    options = RepairOptions(
        settings={"channels": [1]}, goodnet=True, goodnet_format="pt2", output=tmp_path / "out", rescan=False
    )
    report = repair(path, images, None, None, options, findings=[], registry=registry)
    assert report.model["format"] == "pt2"
    written = [Path(file).name for row in report.candidates for file in row.files]
    assert written == ["net_channels=1.pt2", "net_channels=1.goodnet.pt2"]
    measured = evaluate(tmp_path / "out" / written[1], images)
    assert (measured.model["kind"], measured.model["format"]) == ("goodnet", "goodnet-pt2")
    assert measured.scores.clean_accuracy == report.candidates[1].scores.clean_accuracy
