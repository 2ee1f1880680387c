"""Where a network computes."""

import pytest
import torch
from torch import nn

from backdoorscan import load_classifier, scan
from backdoorscan.classifier import logits, to_tensor
from backdoorscan.errors import UsageError
from backdoorscan.findings import Verdict
from backdoorscan.formats.devices import find_device
from backdoorscan.formats.loading import ReadOptions
from backdoorscan.plugin.testing import planted

MISSING = "cuda:99"


def test_the_processor_is_always_there():
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:", "cuda:x", "cuda:-1", ""])
def test_a_name_that_is_none(name):
    with pytest.raises(UsageError, match="is no device"):
        find_device(name)


def test_a_device_that_is_missing():
    with pytest.raises(UsageError, match=f"no {MISSING} here") as refusal:
        load_classifier(
            nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), read=ReadOptions(device=MISSING, input_shape=(1, 2, 2))
        )
    assert refusal.value.why
    assert "--device" in refusal.value.hint


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_same_answers_on_a_gpu():
    classifier, images, _ = planted(3)
    there = load_classifier(classifier.network, images, ReadOptions(device="cuda", input_range=(0.0, 1.0)))
    assert {weights.device.type for weights in there.parameters()} == {"cuda"}
    pixels = to_tensor(images.pixels)
    torch.testing.assert_close(logits(there, pixels), logits(classifier, pixels), rtol=1e-2, atol=1e-2)
    report = scan(classifier.network, images, ReadOptions(device="cuda"))
    assert report.verdict is Verdict.BACKDOORED
    assert {finding.target_label for finding in report.runs[0].findings} == {3}
