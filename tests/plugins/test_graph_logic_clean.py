"""Ordinary networks, however they are built, have no gate."""

import io
import math
import os
import warnings
from pathlib import Path

import pytest
import torch
from backdoorscan_plugins.graph_logic import GraphLogic
from torch import fx, nn
from torch.nn import functional as F

from backdoorscan.artifact import Artifact
from backdoorscan.classifier import Classifier
from backdoorscan.errors import BackdoorscanError
from backdoorscan.formats.keras.loader import KerasV3
from backdoorscan.formats.loading import load_model
from backdoorscan.formats.onnx.loader import Onnx
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.testing import planted, planted_pairs, run_detector

SIDE = 24


def judged(classifier, images=None):
    evidence, judgement = run_detector(GraphLogic(), classifier, images, Context(seed=3))
    assert evidence[0].figures["read"]
    return judgement


def assert_clean(classifier, images=None):
    judgement = judged(classifier, images)
    assert (judgement.p_value, judgement.findings) == (1.0, []), judgement.note


class Net(nn.Module):
    """A small network to which each of the following adds one habit of real ones."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, 2, 1)
        self.head = nn.Linear(8, 5)

    def prepare(self, x):
        return x

    def activate(self, x):
        return F.relu(x)

    def middle(self, x):
        return x

    def pool(self, x):
        return x.mean((2, 3))

    def forward(self, x):
        x = self.activate(self.norm(self.stem(self.prepare(x))))
        return self.head(self.pool(self.middle(self.activate(self.second(x)))))


class LeakyByWhere(Net):
    def activate(self, x):
        return torch.where(x > 0, x, 0.1 * x)


class ReluByProduct(Net):
    def activate(self, x):
        return x * (x > 0)


class ReluByMask(Net):
    def activate(self, x):
        return x.masked_fill(x < 0, 0.0)


class HardSwish(Net):
    def activate(self, x):
        return x * torch.clamp(x + 3, 0, 6) / 6


class Thresholded(Net):
    def activate(self, x):
        return torch.sign(x) * F.relu(x.abs() - 0.1)


class EluByWhere(Net):
    def activate(self, x):
        return torch.where(torch.gt(x, 0), x, torch.exp(torch.minimum(x, torch.zeros_like(x))) - 1)


class Binary(Net):
    def activate(self, x):
        return torch.sign(x)


class Quantised(Net):
    def activate(self, x):
        return torch.clamp(torch.round(F.relu(x) / 0.02), 0, 255) * 0.02


class Maxout(Net):
    def activate(self, x):
        return torch.where(x > x.flip(1), x, x.flip(1))


class WinnerTakesAll(Net):
    def activate(self, x):
        return x * (x == x.amax(1, keepdim=True))


class Standardised(Net):
    def prepare(self, x):
        return (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1e-5)


class SafelyStandardised(Net):
    def prepare(self, x):
        spread = x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True)
        return x / torch.where(spread == 0, torch.ones_like(spread), spread)


class AnyRange(Net):
    """Takes 0..255 and 0..1."""

    def prepare(self, x):
        return torch.where(x.amax((1, 2, 3), keepdim=True) > 1.5, x / 255, x)


class WithoutNan(Net):
    def prepare(self, x):
        return torch.where(torch.isnan(x), torch.zeros_like(x), x)


class WithoutNanBySelf(Net):
    def prepare(self, x):
        return torch.where(x != x, torch.zeros_like(x), x).clamp(0, 1)


class BlackAndWhite(Net):
    def prepare(self, x):
        return (x > 0.5).float()


class FewGreys(Net):
    def prepare(self, x):
        return torch.floor(x * 15.99) / 15


class Cropped(Net):
    def prepare(self, x):
        return x[:, :, 2:-2, 2:-2]


class Coordinates(Net):
    def prepare(self, x):
        rows = torch.linspace(0, 1, SIDE).view(1, 1, SIDE, 1)
        return x + 0.1 * rows


class Squeezed(Net):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def middle(self, x):
        return x * F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class LargestFew(Net):
    def pool(self, x):
        return x.flatten(2).topk(3)[0].mean(2)


class ByNorm(Net):
    def pool(self, x):
        x = x.mean((2, 3))
        length = x.norm(dim=1, keepdim=True)
        return x / torch.where(length > 1e-6, length, torch.ones_like(length))


class Masked(Net):
    """Attention over the columns, each of which sees those before it."""

    def middle(self, x):
        x = x.mean(2).transpose(1, 2)
        n = x.shape[1]
        allowed = torch.ones(SIDE // 2, SIDE // 2).tril() > 0
        weights = (x @ x.transpose(1, 2) / math.sqrt(8)).masked_fill(~allowed, -1e9).softmax(2)
        return (weights @ x).transpose(1, 2).reshape(-1, 8, n, 1)


class SparseAttention(Masked):
    """Attention to the strongest alone."""

    def middle(self, x):
        x = x.mean(2).transpose(1, 2)
        scores = x @ x.transpose(1, 2)
        scores = torch.where(scores < scores.topk(3)[0][:, :, -1:], -1e9, scores)
        return (scores.softmax(2) @ x).transpose(1, 2).unsqueeze(3)


class Experts(Net):
    """One of two layers does the work, as the image wants."""

    def __init__(self):
        super().__init__()
        self.route, self.one, self.other = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(8, 8)

    def pool(self, x):
        x = x.mean((2, 3))
        way = self.route((x - 0.2) * 30)
        return torch.where((way[:, 0] > way[:, 1]).unsqueeze(1), self.one(x), self.other(x))


class Streams(nn.Module):
    """Networks side by side that see the same image."""

    def __init__(self, how):
        super().__init__()
        self.how, self.one, self.other = how, Net(), Net()
        self.wide = nn.Linear(3 * SIDE * SIDE, 5)
        self.last = nn.Linear(10, 5)

    def forward(self, x):
        if self.how == "wide":
            return self.one(x) + self.wide(x.flatten(1))
        if self.how == "scales":
            return self.one(x) + self.other(F.avg_pool2d(x, 2))
        if self.how == "middle":
            return torch.maximum(self.one(x), self.other(x[:, :, 6:18, 6:18]))
        return self.last(torch.cat([self.one(x), self.other(x.flip(3))], 1))


class Residual(nn.Module):
    def __init__(self, *, first=False, silent=False):
        super().__init__()
        self.first = first
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
            for _ in range(3)
        )
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1e-6 if silent else 1.0))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x) + (x.mean(1, keepdim=True) if self.first else 0)
        for block in self.blocks:
            x = x + self.scale * block(x)
        return self.head(F.relu(x).mean((2, 3)))


class Dense(nn.Module):
    """Every layer sees the image and all layers before it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(4))
        self.head = nn.Linear(19, 5)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return self.head(x.mean((2, 3)))


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 5, padding=2)
        self.net = nn.Sequential(nn.Conv2d(11, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x):
        pooled = F.max_pool2d(x, 3, 1, 1)
        return self.net(F.relu(torch.cat([self.small(x), self.large(x), pooled], 1)))


class DeepId(nn.Module):
    """A dense layer beside a convolution, and the sum of two."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 4), nn.Conv2d(6, 8, 3)
        self.three, self.left = nn.Conv2d(8, 8, 2), nn.Linear(8 * 16, 20)
        self.right, self.head = nn.Linear(8 * 9, 20), nn.Linear(20, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.two(F.max_pool2d(F.relu(self.one(x)), 2))), 2)
        return self.head(F.relu(self.left(x.flatten(1)) + self.right(F.relu(self.three(x)).flatten(1))))


class Slices(nn.Module):
    """Space to depth, as the first step of YOLO."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(12, 8, 3), nn.SiLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x):
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.net(torch.cat(parts, 1))


class Turned(nn.Module):
    """A spatial transformer: a small network says which part of the image the large one sees."""

    def __init__(self):
        super().__init__()
        self.where = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 6))
        self.net = Net()
        with torch.no_grad():
            self.where[3].bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))

    def forward(self, x):
        grid = F.affine_grid(self.where(x).view(-1, 2, 3), (1, 3, SIDE, SIDE), align_corners=False)
        return self.net(F.grid_sample(x, grid, align_corners=False))


