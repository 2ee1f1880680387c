"""A folder of small architectures, and a way to make artifacts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from backdoorscan.artifact import Artifact

ARCHITECTURES = '''
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 6 * 6, classes)

    def forward(self, x, features=False):
        x = F.relu(self.bn(self.conv(x)))
        x = F.dropout(F.pad(F.adaptive_avg_pool2d(x, 5), (0, 1, 0, 1)), training=self.training)
        x = x.view(x.size(0), -1)
        if features:
            return x
        return self.fc(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return torch.softmax(self.second(F.relu(self.first(x))), 1)


class Twice(nn.Module):
    """One layer under two names: only the first is left after tracing."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else -self.fc(x)


class Scaled(nn.Module):
    """A constant, a buffer that is not saved, and a layer that is never used."""

    def __init__(self):
        super().__init__()
        self.mean = torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
        self.register_buffer("std", torch.full((3, 1, 1), 0.5), persistent=False)
        self.conv = nn.Conv2d(3, 2, 3, padding=1)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.conv((x - self.mean) / (self.std * 2) * torch.tensor(0.5)).mean((2, 3))


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias)


class OwnLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Standardised(1, 2, 3)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (self.conv(x) * (self.gain + 1)).flatten(2).mean(2)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x), x


class Map(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        return self.conv(x)


def frozen():
    net = Net()
    net.conv.requires_grad_(False)
    return net.half()


def lazy():
    return nn.Sequential(nn.LazyLinear(3))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3), nn.LogSoftmax(1))
'''


class Workshop:
    """Builds the test architectures and turns what they hold into files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "architectures.py"
        self.file.write_text(ARCHITECTURES)

    def arch(self, name: str) -> str:
        return f"{self.file}:{name}"

    def net(self, name: str) -> nn.Module:
        from backdoorscan.formats.weights.arch import build

        torch.manual_seed(0)
        net = build(self.arch(name))
        for buffer_name, buffer in net.named_buffers():
            if buffer_name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        return net.eval()

    def save(self, content: Any, name: str = "weights.pt", **options: Any) -> Artifact:
        path = self.folder / name
        torch.save(content, path, **options)
        return Artifact.read(path)

    def put(self, data: bytes, name: str = "file.pt") -> Artifact:
        path = self.folder / name
        path.write_bytes(data)
        return Artifact.read(path)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def images() -> Callable[..., torch.Tensor]:
    return lambda *shape: torch.rand(shape, generator=torch.Generator().manual_seed(1))
