"""Networks of any origin as .pt2 files."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from torch import fx, nn

from backdoorscan.errors import UnsupportedModelError
from backdoorscan.formats.pt2.export import export
from backdoorscan.formats.pt2.parse import extra

SCRIPT = """
import hashlib, torch
from torch import nn
from backdoorscan.formats.pt2.export import export
torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
print(hashlib.sha256(export(network, torch.zeros(2, 3, 4, 4))).hexdigest())
"""


def test_torch_and_we_read_it_back(resnet, load):
    data = export(fx.symbolic_trace(resnet), torch.rand(3, 3, 16, 16), {"note": "of the user"})
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        expected = resnet(images)
        torch.testing.assert_close(load(data).network(images), expected)
        torch.testing.assert_close(torch.export.load(io.BytesIO(data)).module()(images), expected)
    assert load(data).network.state_dict().keys() == resnet.state_dict().keys()
    assert extra(data, "note") == "of the user"
    assert extra(data, "nothing") is None


def test_a_network_that_was_read_can_be_exported(resnet_file, load):
    loaded = load(resnet_file).network
    again = load(export(loaded, torch.rand(2, 3, 16, 16))).network
    images = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(again(images), loaded(images))
    assert again.state_dict().keys() == loaded.state_dict().keys()


def test_the_same_network_gives_the_same_bytes():
    runs = [subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True) for _ in "ab"]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout) == 65


def test_it_says_nothing_of_where_it_was_made(resnet):
    data = export(resnet, torch.rand(2, 3, 16, 16))
    assert b".py" not in data
    assert b"forward" not in data.replace(b"forward_arg_names", b"")


def test_what_cannot_be_followed():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedModelError, match="cannot be exported"):
        export(Branching(), torch.rand(2, 4))
