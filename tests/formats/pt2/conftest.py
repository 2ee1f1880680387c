"""Small networks of the usual kinds, exported by torch; ``torch.export.load`` is the truth for files of our own."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoorscan.artifact import Artifact
from backdoorscan.formats.pt2.loader import Pt2
from backdoorscan.plugin.loader import LoadedNetwork


class Block(nn.Module):
    """A residual block with activations in place."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 12, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class MobileNet(nn.Module):
    """Depthwise convolutions, squeeze-and-excitation, hard-swish, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True))
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 5, 1, 2, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True)
        )
        self.fc1, self.fc2 = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.classifier = nn.Sequential(
            nn.Linear(8, 16), nn.Hardswish(), nn.Dropout(0.2, inplace=True), nn.Linear(16, 4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        y = y * F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.project(y)
        return self.classifier(x.mean([2, 3]))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1, bias=False) for i in range(3))
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(20 * 64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.conv0(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        x = self.pool(torch.cat(features, 1))
        return F.softmax(self.head(x.view(x.size(0), -1)), dim=1)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.gamma = nn.Parameter(torch.full((16,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.gamma * self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16) / 4)
        self.blocks = nn.Sequential(Encoder(), Encoder())
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        x = self.patches(x).reshape(n, 16, 16).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": ResNet,
    "mobilenet": MobileNet,
    "densenet": DenseNet,
    "vit": ViT,
}


def network_of(build: Callable[[], nn.Module]) -> nn.Module:
    """In eval mode, with the statistics of its normalisation layers randomised."""
    torch.manual_seed(0)
    network = build().eval()
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return network


def saved(
    network: nn.Module, shape: tuple[int, ...] = (3, 16, 16), batch: int | None = None, *, decomposed: bool = False
) -> bytes:
    """Export with an open batch, or for ``batch`` images."""
    dynamic = ({0: torch.export.Dim("batch")},) if batch is None else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (torch.rand(batch or 2, *shape),), dynamic_shapes=dynamic)
        buffer = io.BytesIO()
        torch.export.save(program.run_decompositions() if decomposed else program, buffer)
    return buffer.getvalue()


def artifact_of(data: bytes, name: str = "model.pt2") -> Artifact:
    return Artifact(Path(name), data, "")


def load_bytes(data: bytes) -> LoadedNetwork:
    return Pt2().load(artifact_of(data), None)


def rewritten(data: bytes, edit: Callable[[dict[str, bytes]], None], **options: Any) -> bytes:
    """The archive with other members, its checksums right."""
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        members = {name: source.read(name) for name in source.namelist()}
    edit(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as target:
        for name, content in members.items():
            target.writestr(name, content)
    return buffer.getvalue()


def with_program(data: bytes, edit: Callable[[dict[str, Any]], None], name: str = "models/model.json") -> bytes:
    """The archive with another description."""

    def change(members: dict[str, bytes]) -> None:
        program = json.loads(members[f"archive/{name}"])
        edit(program)
        members[f"archive/{name}"] = json.dumps(program).encode()

    return rewritten(data, change)


@pytest.fixture(scope="session")
def resnet() -> nn.Module:
    return network_of(ResNet)


@pytest.fixture(scope="session")
def resnet_file(resnet: nn.Module) -> bytes:
    return saved(resnet)


@pytest.fixture
def network() -> Callable[[str], nn.Module]:
    """One of the small networks by its name."""
    return lambda name: network_of(NETWORKS[name])


@pytest.fixture
def save() -> Callable[..., bytes]:
    """Export a network; see ``saved``."""
    return saved


@pytest.fixture
def load() -> Callable[[bytes], LoadedNetwork]:
    """Load a model from its bytes."""
    return load_bytes


@pytest.fixture
def artifact() -> Callable[..., Artifact]:
    """Bytes as an artifact."""
    return artifact_of


@pytest.fixture
def rewrite() -> Callable[..., bytes]:
    """Make another archive of one; see ``rewritten``."""
    return rewritten


@pytest.fixture
def program() -> Callable[..., bytes]:
    """Change the description in an archive; see ``with_program``."""
    return with_program
