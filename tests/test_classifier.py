import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import fx, nn

from backdoorscan.classifier import Classifier, InputConvention, logits, to_tensor
from backdoorscan.errors import UnsupportedModelError


class Record(nn.Module):
    """Gives back what it was fed, flat."""

    def forward(self, x):
        self.seen = x
        return x.flatten(1)


def seen(pixels, **options):
    network = Record()
    Classifier(network, num_classes=2, **options)(pixels)
    return network.seen


PIXELS = torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        (InputConvention(), lambda x: x),
        (InputConvention(0, 255), lambda x: x * 255),
        (InputConvention(-1, 1), lambda x: 2 * x - 1),
        (InputConvention(mean=(0.5,), std=(0.25,)), lambda x: (x - 0.5) / 0.25),
        (InputConvention(mean=(0.1, 0.2, 0.3)), lambda x: x - np.array([0.1, 0.2, 0.3]).reshape(3, 1, 1)),
        (
            InputConvention(0, 255, (1, 2, 3), (4, 5, 6)),
            lambda x: (255 * x - [[[1]], [[2]], [[3]]]) / [[[4]], [[5]], [[6]]],
        ),
    ],
    ids=["0..1", "0..255", "-1..1", "one mean", "means", "everything"],
)
def test_conventions(convention, expected):
    np.testing.assert_allclose(
        seen(PIXELS, input_shape=(3, 5, 6), convention=convention).numpy(),
        expected(PIXELS.numpy()),
        rtol=1e-4,
        atol=1e-6,
    )
    assert InputConvention.from_json(json.loads(json.dumps(asdict(convention)))) == convention


@pytest.mark.parametrize(
    ("pixels", "native", "layout", "expected"),
    [
        (PIXELS, (), "NCHW", PIXELS),
        (PIXELS, (), "NHWC", PIXELS),  # the loader's network takes channels first whatever the file does
        (PIXELS[:, :1], (5, 6), "NCHW", PIXELS[:, 0]),
        (PIXELS, (90,), "NCHW", PIXELS.reshape(4, 90)),
        (PIXELS, (90,), "NHWC", PIXELS.permute(0, 2, 3, 1).reshape(4, 90)),
    ],
)
def test_native_shapes(pixels, native, layout, expected):
    inputs = seen(
        pixels, input_shape=tuple(pixels.shape[1:]), native_shape=native, convention=InputConvention(layout=layout)
    )
    assert torch.equal(inputs, expected)


class Viewing(nn.Module):
    """Flattens as much training code does: with ``view``, which depends on the order of memory."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(48, 2)

    def forward(self, x):
        return self.head(self.conv(x).view(x.size(0), -1))


def test_traced_networks_run_in_channels_last_memory_whatever_they_view():
    module = Viewing()
    expected = module(PIXELS)
    classifier = Classifier(fx.symbolic_trace(module), input_shape=(3, 5, 6), num_classes=2)
    assert classifier.native(PIXELS).is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(classifier(PIXELS), expected, atol=1e-6)


def test_untraced_networks_keep_their_order_of_memory():
    assert seen(PIXELS, input_shape=(3, 5, 6)).is_contiguous()
    assert Classifier(Viewing(), input_shape=(3, 5, 6), num_classes=2)(PIXELS).shape == (4, 2)


def test_one_logit_becomes_two():
    network = nn.Sequential(nn.Flatten(), nn.Linear(90, 1))
    classifier = Classifier(network, input_shape=(3, 5, 6), num_classes=2, binary=True)
    scores = classifier(PIXELS)
    probability = torch.sigmoid(network(PIXELS))[:, 0]
    assert scores.shape == (4, 2)
    torch.testing.assert_close(scores.softmax(1)[:, 1], probability)


def planted_like() -> Classifier:
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(24, 3))
    return Classifier(fx.symbolic_trace(network), input_shape=(3, 5, 6), num_classes=3)


def test_a_clone_has_weights_of_its_own():
    classifier = planted_like()
    expected = classifier(PIXELS)
    twin = classifier.clone()
    assert torch.equal(twin(PIXELS), expected)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert torch.equal(classifier(PIXELS), expected)
    assert not torch.equal(twin(PIXELS), expected)
    twin.network = nn.Identity()
    assert torch.equal(classifier(PIXELS), expected)


def test_it_is_in_eval_mode_and_knows_its_layers():
    classifier = planted_like()
    assert not any(module.training for module in classifier.network.modules())
    assert classifier.last_conv == "0"
    assert classifier.example().shape == (1, 3, 5, 6)


def test_layers_need_a_graph():
    classifier = Classifier(nn.Flatten(), input_shape=(3, 5, 6), num_classes=90)
    with pytest.raises(UnsupportedModelError, match="cannot be followed"):
        _ = classifier.last_conv


def test_to_tensor():
    stored = np.array([0, 51, 255], np.uint8)
    stored.setflags(write=False)
    assert to_tensor(stored).tolist() == pytest.approx([0, 0.2, 1])
    assert to_tensor(torch.from_numpy(stored.copy())).tolist() == pytest.approx([0, 0.2, 1])
    assert stored.tolist() == [0, 51, 255]
    assert to_tensor(np.array([0.25], np.float32)).dtype == torch.float32


def test_logits_batch_by_batch_are_the_same():
    classifier = planted_like()
    whole = logits(classifier, PIXELS)
    assert not whole.requires_grad
    torch.testing.assert_close(logits(classifier, PIXELS, batch=3), whole)
