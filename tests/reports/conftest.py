"""Reports made up from their parts, the same on every machine."""

import base64
import math
import zlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backdoorscan.findings import Finding, Severity, Verdict
from backdoorscan.measured import CandidateRow, EvaluationReport, RepairReport, Scores
from backdoorscan.report import Cost, DetectorRun, ModelRun, ScanReport
from backdoorscan.trigger import Trigger

COST = Cost(gradient_samples=16_088, wall_seconds=2.2, cpu_seconds=1.5, peak_memory_mb=467.0)
VERSIONS = {"backdoorscan": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6"}
TARGET = 1


def model(channels: int = 1, classes: int = 4, **changes: object) -> dict[str, Any]:
    facts = {
        "path": "model.h5",
        "sha256": "ab" * 32,
        "format": "keras-h5",
        "input_shape": [channels, 8, 8],
        "num_classes": classes,
        "input_range": [0, 1],
        "mean": [],
        "std": [],
        "layout": "NHWC",
        "parameters": 18_002,
        "framework": "keras",
        "input_range_found": True,
        "input_ranges_tried": {"0..1": 0.98, "0..255": 0.83},
    }
    return {**facts, **changes}


def images(**changes: object) -> dict[str, Any]:
    return {"path": "clean.h5", "sha256": "cd" * 32, "count": 380, **changes}


def packed(channels: int, value: int) -> dict[str, Any]:
    """A sample image of one colour."""
    data = bytes([value]) * (channels * 64)
    return {"shape": [channels, 8, 8], "uint8": base64.b64encode(zlib.compress(data)).decode()}


def trigger(target: int, channels: int = 1) -> Trigger:
    """A white square in the lower right corner; a larger one for other labels than the target."""
    mask = torch.zeros(1, 8, 8)
    if target == TARGET:
        mask[:, 5:7, 5:7] = 1
    else:
        mask[:, 1:7, 1:7] = 0.5
    pattern = torch.ones(channels, 8, 8)
    pattern[1:] = 0
    return Trigger(mask, pattern, target)


def label_row(label: int, l1: float, classes: int, steps: int = 30) -> dict[str, Any]:
    return {
        "label": label,
        "l1": l1,
        "succeeded": label != 3,
        "attack_success_rate": 0.31 if label == 3 else 0.99,
        "prediction_deviation": 0.01 + 0.1 * (label % 7),
        "predictions": {str(label): 0.9, str((label + 1) % classes): 0.1},
        "steps": steps,
        "curves": {
            "loss": [round(8 * math.exp(-step / 5), 4) for step in range(steps)],
            "l1": [round(l1 * (1 + math.exp(-step / 9)), 2) for step in range(steps)],
            "success": [1.0] * steps,
        },
    }


def detector(channels: int = 1, classes: int = 4, **changes: Any) -> DetectorRun:
    sizes = [4.0 if label == TARGET else 18 + 0.01 * label for label in range(classes)]
    facts: dict[str, Any] = {
        "id": "neural-cleanse",
        "version": "0.1.0",
        "options": {"steps": 150, "smoothing": 0.85},
        "evidence": {
            "examined": classes,
            "median_l1": 18.0,
            "ratio": 4.5,
            "anomaly_index": {str(label): 5.0 if label == TARGET else 0.1 for label in range(classes) if label != 3},
            "units": [{"labels": [label_row(label, l1, classes) for label, l1 in enumerate(sizes)]}],
        },
        "p_value": 0.0004,
        "gradient_samples": 16_088,
        "seconds": 2.0,
        "triggers": [trigger(TARGET, channels), trigger(0, channels)],
    }
    return DetectorRun(**{**facts, **changes})


def model_run(channels: int = 1, classes: int = 4, facts: Mapping[str, Any] | None = None, **changes: Any) -> ModelRun:
    finding = Finding(
        detector="neural-cleanse",
        target_label=TARGET,
        p_value=0.0004,
        score=5.0,
        trigger=trigger(TARGET, channels),
        attack_success_rate=0.99,
        severity=Severity.CRITICAL,
    )
    values: dict[str, Any] = {
        "model": model(channels, classes, **(facts or {})),
        "images": images(sample=[packed(channels, 200)]),
        "verdict": Verdict.BACKDOORED,
        "complete": True,
        "clean_accuracy": 0.9816,
        "findings": [finding],
        "detectors": [detector(channels, classes)],
        "cost": COST,
        "not_tested": ["all-to-all backdoors"],
    }
    return ModelRun(**{**values, **changes})


def scan_report(*runs: ModelRun, **changes: Any) -> ScanReport:
    values: dict[str, Any] = {
        "seed": 0,
        "versions": VERSIONS,
        "cost": COST,
        "verdict": Verdict.BACKDOORED,
        "complete": True,
        "alpha": 0.01,
        "runs": runs or (model_run(),),
    }
    return ScanReport(**{**values, **changes})


def repair_report(after: float | None = 0.006, **changes: Any) -> RepairReport:
    facts = {"layer": "conv2d_6", "channels": 40, "channels_pruned": 20, "drop": 2.0}

    def attacked(rate: float | None) -> dict[str, Any]:
        """The counts that go with a rate of 339 poisoned images."""
        successful = None if rate is None else round(339 * rate)
        return {
            "attack_success_rate": rate,
            "successful_attacks": successful,
            "unsuccessful_attacks": None if successful is None else 339 - successful,
        }

    caught = None if after is None else 0.9912
    goodnet = Scores(0.9289, false_reject_rate=0.0579, caught_rate=caught, macro_precision=0.9851, **attacked(after))
    before = Scores(0.9816, macro_precision=0.9817, **attacked(None if after is None else 0.9971))
    repaired = Scores(0.9342, macro_precision=0.9437, **attacked(after))
    values: dict[str, Any] = {
        "seed": 0,
        "versions": VERSIONS,
        "cost": COST,
        "model": model(),
        "images": images(),
        "poisoned": None if after is None else images(path="poisoned.h5", count=339),
        "method": "prune",
        "options": {"drop": (2.0, 4.0), "channels": (), "layer": ""},
        "before": before,
        "candidates": [
            CandidateRow("X=2", "repaired", repaired, facts, ["out/model_X=2.h5"]),
            CandidateRow("X=2", "goodnet", goodnet, facts, ["out/model_X=2.goodnet.onnx"]),
        ],
    }
    return RepairReport(**{**values, **changes})


def evaluation_report(**changes: Any) -> EvaluationReport:
    values: dict[str, Any] = {
        "seed": 0,
        "versions": VERSIONS,
        "cost": COST,
        "model": model(kind="goodnet"),
        "images": images(),
        "poisoned": images(path="poisoned.h5", count=339),
        "target_label": TARGET,
        "scores": Scores(
            0.9289,
            0.006,
            0.0579,
            0.9912,
            macro_precision=0.9851,
            successful_attacks=2,
            unsuccessful_attacks=337,
        ),
    }
    return EvaluationReport(**{**values, **changes})


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Makes reports and their parts, each to be changed by keywords."""
    return SimpleNamespace(
        model=model,
        images=images,
        packed=packed,
        trigger=trigger,
        detector=detector,
        run=model_run,
        scan=scan_report,
        repair=repair_report,
        evaluation=evaluation_report,
    )
