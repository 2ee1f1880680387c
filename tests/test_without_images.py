"""Scans without clean images, or with few."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from backdoorscan import scan
from backdoorscan.engine.keeping import Keeping
from backdoorscan.errors import ImagesError, MethodError, UsageError
from backdoorscan.findings import Evidence, Judgement
from backdoorscan.formats.loading import ReadOptions
from backdoorscan.plugin.detector import Detector
from backdoorscan.scanning import ScanOptions


@dataclass(frozen=True, kw_only=True)
class Looking(Detector):
    """Says what images it is given."""

    id = "looking"
    given: ClassVar[list] = []

    def examine(self, unit, classifier, images, context):
        self.given.append(images)
        return Evidence(figures={}, gradient_samples=1)

    def judge(self, evidence):
        return Judgement(p_value=0.9)


@dataclass(frozen=True, kw_only=True)
class Blind(Looking):
    """Needs none."""

    id = "blind"
    needs_images = False


@pytest.fixture
def run(model_file, registry_of, tmp_path):
    """``run(images=None, seed=3)``: a scan of the clean network."""
    file = model_file(None)

    def start(*, detectors=(Looking,), images=file.images, read=file.read, path=file.path, reports=True, **options):
        registry, keeping = registry_of(detectors=list(detectors)), Keeping(tmp_path / "kept", reports=reports)
        return scan(path, images, read, ScanOptions(**options), registry=registry, keeping=keeping)

    return start


@pytest.fixture
def given(monkeypatch):
    monkeypatch.setattr(Looking, "given", [])
    return Looking.given


SHAPE = (1, 12, 12)


def test_without_images_they_are_made(run, given, model_file):
    read = replace(model_file(None).read, input_shape=SHAPE)
    report = run(images=None, read=read)
    (images,) = given
    (found,) = report.runs
    assert images.pixels.shape[1:] == SHAPE
    assert len(set(images.labels.tolist())) >= 2
    assert (images.source, images.pixels.min() >= 0, images.pixels.max() <= 1) == ("made from the model", True, True)
    described = {key: value for key, value in found.images.items() if key != "sample"}
    count = len(images)
    assert 20 <= count <= 60
    assert described == {"path": None, "sha256": images.sha256, "count": count, "synthetic": True, "made": count}
    assert found.clean_accuracy is None
    assert report.cost.gradient_samples == found.cost.gradient_samples == 60 * 60 + 1
    assert [note.partition(":")[0] for note in found.notes] == ["no clean images"] * 2
    assert found.model["input_range_assumed"] is True
    assert (found.model["input_range"], found.model["input_range_found"]) == ([0, 1], False)
    json.dumps(report.to_json())
    assert run(images=None, read=read).cached


def test_a_pinned_convention_is_not_an_assumption(run, given, model_file):
    read = replace(model_file(None).read, input_shape=SHAPE, input_range=(0.0, 255.0))
    (found,) = run(images=None, read=read).runs
    assert "input_range_assumed" not in found.model
    assert found.model["input_range"] == [0, 255]
    assert len(found.notes) == 1


def test_the_same_seed_makes_the_same_images(run, given, model_file):
    read = replace(model_file(None).read, input_shape=SHAPE)
    for seed in (1, 1, 2):
        run(images=None, read=read, seed=seed, reports=False)
    one, same, other = (images.sha256 for images in given)
    assert one == same != other


def test_none_are_made_for_detectors_that_need_none(run, given, model_file):
    read = replace(model_file(None).read, input_shape=SHAPE)
    report = run(detectors=[Blind], images=None, read=read)
    (found,) = report.runs
    assert given == [None]
    assert (found.images, found.clean_accuracy, report.cost.gradient_samples) == (None, None, 1)
    assert not any("made from" in note for note in found.notes)


def test_few_images_are_complemented(run, given, model_file):
    images = model_file(None).images
    few = images.take(np.arange(10))
    (found,) = run(images=few).runs
    (working,) = given
    made = len(working) - 10
    assert made >= 20
    assert np.allclose(working.pixels[:10], few.pixels / 255)
    assert working.labels[:10].tolist() == few.labels.tolist()
    assert (found.images["count"], found.images["made"], found.images["synthetic"]) == (10 + made, made, True)
    assert (found.images["path"], found.images["sha256"]) == (few.source, few.sha256)
    assert (found.clean_accuracy, found.model["input_range_found"]) == (1, True)
    assert found.notes == [f"few clean images: the scan worked on {made} images made from the model beside them"]


def test_enough_images_are_not(run, given, model_file):
    twenty = model_file(None).images.take(np.arange(20))
    (found,) = run(images=twenty).runs
    assert given == [twenty]
    assert (found.images["made"], found.images["synthetic"], found.notes) == (0, False, [])


def test_a_size_that_nobody_tells(run, model_file):
    with pytest.raises(ImagesError, match="does not say how large"):
        run(images=None)
    with pytest.raises(ImagesError):
        run(images=None, read=replace(model_file(None).read, input_shape=(1, 13, 50)))
    with pytest.raises(UsageError, match="--input-shape"):
        run(read=replace(model_file(None).read, input_shape=SHAPE))


def test_a_network_that_has_one_answer_shows_no_classes(run, tmp_path):
    (tmp_path / "one.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))\n"
    )
    dense = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    nn.init.zeros_(dense[1].weight)
    dense[1].bias.data = torch.tensor([1.0, 0, 0])
    torch.save(dense.state_dict(), tmp_path / "one.pt")
    read = ReadOptions(arch=f"{tmp_path / 'one.py'}:net", input_shape=(1, 4, 4))
    with pytest.raises(MethodError, match="No images can be made"):
        run(path=tmp_path / "one.pt", images=None, read=read)
    with pytest.raises(MethodError, match="ran out of time"):
        run(path=tmp_path / "one.pt", images=None, read=read, timeout=0.0)
