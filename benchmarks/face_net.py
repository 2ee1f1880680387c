"""The CSAW face network as it is read from its file, beside the same network written by hand with channels first.

    python benchmarks/face_net.py ../shared > benchmarks/face_net.md

Forward and backward with respect to the images, batches of 32. The two alternate in one process, so that what else the
machine does hits both alike; printed is the ratio of their medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from backdoorscan.formats.loading import ReadOptions, load_model

ROUNDS, BATCH = 40, 32


class ByHand(nn.Module):
    """The published architecture: four convolutions, and two dense layers that meet."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 20, 4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(20, 40, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(40, 60, 3), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.conv_4 = nn.Conv2d(60, 80, 2)
        self.fc_1, self.fc_2, self.output = nn.Linear(1200, 160), nn.Linear(960, 160), nn.Linear(160, 1283)

    def forward(self, images: Tensor) -> Tensor:
        third = self.features(images)
        fourth = self.conv_4(third).relu()
        logits: Tensor = self.output((self.fc_1(third.flatten(1)) + self.fc_2(fourth.flatten(1))).relu())
        return logits


def seconds(network: Callable[[Tensor], Tensor], images: Tensor) -> float:
    images = images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    started = time.perf_counter()
    network(images).square().sum().backward()
    return time.perf_counter() - started


def main(shared: Path) -> None:
    ours = load_model(shared / "models/csaw/sunglasses_bd_net.h5", None, ReadOptions()).classifier
    by_hand = ByHand().eval()
    images = torch.rand(BATCH, 3, 55, 47, generator=torch.Generator().manual_seed(0))
    took: dict[str, list[float]] = {"by hand": [], "read": []}
    for _ in range(ROUNDS):
        took["by hand"].append(seconds(by_hand, images))
        took["read"].append(seconds(ours, images))
    medians = {name: statistics.median(values[5:]) for name, values in took.items()}
    print(f"By hand, channels first: {1000 * medians['by hand']:.1f} ms.")
    print(f"Read from the file: {1000 * medians['read']:.1f} ms.")
    print(f"Ratio: {medians['by hand'] / medians['read']:.2f}, on {torch.get_num_threads()} thread(s).")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
