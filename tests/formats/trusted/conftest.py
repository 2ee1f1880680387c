"""A small network in the kinds of files that only running them can open."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from backdoorscan.formats import sandbox
from backdoorscan.formats.loading import LoadedModel, ReadOptions, load_model

SOURCE = """
import torch
from torch import nn
from beside import classes

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 8 * 8, classes)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).view(x.size(0), -1))

class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(192, classes))
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and not sandbox.available():
            item.add_marker(pytest.mark.skip(reason="this platform has no sandbox"))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that defines the network, with a neighbour that it imports."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "beside.py").write_text("classes = 5\n")
    (folder / "mynet.py").write_text(SOURCE)
    return folder / "mynet.py"


@pytest.fixture
def nets(source: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the networks, in this process only."""
    monkeypatch.syspath_prepend(str(source.parent))
    spec = importlib.util.spec_from_file_location("mynet", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mynet", module)
    spec.loader.exec_module(module)
    monkeypatch.undo()  # what is pickled is found by name, in the sandbox not at all
    monkeypatch.setitem(sys.modules, "mynet", module)
    return module


@pytest.fixture
def net(nets: Any) -> nn.Module:
    """A network with weights that no other has."""
    torch.manual_seed(3)
    network: nn.Module = nets.Net().eval()
    network.norm.running_mean.uniform_(-0.5, 0.5)
    return network


@pytest.fixture
def read() -> Callable[..., LoadedModel]:
    def load(path: Path, *, trust: bool, arch: str | None = None) -> LoadedModel:
        return load_model(path, None, ReadOptions(arch, (0, 1), input_shape=(3, 8, 8), trust=trust))

    return load


@pytest.fixture
def agree() -> Callable[[LoadedModel, nn.Module], None]:
    def compare(loaded: LoadedModel, network: nn.Module) -> None:
        images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert torch.allclose(loaded.classifier(images), network(images), atol=1e-5)

    return compare