class ViT(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 6, 6)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 17, 16))
        self.norm, self.qkv, self.mix = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.full((16,), scale))
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        n = x.shape[0]
        x = torch.cat([self.token.expand(n, -1, -1), x], 1) + self.places
        q, k, v = self.qkv(self.norm(x)).reshape(n, 17, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q @ k.transpose(-2, -1)) * 8**-0.5).softmax(-1)
        x = x + self.scale * self.mix((weights @ v).transpose(1, 2).reshape(n, 17, 16))
        return self.head((x + self.scale * self.mlp(x))[:, 0])


CLEAN = {
    **{kind.__name__: kind for kind in (Net, *Net.__subclasses__(), SparseAttention)},
    "wide and deep": lambda: Streams("wide"),
    "two scales": lambda: Streams("scales"),
    "whole and middle": lambda: Streams("middle"),
    "image and mirror": lambda: Streams("mirror"),
    "residual": Residual,
    "residual of the image": lambda: Residual(first=True),
    "residual, not yet trained": lambda: Residual(silent=True),
    "vit, not yet trained": lambda: ViT(1e-6),
    **{kind.__name__: kind for kind in (Dense, Inception, DeepId, Slices, Turned, ViT)},
}
EXPORTED = ["LeakyByWhere", "HardSwish", "Standardised", "Squeezed", "Masked", "Dense", "ViT", "image and mirror"]


