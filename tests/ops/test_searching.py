"""What every search over inputs shares."""

import subprocess
import sys

import torch

from backdoorscan.ops.searching import Descent

ALONE = """
import sys, torch
from backdoorscan.ops.searching import Descent
place = torch.ones(3, requires_grad=True)
Descent([place], 0.1).step(place.square().sum())
print(float(place.detach().sum()), "torch._dynamo" in sys.modules)
"""


def slope(places):
    first, second = places
    return (first - 1).square().sum() + (first.mean() * second).pow(4).sum()


def test_it_goes_where_adam_goes():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(4, 3, generator=generator), torch.randn(2, generator=generator)]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))
    descent, adam = Descent(ours, 0.15), torch.optim.Adam(theirs, lr=0.15, betas=(0.5, 0.9))
    for _ in range(25):
        descent.step(slope(ours))
        adam.zero_grad()
        slope(theirs).backward()
        adam.step()
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(ours, start, strict=True))


def test_a_search_does_not_import_the_compiler():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    total, imported = done.stdout.split()
    assert float(total) < 3
    assert imported == "False"
