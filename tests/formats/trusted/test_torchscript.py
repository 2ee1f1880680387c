"""TorchScript archives: refused, or run in the sandbox."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, ImagesError, UnsafeModelError, UsageError
from backdoorscan.formats import sandbox
from backdoorscan.formats.loading import ReadOptions, load_model
from backdoorscan.formats.pt2.loader import Pt2
from backdoorscan.formats.trusted import apart

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")


@pytest.mark.parametrize("kind", ["script", "trace"])
def test_the_scores_are_those_of_the_archive(kind, net, read, agree, tmp_path):
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.script(net) if kind == "script" else torch.jit.trace(net, torch.zeros(1, 3, 8, 8)), path)
    with pytest.raises(UnsafeModelError, match="TorchScript") as caught:
        read(path, trust=False)
    assert "--trust" in caught.value.hint
    loaded = read(path, trust=True)
    agree(loaded, net)
    facts = loaded.facts
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (facts["format"], facts["converted_from"], facts["converted_to"]) == ("converted", "torchscript", "pt2")
    assert facts["trusted"] is True and facts["converted_by"] == {"torch": torch.__version__}
    assert dict(loaded.classifier.network.named_modules())["conv"].weight.equal(net.conv.weight)


class Writing(nn.Module):
    """Writes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), state[0])


def test_what_it_runs_stays_in_the_sandbox(net, read, agree, tmp_path):
    outside = tmp_path / "outside"
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.script(nn.Sequential(Writing(str(outside)), net)), path)
    with pytest.raises(UnsafeModelError):
        read(path, trust=False)
    assert not outside.exists()
    confinement = apart.confinement()
    if confinement != "no files, no network":
        pytest.skip(f"this system: {confinement}")
    agree(read(path, trust=True), net)  # TorchScript goes on where it cannot write
    assert not outside.exists()
    torch.jit.load(path)
    assert outside.exists(), "the archive is not hostile after all"


def test_what_would_have_to_be_known(net, read, tmp_path):
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.script(net), path)
    with pytest.raises(ImagesError, match="how large"):
        load_model(path, None, ReadOptions(trust=True))
    with pytest.raises(UsageError, match="its own architecture"):
        read(path, trust=True, arch="x.py:Net")
    with pytest.raises(ArtifactError, match="none of these images") as caught:
        load_model(path, None, ReadOptions(input_shape=(1, 5, 5), trust=True))
    assert str(path) in caught.value.what and caught.value.hint


def test_repaired_weights_go_into_a_copy_of_what_it_was_converted_to(net, read, tmp_path):
    path, out = tmp_path / "m.pt", tmp_path / "out.pt2"
    torch.jit.save(torch.jit.script(net), path)
    loaded = read(path, trust=True)
    weights = {name: tensor.clone() for name, tensor in loaded.classifier.network.state_dict().items()}
    weights["fc.bias"] += 1
    assert loaded.suffix == out.suffix
    loaded.loader.write(loaded.artifact, weights, out)
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        scores = Pt2().load(Artifact.read(out), None).network(images)
        assert torch.allclose(scores, net(images) + 1, atol=1e-5)


def test_without_a_sandbox_nothing_is_converted(net, read, tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.script(net), path)
    monkeypatch.setattr(sandbox, "available", lambda: False)
    with pytest.raises(UnsafeModelError, match="not converted") as caught:
        read(path, trust=True)
    assert "no sandbox" in caught.value.why


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_helper_has_one_thread(net, read, tmp_path):
    """One with several could not be forked safely."""
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.script(net), path)
    read(path, trust=True)
    process = apart._HELPERS["backdoorscan.formats.trusted.pytorch"]._process
    assert process is not None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *children):
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
