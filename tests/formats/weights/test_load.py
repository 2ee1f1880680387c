from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import fx, nn

from backdoorscan.errors import ArtifactError, UnsupportedModelError, UsageError
from backdoorscan.formats.weights.loader import Safetensors, TorchStateDict
from backdoorscan.formats.weights.names import find_state_dicts
from backdoorscan.formats.weights.pickles import Leaf

LEGACY = {"_use_new_zipfile_serialization": False}
Images = Callable[..., torch.Tensor]


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_state_dict(workshop: Any, images: Images, options: dict[str, Any]) -> None:
    net = workshop.net("Net")
    loaded = TorchStateDict().load(workshop.save(net.state_dict(), **options), workshop.arch("Net"))
    assert isinstance(loaded.network, fx.GraphModule) and not loaded.network.training
    assert loaded.network.state_dict().keys() == net.state_dict().keys()
    assert isinstance(loaded.network.get_submodule("bn"), nn.BatchNorm2d)
    for batch in (1, 3):
        x = images(batch, 3, 9, 9)
        assert torch.equal(loaded.network(x), net(x))
    assert (loaded.input_shape, loaded.layout, loaded.num_classes) == ((3, None, None), "NCHW", 4)
    assert loaded.details["traced"] and loaded.details["compared"] and not loaded.details["renamed"]


def test_safetensors_of_another_precision(workshop: Any, images: Images) -> None:
    net = workshop.net("Net")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        data = safetensors.torch.save(net.to(dtype).state_dict(), {"format": "pt"})
        loaded = Safetensors().load(workshop.put(data), workshop.arch("Net"))
        assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
        assert loaded.details["converted_from"] == [str(dtype)]
        assert torch.equal(loaded.network.get_parameter("conv.weight"), net.get_parameter("conv.weight").float())


def test_requires_grad_is_kept_and_the_architecture_is_widened(workshop: Any) -> None:
    loaded = TorchStateDict().load(workshop.save(workshop.net("Net").state_dict()), workshop.arch("frozen"))
    grads = {name: p.requires_grad for name, p in loaded.network.named_parameters()}
    assert grads == {"conv.weight": False, "bn.weight": True, "bn.bias": True, "fc.weight": True, "fc.bias": True}
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"epoch": torch.tensor(3), "model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda s: {"net": {"weights": s}},
        lambda s: {"acc": torch.tensor(1), "state_dict": [s]},
        lambda s: {"model_state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
        lambda s: {k.replace("conv.", "conv._orig_mod.").replace("fc.", "fc.module."): v for k, v in s.items()},
        lambda s: {k: v.double() for k, v in s.items() if "num_batches" not in k},
        lambda s: {"anything": s, "ema": {k: v + 1 for k, v in s.items() if k != "fc.bias"}},
    ],
)
def test_checkpoints(workshop: Any, images: Images, wrap: Callable[[Any], Any]) -> None:
    net = workshop.net("Net")
    loaded = TorchStateDict().load(workshop.save(wrap(net.state_dict())), workshop.arch("Net"))
    x = images(2, 3, 9, 9)
    assert torch.equal(loaded.network(x), net(x))
    assert loaded.network.state_dict().keys() == net.state_dict().keys()


def test_the_likelier_of_two_fitting_state_dicts(workshop: Any) -> None:
    state = workshop.net("Net").state_dict()
    ema = {key: value + 1 for key, value in state.items()}
    loaded = TorchStateDict().load(workshop.save({"ema": ema, "state_dict": state}), workshop.arch("Net"))
    assert torch.equal(loaded.network.get_parameter("fc.bias"), state["fc.bias"])
    assert (loaded.details["state_dict"], loaded.details["also_fitting"]) == ("['state_dict']", ["['ema']"])


def test_the_search_ends_on_containers_that_repeat_each_other() -> None:
    leaf = Leaf(None, "sparse", 0, (), ())
    knot: list[Any] = [{"w": leaf}]
    for _ in range(4):
        knot = [knot] * 1000
    assert find_state_dicts(knot) == []
    loop: dict[str, Any] = {"w": leaf}
    loop["self"] = loop
    assert len(find_state_dicts(loop)) == 1


def test_without_an_architecture(workshop: Any) -> None:
    artifact = workshop.save({"epoch": torch.tensor(1), "state_dict": workshop.net("Net").state_dict()})
    with pytest.raises(UsageError) as caught:
        TorchStateDict().load(artifact, None)
    assert "conv.weight (6, 3, 3, 3)" in caught.value.why and "and 3 more" in caught.value.why
    assert "--arch" in caught.value.hint


