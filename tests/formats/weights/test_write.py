import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, OutputError
from backdoorscan.formats.weights.loader import Safetensors, TorchStateDict

LEGACY = {"_use_new_zipfile_serialization": False}
ARCH = pytest.mark.parametrize("with_arch", [False, True])


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def pruned(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    weights["conv.weight"][2] = 0
    weights["bn.running_mean"] += 1
    return weights


@ARCH
@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_checkpoint_round_trip(workshop: Any, tmp_path: Path, options: dict[str, Any], with_arch: bool) -> None:
    state = {f"module.{key}": value for key, value in workshop.net("Net").state_dict().items()}
    adam = torch.optim.Adam(workshop.net("Net").parameters()).state_dict()
    content = {"epoch": 7, "state_dict": state, "optimizer": adam, "best": torch.tensor(0.5), "notes": ["a", (1, None)]}
    artifact = workshop.save(content, **options)
    network = TorchStateDict().load(artifact, workshop.arch("Net")).network
    weights, out = pruned(network), tmp_path / "out.pt"
    TorchStateDict().write(artifact, weights, out, arch=workshop.arch("Net") if with_arch else None)

    copy, original = read(out), read(artifact.path)
    assert list(copy) == list(original) and list(copy["state_dict"]) == list(state)
    assert (copy["epoch"], copy["notes"], copy["optimizer"]) == (7, ["a", (1, None)], original["optimizer"])
    different = {key for key in state if not torch.equal(copy["state_dict"][key], original["state_dict"][key])}
    assert different == {"module.conv.weight", "module.bn.running_mean"}
    again = TorchStateDict().load(Artifact.read(out), workshop.arch("Net")).network.state_dict()
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    assert artifact.path.read_bytes() == artifact.data
    assert not list(tmp_path.glob(".*"))


def test_the_same_weights_give_the_same_bytes(workshop: Any, tmp_path: Path) -> None:
    artifact = workshop.save(workshop.net("Net").state_dict(), **LEGACY)
    weights = pruned(workshop.net("Net"))
    for name in ("one.pt", "another_name.pt"):
        TorchStateDict().write(artifact, weights, tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another_name.pt").read_bytes()
    assert getattr(read(tmp_path / "one.pt"), "_metadata", None) == workshop.net("Net").state_dict()._metadata


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_torch_file_changes_only_where_its_weights_changed(
    workshop: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    artifact = workshop.save({"state_dict": workshop.net("Net").state_dict(), "rng": torch.get_rng_state()}, **options)
    weights = {key: value.clone() for key, value in workshop.net("Net").state_dict().items()}
    weights["fc.bias"][1] = 7.0
    TorchStateDict().write(artifact, weights, tmp_path / "out.pt")
    old, new = artifact.data, (tmp_path / "out.pt").read_bytes()
    assert len(old) == len(new)
    different = [i for i in range(len(old)) if old[i] != new[i]]
    # Four bytes of the number, and of its checksum behind the member and in the table of contents.
    assert 1 <= len(different) <= (4 if options else 12)
    if not options:
        with zipfile.ZipFile(tmp_path / "out.pt") as archive:
            assert archive.testzip() is None


def test_an_archive_of_another_zip_writer(workshop: Any, tmp_path: Path) -> None:
    """Checksums in front of the members, as those write them who know them beforehand."""
    place = tmp_path / "again.pt"
    with (
        zipfile.ZipFile(workshop.save(workshop.net("Net").state_dict()).path) as old,
        zipfile.ZipFile(place, "w") as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    weights = pruned(workshop.net("Net"))
    TorchStateDict().write(Artifact.read(place), weights, tmp_path / "out.pt")
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
    assert all(torch.equal(value, weights[key]) for key, value in read(tmp_path / "out.pt").items())


def test_views_of_one_storage_stay_views(workshop: Any, tmp_path: Path) -> None:
    memory = torch.arange(40.0)
    state = {"0.weight": memory[:12].view(4, 3).t(), "0.bias": memory[20:26:2], "rest": memory}
    artifact = workshop.save({"model": {key: state[key] for key in ("0.weight", "0.bias")}, "all": state["rest"]})
    TorchStateDict().write(artifact, {"0.weight": -state["0.weight"], "0.bias": torch.zeros(3)}, tmp_path / "out.pt")
    copy = read(tmp_path / "out.pt")
    expected = torch.cat([-memory[:12], memory[12:]])
    expected[20:26:2] = 0
    assert torch.equal(copy["all"], expected)
    assert torch.equal(copy["model"]["0.weight"], -state["0.weight"]) and copy["model"]["0.weight"].stride() == (1, 3)


def test_safetensors_change_only_their_tensor(workshop: Any, tmp_path: Path) -> None:
    state = workshop.net("Net").half().state_dict()
    artifact = workshop.put(safetensors.torch.save(state, {"licence": "none", "format": "pt"}), "w.safetensors")
    network = Safetensors().load(artifact, workshop.arch("Net")).network
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    weights["conv.weight"][1] = 0
    weights["bn.num_batches_tracked"] += 2
    out = tmp_path / "out.safetensors"
    Safetensors().write(artifact, weights, out)
    data = out.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    assert len(data) == len(artifact.data) and data[:length] == artifact.data[:length]
    with safetensors.safe_open(out, "pt") as file:
        assert file.metadata() == {"licence": "none", "format": "pt"}
    copy = safetensors.torch.load(data)
    assert {key: value.dtype for key, value in copy.items()} == {key: value.dtype for key, value in state.items()}
    assert copy["conv.weight"][1].abs().sum() == 0 and copy["bn.num_batches_tracked"] == 2
    assert {key for key in state if not torch.equal(copy[key], state[key])} == {"conv.weight", "bn.num_batches_tracked"}


def test_half_precision_is_kept(workshop: Any, tmp_path: Path) -> None:
    artifact = workshop.save(workshop.net("Net").half().state_dict())
    network = TorchStateDict().load(artifact, workshop.arch("Net")).network
    weights = dict(network.state_dict())
    weights["fc.bias"] = torch.full((4,), 1 / 3)
    TorchStateDict().write(artifact, weights, tmp_path / "out.pt")
    copy, original = read(tmp_path / "out.pt"), read(artifact.path)
    assert torch.equal(copy["fc.bias"], torch.full((4,), 1 / 3).half())
    assert all(torch.equal(copy[key], original[key]) for key in original if key != "fc.bias")
    weights["fc.bias"] = torch.full((4,), 1e9)
    with pytest.raises(ArtifactError, match="beyond the range"):
        TorchStateDict().write(artifact, weights, tmp_path / "out.pt")


@ARCH
def test_tied_weights(workshop: Any, tmp_path: Path, with_arch: bool) -> None:
    arch = workshop.arch("Tied") if with_arch else None
    artifact = workshop.save(workshop.net("Tied").state_dict())
    weights = {name: torch.ones(4, 4) for name in ("first.weight", "second.weight")}
    TorchStateDict().write(artifact, weights, tmp_path / "out.pt", arch)
    copy = read(tmp_path / "out.pt")
    assert copy["first.weight"].data_ptr() == copy["second.weight"].data_ptr()
    assert torch.equal(copy["second.weight"], torch.ones(4, 4))
    weights["second.weight"] = torch.zeros(4, 4)
    with pytest.raises(ArtifactError, match="shares its memory" if not with_arch else "cannot be written|shares"):
        TorchStateDict().write(artifact, weights, tmp_path / "no.pt")
    assert not (tmp_path / "no.pt").exists()


def test_every_name_of_a_layer_is_written(workshop: Any, tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in workshop.net("Twice").state_dict().items()}
    artifact = workshop.put(safetensors.torch.save(state))
    network = Safetensors().load(artifact, workshop.arch("Twice")).network
    assert network.state_dict().keys() == {"a.weight", "a.bias"}
    Safetensors().write(artifact, {"a.weight": torch.ones(4, 4)}, tmp_path / "o.safetensors", workshop.arch("Twice"))
    again = Safetensors().load(Artifact.read(tmp_path / "o.safetensors"), workshop.arch("Twice")).network
    assert torch.equal(again.get_parameter("a.weight"), torch.ones(4, 4))


@ARCH
@pytest.mark.parametrize(
    ("name", "shape"), [("conv.bias", (6,)), ("nowhere.num_batches_tracked", ()), ("fc.bias", (5,))]
)
def test_tensors_that_the_file_lacks(
    workshop: Any, tmp_path: Path, name: str, shape: tuple[int, ...], with_arch: bool
) -> None:
    artifact = workshop.save(workshop.net("Net").state_dict())
    with pytest.raises(ArtifactError) as caught:
        arch = workshop.arch("Net") if with_arch else None
        TorchStateDict().write(artifact, {name: torch.zeros(shape)}, tmp_path / "out.pt", arch)
    assert name in caught.value.what and "never" in caught.value.hint
    assert not (tmp_path / "out.pt").exists()


def test_a_counter_that_old_files_lack_is_left_out(workshop: Any, tmp_path: Path) -> None:
    state = {key: value for key, value in workshop.net("Net").state_dict().items() if "num_batches" not in key}
    artifact = workshop.save(state)
    TorchStateDict().write(artifact, {"bn.num_batches_tracked": torch.tensor(3)}, tmp_path / "out.pt")
    assert read(tmp_path / "out.pt").keys() == state.keys()


def test_the_wrong_architecture(workshop: Any, tmp_path: Path) -> None:
    artifact = workshop.save(workshop.net("Net").state_dict())
    with pytest.raises(ArtifactError, match="does not fit"):
        TorchStateDict().write(artifact, {}, tmp_path / "out.pt", workshop.arch("Tied"))


def test_a_folder_that_cannot_be_written(workshop: Any, tmp_path: Path) -> None:
    artifact = workshop.save(workshop.net("Net").state_dict())
    with pytest.raises(OutputError, match="Cannot write"):
        TorchStateDict().write(artifact, {}, tmp_path / "absent" / "out.pt")


def test_elements_that_share_their_memory(workshop: Any, tmp_path: Path) -> None:
    state = workshop.net("Net").state_dict()
    state["fc.bias"] = torch.zeros(1).expand(4)
    with pytest.raises(ArtifactError, match="do not fit"):
        TorchStateDict().write(workshop.save(state), {"fc.bias": torch.arange(4.0)}, tmp_path / "out.pt")
