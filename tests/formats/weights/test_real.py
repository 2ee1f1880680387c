"""Networks that others trained, against the accuracies measured when they were collected."""

from pathlib import Path

import numpy as np
import pytest
import torch

from backdoorscan.artifact import Artifact
from backdoorscan.formats.weights.loader import TorchStateDict

SHARED = Path(__file__).resolve().parents[4] / "shared"
MODELS = SHARED / "models"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not MODELS.is_dir(), reason=f"there is no folder {MODELS} with real models"),
]

PLAIN = (0.0, 1.0)
SIGNED = (0.5, 0.5)
RAW = (0.0, 1 / 255)
MNIST = (0.1307, 0.3081)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

CASES = [
    ("mnist/verazuo_badnet_to_1.pth", "verazuo_mnist", SIGNED, 98.08),
    ("mnist/shihaozhao_badnet_to_0.pth", "ShihaozhaoNet", RAW, 98.88),
    ("mnist/zkp1_badnet_to_0.pth", "Zkp1Net", MNIST, 99.07),
    pytest.param("mnist/zkp1_clean.pth", "Zkp1Net", MNIST, 99.00, marks=pytest.mark.slow),
    ("cifar10/verazuo_badnet_to_1.pth", "verazuo_cifar10", SIGNED, 50.56),
    pytest.param("cifar10/akamaster_resnet20_clean.th", "CifarResNet20", IMAGENET, 81.03, marks=pytest.mark.slow),
    ("fashion/clean0.pt", "FashionNet", PLAIN, 89.4),
    ("fashion/clean1.pt", "FashionNet", PLAIN, 88.8),
    ("fashion/bad0.pt", "FashionNet", PLAIN, 89.1),
    ("fashion/bad1.pt", "FashionNet", PLAIN, 88.0),
]
DATA = {"mnist": "mnist", "cifar10": "cifar10_jpeg", "fashion": "fashion_mnist"}


def accuracy(network: torch.nn.Module, folder: str, scaling: tuple[object, object]) -> float:
    with np.load(SHARED / "data" / f"{DATA[folder]}.npz") as data:
        x, y = torch.from_numpy(data["x_test"]), torch.from_numpy(data["y_test"]).long()
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in scaling)
    right = 0
    with torch.no_grad():
        for images, labels in zip(x.split(500), y.split(500), strict=True):
            right += int((network((images / 255 - mean) / std).argmax(1) == labels.flatten()).sum())
    return 100 * right / len(y)


@pytest.mark.parametrize(("file", "name", "scaling", "expected"), CASES)
def test_accuracy_and_round_trip(
    tmp_path: Path, file: str, name: str, scaling: tuple[object, object], expected: float
) -> None:
    artifact, arch = Artifact.read(MODELS / file), f"{MODELS / 'architectures.py'}:{name}"
    assert TorchStateDict().accepts(artifact)
    loaded = TorchStateDict().load(artifact, arch)
    assert loaded.details["traced"] and loaded.details["compared"]
    assert loaded.num_classes == 10
    assert loaded.input_shape == (3 if "cifar10" in file else 1, None, None)
    measured = accuracy(loaded.network, file.split("/")[0], scaling)
    print(f"{file}: {measured:.2f} (expected {expected})")
    assert measured == pytest.approx(expected, abs=0.2)

    weights = {key: value.clone() for key, value in loaded.network.state_dict().items()}
    first = next(key for key in weights if key.endswith("weight"))
    weights[first][0] = 0
    TorchStateDict().write(artifact, weights, tmp_path / "out.pt", arch)
    again = TorchStateDict().load(Artifact.read(tmp_path / "out.pt"), arch).network.state_dict()
    assert all(torch.equal(again[key], weights[key]) for key in weights)