def test_weights_of_another_architecture(workshop: Any) -> None:
    state = dict(workshop.net("Net").state_dict())
    state["head.weight"] = state.pop("fc.weight")
    state["fc.bias"] = torch.zeros(7)
    with pytest.raises(ArtifactError) as caught:
        TorchStateDict().load(workshop.save(state), workshop.arch("Net"))
    assert "Missing in the file: fc.weight." in caught.value.why
    assert "Unexpected in the file: head.weight." in caught.value.why
    assert "fc.bias ((7,), (4,))" in caught.value.why


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(3), {}])
def test_files_without_weights(workshop: Any, content: Any) -> None:
    with pytest.raises(ArtifactError, match="no dictionary of tensors"):
        TorchStateDict().load(workshop.save(content), workshop.arch("Net"))


def test_tensors_that_are_no_plain_weights(workshop: Any) -> None:
    state = workshop.net("Net").state_dict()
    state["fc.bias"] = state["fc.bias"].to(torch.complex64)
    with pytest.raises(UnsupportedModelError, match="complex"):
        TorchStateDict().load(workshop.save(state), workshop.arch("Net"))


def test_an_untraceable_network_is_returned_as_it_is(workshop: Any, images: Images) -> None:
    net = workshop.net("Branching")
    loaded = TorchStateDict().load(workshop.save(net.state_dict()), workshop.arch("Branching"))
    assert type(loaded.network).__name__ == "Branching" and not loaded.network.training
    assert torch.equal(loaded.network(images(2, 4)), net(images(2, 4)))
    assert not loaded.details["traced"] and "TraceError" in loaded.details["trace_error"]
    assert loaded.input_shape is None


def test_constants_are_no_weights(workshop: Any, images: Images) -> None:
    net = workshop.net("Scaled")
    loaded = TorchStateDict().load(workshop.save(net.state_dict()), workshop.arch("Scaled"))
    assert loaded.network.state_dict().keys() == {"conv.weight", "conv.bias"}
    assert loaded.details["unused"] == ["unused.bias", "unused.weight"]
    assert torch.equal(loaded.network(images(2, 3, 8, 8)), net(images(2, 3, 8, 8)))
    assert loaded.num_classes is None


def test_own_kinds_of_layers_stay_layers_and_trainable(workshop: Any, images: Images) -> None:
    net = workshop.net("OwnLayer")
    loaded = TorchStateDict().load(workshop.save(net.state_dict()), workshop.arch("OwnLayer"))
    assert isinstance(loaded.network.get_submodule("conv"), nn.Conv2d)
    assert loaded.input_shape == (1, None, None)
    loaded.network(images(2, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None for p in loaded.network.parameters())


def test_a_flat_network(workshop: Any, images: Images) -> None:
    net = workshop.net("mlp")
    loaded = TorchStateDict().load(workshop.save(net.state_dict()), workshop.arch("mlp"))
    assert (loaded.input_shape, loaded.num_classes, loaded.details["compared"]) == (None, 3, True)
    assert torch.equal(loaded.network(images(2, 3, 2, 2)), net(images(2, 3, 2, 2)))


def test_tied_weights_stay_tied(workshop: Any) -> None:
    net = workshop.net("Tied")
    loaded = TorchStateDict().load(workshop.save(net.state_dict()), workshop.arch("Tied"))
    first, second = (loaded.network.get_parameter(f"{name}.weight") for name in ("first", "second"))
    assert first is second
    assert (loaded.input_shape, loaded.num_classes) == ((4,), 4)
    once = {key: value.clone() for key, value in net.state_dict().items() if key != "second.weight"}
    again = Safetensors().load(workshop.put(safetensors.torch.save(once)), workshop.arch("Tied"))
    assert torch.equal(again.network.get_parameter("second.weight"), net.get_parameter("first.weight"))


def test_tied_weights_that_differ_in_the_file(workshop: Any) -> None:
    state = dict(workshop.net("Tied").state_dict())
    state["first.weight"] = state["first.weight"] + 1
    with pytest.raises(ArtifactError, match="tied"):
        TorchStateDict().load(workshop.save(state), workshop.arch("Tied"))


@pytest.mark.parametrize(("name", "said"), [("Pair", "returns a tuple"), ("Map", r"a tensor \(2, 2, 30, 30\)")])
def test_networks_that_are_no_classifiers(workshop: Any, name: str, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        TorchStateDict().load(workshop.save(workshop.net(name).state_dict()), workshop.arch(name))


def test_lazy_layers_are_explained(workshop: Any) -> None:
    with pytest.raises(UsageError, match="lazy"):
        TorchStateDict().load(workshop.save({"0.weight": torch.zeros(3, 2)}), workshop.arch("lazy"))


def test_the_caller_s_random_numbers_are_left_alone(workshop: Any) -> None:
    artifact = workshop.save(workshop.net("mlp").state_dict())
    torch.manual_seed(5)
    first = torch.rand(1)
    TorchStateDict().load(artifact, workshop.arch("mlp"))
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), first)
