"""Networks in memory in the place of files."""

import pytest
import torch
from torch import nn

from backdoorscan.errors import ArtifactError, BackdoorscanError
from backdoorscan.formats.loading import find_loader
from backdoorscan.formats.memory import ModuleArtifact, ModuleLoader, reading_modules
from backdoorscan.plugin.testing import planted_network
from backdoorscan.registry import installed

SIZES = {"classes": 5, "blocks": 3}


@pytest.fixture
def network():
    return planted_network(2, **SIZES)


class Tied(nn.Module):
    """Knows its last layer by two names, of which only one is used."""

    def __init__(self, network):
        super().__init__()
        self.body, self.head = network[:-1], network[-1]
        self.other_name = self.head

    def forward(self, x):
        return self.head(self.body(x))


def test_the_digest_is_that_of_the_state_dict(network):
    digest = ModuleArtifact.of(network).sha256
    assert digest == ModuleArtifact.of(planted_network(2, **SIZES)).sha256
    assert digest != ModuleArtifact.of(planted_network(3, **SIZES)).sha256
    assert digest != ModuleArtifact.of(network.half()).sha256
    assert digest != ModuleArtifact.of(nn.Sequential(planted_network(2, **SIZES))).sha256


def test_only_a_registry_that_reads_modules_reads_them(network):
    artifact = ModuleArtifact.of(network)
    assert isinstance(find_loader(artifact, reading_modules(installed())), ModuleLoader)
    with pytest.raises(ArtifactError, match="no model of a known format"):
        find_loader(artifact, installed())


def test_weights_with_two_names_stay_one(network, tmp_path):
    tied = Tied(network).half()
    artifact = ModuleArtifact.of(tied)
    loader = ModuleLoader()
    loaded = loader.load(artifact, None).network
    weights = {name: tensor + 1 for name, tensor in loaded.state_dict().items() if name.startswith("head")}
    loader.write(artifact, weights, tmp_path / "tied.pt")
    written = torch.load(tmp_path / "tied.pt", weights_only=True)
    assert written.keys() == tied.state_dict().keys()
    assert torch.equal(written["head.bias"], tied.head.bias + 1)
    assert torch.equal(written["other_name.bias"], written["head.bias"])
    assert written["head.bias"].dtype == torch.float16
    for wrong in ({"tail.bias": torch.zeros(5)}, {"head.bias": torch.zeros(6)}):
        with pytest.raises(BackdoorscanError, match=r"tail\.bias|repaired weights"):
            loader.write(artifact, wrong, tmp_path / "wrong.pt")
    assert not (tmp_path / "wrong.pt").exists()