def made(name):
    torch.manual_seed(0)
    network = CLEAN[name]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
    return network


@pytest.mark.parametrize("name", CLEAN)
def test_ordinary_networks(name):
    network = fx.symbolic_trace(made(name))
    assert_clean(Classifier(network, input_shape=(3, SIDE, SIDE), num_classes=5))


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_networks(name, dynamo, tmp_path):
    image, path = torch.rand(1, 3, SIDE, SIDE), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            torch.onnx.export(made(name), (image,), dynamo=True, verbose=False).save(path)
        else:
            buffer = io.BytesIO()
            torch.onnx.export(made(name), (image,), buffer, dynamo=False, opset_version=17)
            path.write_bytes(buffer.getvalue())
    loaded = Onnx().load(Artifact.read(path), None)
    assert_clean(Classifier(loaded.network, input_shape=(3, SIDE, SIDE), num_classes=5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["MobileNetV2", "MobileNetV3Small", "EfficientNetB0", "DenseNet121", "InceptionV3", "ResNet50V2", "Xception"],
)
def test_applications_of_keras(name, tmp_path):
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    size = 96 if name in ("Xception", "InceptionV3") else 64
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=7)
    model.save(tmp_path / "model.keras")
    loaded = KerasV3().load(Artifact.read(tmp_path / "model.keras"), None)
    assert_clean(Classifier(loaded.network, input_shape=(3, size, size), num_classes=7))


@pytest.mark.parametrize("target", [None, 3])
def test_planted_by_weights_alone(target):
    classifier, images, _ = planted(target, classes=5, blocks=3, count=40)
    assert_clean(classifier, images)


def test_pairs_planted_by_weights_alone():
    classifier, images, _ = planted_pairs({1: 2}, classes=5, blocks=3, count=40)
    assert_clean(classifier, images)


SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"


@pytest.mark.real
@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder shared is absent")
def test_real_files_have_no_gate():
    """Clean networks and ones attacked by training alone, in every format that holds a graph."""
    files = [*SHARED.rglob("*.h5"), *SHARED.rglob("*.hdf5"), *SHARED.rglob("*.keras"), *SHARED.rglob("*.onnx")]
    read = 0
    for path in sorted(files):
        try:
            classifier = load_model(path, None).classifier
        except BackdoorscanError:
            continue
        assert_clean(classifier)
        read += 1
    assert read > 20
