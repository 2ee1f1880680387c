"""The verb *evaluate* on small files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from backdoorscan import evaluate
from backdoorscan.artifact import Artifact
from backdoorscan.classifier import to_tensor
from backdoorscan.errors import ArtifactError, ImagesError
from backdoorscan.evaluating import measure, predict_pictures
from backdoorscan.formats.goodnet import write_goodnet
from backdoorscan.goodnet import GoodNet
from backdoorscan.images import LabelledImages
from backdoorscan.measured import Attacks
from backdoorscan.trigger import Trigger


class Lookup(nn.Module):
    """Gives image k, whose pixels are all k, the k-th of the classes it was told."""

    def __init__(self, *answers):
        super().__init__()
        self.answers = torch.tensor(answers)

    def forward(self, x):
        return nn.functional.one_hot(self.answers[(x[:, 0, 0, 0] * 255).round().long()], 5).float()


def numbered(*labels) -> LabelledImages:
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return LabelledImages(pixels.repeat(2, 3).repeat(2, 2), np.array(labels), "numbered")


@pytest.mark.parametrize(
    ("answers", "labels", "target", "rate"),
    [
        ([1, 1, 0, 1], [1, 1, 1, 1], None, 0.75),  # labelled with the target
        ([1, 2, 3, 0], [1, 2, 3, 4], None, 0.75),  # each with a target of its own
        ([1, 1, 0, 1], [1, 1, 1, 1], 1, 0.75),
        ([1, 1, 0, 1], [1, 0, 2, 3], 1, 2 / 3),  # true labels: the image of the target class does not count
        ([0, 0, 0, 0], [2, 2, 2, 2], 1, 0.0),
    ],
)
def test_what_the_labels_of_poisoned_images_mean(answers, labels, target, rate):
    scores = measure(Lookup(*answers), numbered(*answers), numbered(*labels), target=target)
    assert scores.clean_accuracy == 1
    assert scores.attack_success_rate == pytest.approx(rate)
    assert scores.successful_attacks == pytest.approx(rate * (scores.successful_attacks + scores.unsuccessful_attacks))
    assert scores.caught_rate is None


def test_rates_of_a_network_that_can_reject():
    clean, poisoned = numbered(0, 1, 2, 3), numbered(1, 1, 1, 1)
    scores = measure(Lookup(0, 1, 4, 4), clean, poisoned, rejects=4)
    assert (scores.clean_accuracy, scores.false_reject_rate) == (0.5, 0.5)
    assert (scores.attack_success_rate, scores.caught_rate) == (0.25, 0.5)
    assert (scores.successful_attacks, scores.unsuccessful_attacks) == (1, 3)  # a caught attack is none that succeeds
    assert scores.macro_precision == 0.5  # classes 2 and 3 are never answered; "backdoored" is no class


def test_clean_images_alone():
    scores = measure(Lookup(0, 1), numbered(0, 0))
    assert (scores.clean_accuracy, scores.attack_success_rate, scores.false_reject_rate) == (0.5, None, None)
    assert (scores.successful_attacks, scores.unsuccessful_attacks, scores.reversed_attacks) == (None, None, None)
    assert scores.macro_precision == 0.5


class Bright(nn.Module):
    """Class 1 for images brighter than a limit, else class 0."""

    def forward(self, x):
        return nn.functional.one_hot((x.mean((1, 2, 3)) > 0.6).long(), 5).float()


def test_reversed_attacks_are_counted_apart_and_as_they_are():
    """Half opaque white brightens black images to 0.5: only at twice its strength it works."""
    images = numbered(0, 0, 0, 1, 2)
    faint = Trigger(torch.full((1, 2, 2), 0.5), torch.ones(3, 2, 2), 1)
    full = Trigger(torch.ones(1, 2, 2), torch.ones(3, 2, 2), 1)
    scores = measure(Bright(), images, triggers=[faint])
    assert (scores.reversed_success_rate, scores.reversed_attacks) == (1, Attacks(0, 4))
    assert (scores.attack_success_rate, scores.successful_attacks) == (None, None)
    assert measure(Bright(), images, triggers=[faint, full]).reversed_attacks == Attacks(4, 4)
    assert measure(Bright(), numbered(1, 1), triggers=[full]).reversed_attacks is None


@pytest.mark.parametrize(("target", "attack"), [(2, 1.0), (None, 0.0)])
def test_a_model_file(model_file, target, attack):
    file = model_file(target)
    report = evaluate(file.path, file.images, file.poisoned, file.read)
    assert (report.scores.clean_accuracy, report.scores.attack_success_rate) == (1, attack)
    assert report.model["kind"] == "classifier"
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["poisoned"]["count"] == len(file.poisoned)


@pytest.fixture
def goodnet(model_file, triple, tmp_path):
    """A GoodNet of the backdoored and the clean network, which differ only on the trigger."""
    path = tmp_path / "g.onnx"
    write_goodnet(GoodNet(triple(2)[0], triple(None)[0]), path)
    return path


def test_a_goodnet_file(goodnet, model_file):
    file = model_file(2)
    report = evaluate(goodnet, file.images, file.poisoned)
    assert report.model["kind"] == "goodnet"
    assert report.model["sha256"] == Artifact.read(goodnet).sha256
    scores = report.scores
    assert (scores.clean_accuracy, scores.false_reject_rate) == (1, 0)
    assert (scores.attack_success_rate, scores.caught_rate) == (0, 1)
    with pytest.raises(ImagesError, match="do not fit a GoodNet"):
        evaluate(goodnet, numbered(0, 1))


def test_pictures(goodnet, model_file, tmp_path):
    file = model_file(2)
    paths = []
    for name, images in (("clean", file.images), ("poisoned", file.poisoned)):
        pixels = (255 * to_tensor(images.pixels[:1])).round().byte().numpy()
        paths.append(tmp_path / f"{name}.png")
        Image.fromarray(pixels[0, 0]).save(paths[-1])
    assert predict_pictures(goodnet, paths) == ([int(file.images.labels[0]), 5], 5)
    with pytest.raises(ArtifactError, match="not a GoodNet"):
        predict_pictures(file.path, paths)


def test_images_that_do_not_belong_together(model_file):
    file = model_file(2)
    with pytest.raises(ImagesError, match="numbered has images of"):
        evaluate(file.path, file.images, numbered(0, 1), file.read)
    with pytest.raises(ImagesError, match="label 9 does not exist"):
        evaluate(file.path, file.images, LabelledImages(file.images.pixels[:1], np.array([9]), "x"), file.read)


@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_that_does_not_exist(model_file, target):
    file = model_file(2)
    with pytest.raises(ImagesError, match=f"--target {target}"):
        evaluate(file.path, file.images, file.poisoned, file.read, target=target)


def test_poisoned_images_of_the_target_class_alone(model_file):
    file = model_file(2)
    images = file.images.take(np.flatnonzero(file.images.labels == 3))
    report = evaluate(file.path, file.images, images, file.read, target=3)
    assert report.scores.attack_success_rate == 1  # labels all equal to the target are taken as target labels
