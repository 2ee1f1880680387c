"""Networks by name, with stand-ins for the packages that have them."""

import sys
import types
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from backdoorscan.errors import ArtifactError, UsageError
from backdoorscan.formats.weights import zoo
from backdoorscan.formats.weights.loader import Safetensors


class Named(nn.Module):
    def __init__(self, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 4, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.bn1(self.conv1(x))).mean((2, 3)))


class Branched(Named):
    """As inception_v3: with a side branch unless told otherwise."""

    def __init__(self, aux_logits: bool = True, init_weights: bool | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        assert init_weights is False, "slow random weights are of no use"
        if aux_logits:
            self.aux = nn.Linear(4, settings.get("num_classes", 1000))
            self.fc = self._modules.pop("fc")  # the head stays last


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    timm: Any = types.ModuleType("timm")
    timm.list_models = lambda: ["named", "nested"]
    timm.is_model = lambda name: name.partition(".")[0] == "named"

    def create_model(name: str, pretrained: bool, **settings: Any) -> nn.Module:
        assert pretrained is False, "published weights are never downloaded"
        return Named(**settings)

    timm.create_model = create_model
    torchvision: Any = types.ModuleType("torchvision")
    models: Any = types.ModuleType("torchvision.models")

    def get_model(name: str, weights: None, **settings: Any) -> nn.Module:
        assert weights is None
        return (Branched if name == "inception_v3" else Named)(**settings)

    models.get_model, models.list_models = get_model, lambda module: ["named", "inception_v3"]
    torchvision.models = models
    for name, module in (("timm", timm), ("torchvision", torchvision), ("torchvision.models", models)):
        monkeypatch.setitem(sys.modules, name, module)


def weights(workshop: Any, net: nn.Module, prefix: str = "") -> Any:
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    return workshop.put(safetensors.torch.save(state), "w.safetensors")


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("arch", ["timm:named", "timm:named.tag_in1k", "torchvision:named"])
@pytest.mark.parametrize(("classes", "channels"), [(1000, 3), (10, 3), (7, 1), (1000, 4)])
def test_classes_and_channels_are_the_file_s_own(workshop: Any, arch: str, classes: int, channels: int) -> None:
    net = Named(classes, channels).eval()
    loaded = Safetensors().load(weights(workshop, net, "module."), arch)
    x = torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.network(x), net(x))
    assert (loaded.num_classes, loaded.input_shape) == (classes, (channels, None, None))
    assert loaded.details["arch"] == arch


@pytest.mark.usefixtures("packages")
def test_it_is_found_again_for_writing(workshop: Any, tmp_path: Any) -> None:
    artifact = weights(workshop, Named(5, 1))
    Safetensors().write(artifact, {"fc.bias": torch.ones(5)}, tmp_path / "out", "timm:named")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out")["fc.bias"], torch.ones(5))


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("aux", [False, True])
def test_side_branches_as_the_file_has_them(workshop: Any, aux: bool) -> None:
    net = Branched(aux, init_weights=False, num_classes=5)
    loaded = Safetensors().load(weights(workshop, net), "torchvision:inception_v3")
    assert loaded.num_classes == 5 and loaded.details["unused"] == (["aux.bias", "aux.weight"] if aux else [])


@pytest.mark.usefixtures("packages")
def test_other_weights_do_not_fit(workshop: Any) -> None:
    net = Named()
    net.conv1 = nn.Conv2d(3, 4, 5)
    with pytest.raises(ArtifactError, match="does not fit --arch timm:named") as caught:
        Safetensors().load(weights(workshop, net), "timm:named")
    assert "conv1.weight" in caught.value.why


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("arch", "hint"),
    [
        ("timm:naned", "Did you mean named"),
        ("torchvision:name", "Did you mean named"),
        ("timm:qqqq", "documentation"),
        ("timm:hf-hub:user/named", "documentation"),
        ("timm:", "documentation"),
    ],
)
def test_unknown_names(workshop: Any, arch: str, hint: str) -> None:
    with pytest.raises(UsageError, match="has no classifier") as caught:
        Safetensors().load(weights(workshop, Named()), arch)
    assert hint in caught.value.hint


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_packages_that_are_not_installed(workshop: Any, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UsageError, match=package) as caught:
        Safetensors().load(weights(workshop, Named()), f"{package}:resnet18")
    assert f"pip install 'backdoorscan[{package}]'" in caught.value.hint


def test_a_torchvision_without_its_operators(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the build of PyPI beside a torch for CPUs: the import asks for an operator that nobody has registered."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import operators\nREADY = True\n")
    (package / "operators.py").write_text(
        "import torch\ntorch.library.register_fake('torchvision::nms')(lambda *_: 1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("torchvision", "torchvision.operators"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert zoo.import_torchvision().READY
    for name in ("torchvision", "torchvision.operators"):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(("text", "said"), [("raise RuntimeError('no CUDA')", "no CUDA"), ("1 / 0", "ZeroDivision")])
def test_a_broken_package(workshop: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    (tmp_path / "torchvision.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        Safetensors().load(weights(workshop, Named()), "torchvision:resnet18")
    assert said in caught.value.why
