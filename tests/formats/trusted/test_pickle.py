"""Pickled networks: refused, or unpickled in the sandbox."""

from __future__ import annotations

import argparse
import pickle
import sys
from pathlib import Path

import pytest
import torch

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError, UsageError
from backdoorscan.formats.trusted import apart


def saved(content, path, kind):
    if kind == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_the_scores_are_those_of_the_network(kind, net, source, read, agree, tmp_path):
    path = saved({"model": net, "epoch": 3} if kind == "legacy" else net, tmp_path / "m.pt", kind)
    with pytest.raises(UnsafeModelError) as caught:
        read(path, trust=False)
    assert "--trust" in caught.value.hint
    loaded = read(path, trust=True, arch=f"{source}:Net")
    agree(loaded, net)
    assert loaded.facts["converted_from"] == "pickle" and loaded.facts["converted_to"] == "pt2"


def test_a_class_of_a_script(nets, net, source, read, agree, tmp_path, monkeypatch):
    monkeypatch.setattr(nets.Net, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Net", nets.Net, raising=False)
    agree(read(saved(net, tmp_path / "m.pt", "zip"), trust=True, arch=f"{source}:Net"), net)


def test_a_class_that_is_not_at_hand(net, source, read, tmp_path):
    path = saved(net, tmp_path / "m.pt", "zip")
    with pytest.raises(UsageError, match="not at hand") as caught:
        read(path, trust=True)
    assert "mynet" in caught.value.why and "--arch" in caught.value.hint and str(path) in caught.value.what
    with pytest.raises(UsageError, match="no architecture file"):
        read(path, trust=True, arch=f"{tmp_path}/absent.py:Net")
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        read(path, trust=True, arch=f"{tmp_path}/broken.py:Net")
    assert "ZeroDivisionError" in caught.value.why
    assert str(source.parent) not in sys.path and str(tmp_path) not in sys.path


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_it_runs_stays_in_the_sandbox(net, source, read, tmp_path):
    outside = tmp_path / "outside"
    path = saved({"model": net, "x": Touch(outside)}, tmp_path / "m.pt", "zip")
    with pytest.raises(UnsafeModelError):
        read(path, trust=False, arch=f"{source}:Net")
    assert not outside.exists()
    confinement = apart.confinement()
    if confinement != "no files, no network":
        pytest.skip(f"this system: {confinement}")
    with pytest.raises(ArtifactError):
        read(path, trust=True, arch=f"{source}:Net")
    assert not outside.exists()
    torch.load(path, weights_only=False)
    assert outside.exists(), "the pickle is not hostile after all"


def test_weights_beside_other_objects(net, source, read, agree, tmp_path):
    content = {"state_dict": net.state_dict(), "args": argparse.Namespace(lr=0.1), "sizes": [(1, 2), 3]}
    path = saved(content, tmp_path / "m.pt", "zip")
    with pytest.raises(UnsafeModelError):
        read(path, trust=False, arch=f"{source}:Net")
    loaded = read(path, trust=True, arch=f"{source}:Net")
    agree(loaded, net)
    assert loaded.facts["converted_to"] == "torch-state-dict"


def test_what_can_be_read_as_data_is_not_converted(net, source, read, agree, tmp_path):
    loaded = read(saved(net.state_dict(), tmp_path / "m.pt", "zip"), trust=True, arch=f"{source}:Net")
    agree(loaded, net)
    assert loaded.facts["format"] == "torch-state-dict" and "trusted" not in loaded.facts


def test_what_is_no_network_to_scan(net, source, read, tmp_path):
    with pytest.raises(UnsupportedModelError, match="2 networks"):
        read(saved({"a": net, "b": net}, tmp_path / "m.pt", "zip"), trust=True, arch=f"{source}:Net")
    with pytest.raises(ArtifactError, match="no dictionary of tensors"):
        read(saved(argparse.Namespace(a=1), tmp_path / "n.pt", "zip"), trust=True)
