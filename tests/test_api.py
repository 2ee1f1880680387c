"""The functions for Python: on networks and arrays in memory; docs/api.md."""

import ast
import io
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import backdoorscan
from backdoorscan import ReadOptions, RepairOptions, ScanOptions, Verdict, load_images, scan
from backdoorscan.engine.keeping import Keeping
from backdoorscan.errors import BackdoorscanError, ImagesError, OutputError, UnknownNameError, UsageError
from backdoorscan.findings import Finding
from backdoorscan.plugin.testing import planted, planted_images, planted_network, planted_trigger, sample_reports

ROOT = Path(__file__).parents[1]
MANUAL = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SIZES = {"classes": 5, "blocks": 3}
QUICK = ScanOptions(detectors=["neural-cleanse"])


class Stubborn(nn.Module):
    """Cannot be traced: it looks at its input."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if float(x.detach().sum()) >= 0 else self.inner(-x)


class Scaled(nn.Module):
    """Was trained on 0..255."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x / 255)


class Two(nn.Linear):
    """Returns features beside the scores."""

    def __init__(self):
        super().__init__(144, 5)

    def forward(self, x):
        return super().forward(x.flatten(1)), x


class Fragile(nn.Linear):
    """Cannot be copied."""

    def __deepcopy__(self, memo):
        raise RuntimeError("one of a kind")


@pytest.fixture
def images():
    return planted_images(**SIZES, count=60)


@pytest.fixture
def network():
    return planted_network(2, **SIZES)


def attacked(images):
    """All images of other classes with the trigger, labelled with its target."""
    trigger = planted_trigger(2, blocks=3)
    victims = images.take(np.flatnonzero(images.labels != 2))
    stamped = trigger.stamp(torch.from_numpy(victims.pixels) / 255).numpy()
    return replace(victims, pixels=stamped, labels=np.full_like(victims.labels, 2), sha256="")


def test_every_public_name_is_there_and_typed():
    tree = ast.parse(Path(backdoorscan.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == backdoorscan._HOMES
    assert {*typed, "__version__"} == set(backdoorscan.__all__) == set(dir(backdoorscan))
    for name, home in typed.items():
        assert getattr(backdoorscan, name) is getattr(sys.modules[home], name)
    with pytest.raises(AttributeError, match="no attribute 'scam'"):
        backdoorscan.scam  # noqa: B018


def test_a_network_in_memory_is_judged_as_its_file_is(model_file):
    file = model_file(2)
    network = planted_network(2, **SIZES)
    from_file = scan(file.path, file.images, file.read, QUICK).runs[0]
    from_memory = scan(network, file.images, options=QUICK).runs[0]
    assert from_memory.verdict is Verdict.BACKDOORED
    assert [f.to_json() for f in from_memory.findings] == [f.to_json() for f in from_file.findings]
    assert (from_memory.model["format"], from_memory.model["traced"]) == ("torch-module", True)
    assert from_memory.model["path"] == "Sequential.pt"


def test_the_users_network_is_left_alone(network, images):
    network.train()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    scan(network, images, options=ScanOptions(detectors=["head-weights"]))
    assert network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("wrap", [Stubborn, Scaled, nn.Sequential])
def test_other_networks(wrap, network, images):
    wrapped = wrap(network)
    run = scan(wrapped, images, options=QUICK).runs[0]
    assert (run.verdict, [f.target_label for f in run.findings]) == (Verdict.BACKDOORED, [2])
    assert run.model["traced"] is (wrap is not Stubborn)
    assert run.model["input_range"] == ([0, 255] if wrap is Scaled else [0, 1])


def test_a_classifier_is_a_network_too(network, images):
    classifier = backdoorscan.load_classifier(Scaled(network), images)
    again = backdoorscan.load_classifier(classifier, images)
    pixels = torch.from_numpy(images.pixels[:4]) / 255
    assert torch.allclose(classifier(pixels), network(pixels), atol=1e-4)
    assert torch.allclose(again(pixels), network(pixels), atol=1e-4)


def test_without_images_the_size_has_to_be_told(network):
    options = ScanOptions(detectors=["head-weights"])
    run = scan(network, None, ReadOptions(input_shape=(1, 12, 12)), options).runs[0]
    assert run.model["input_shape"] == [1, 12, 12]
    with pytest.raises(ImagesError, match="how large"):
        scan(network, options=options)


@pytest.mark.parametrize("order", ["NCHW", "NHWC", "NHW"])
@pytest.mark.parametrize("kind", ["array", "tensor", "floats"])
def test_images_in_memory(order, kind, images):
    pixels = {"NCHW": images.pixels, "NHWC": images.pixels.transpose(0, 2, 3, 1), "NHW": images.pixels[:, 0]}[order]
    labels = images.labels
    if kind == "tensor":
        pixels, labels = torch.from_numpy(pixels.copy()), torch.from_numpy(labels)
    elif kind == "floats":
        pixels, labels = pixels / 255, np.eye(5)[labels]
    read = load_images((pixels, labels))
    assert read.shape == (1, 12, 12)
    assert np.array_equal(read.labels, images.labels)
    assert np.allclose(read.pixels / (1 if kind == "floats" else 255), images.pixels / 255, atol=1e-6)
    assert len(load_images((pixels, labels), limit=7)) == 7
    assert load_images(images) is images


def test_images_that_are_none():
    with pytest.raises(ImagesError, match="arrays"):
        load_images((np.zeros((3, 8)), np.zeros(3)))
    with pytest.raises(ImagesError, match="arrays"):
        load_images((torch.zeros(3, 1, 8, 8), torch.tensor([0, 1])))


def test_a_repaired_network_comes_back_as_a_state_dict(network, images, tmp_path):
    finding = Finding(target_label=2, p_value=0.0, score=1.0, trigger=planted_trigger(2, blocks=3))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    options = RepairOptions(method="prune", settings={"drop": (2.0,)}, output=tmp_path / "repaired", rescan=False)
    report = backdoorscan.repair(network, images, attacked(images), options=options, findings=[finding])
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    row = next(row for row in report.candidates if row.kind == "repaired")
    (file,) = row.files
    assert Path(file).name == "Sequential_X=2.pt"
    network.load_state_dict(torch.load(file, weights_only=True))
    scores = backdoorscan.evaluate(network, images, attacked(images)).scores
    assert report.before.attack_success_rate == 1
    assert scores.attack_success_rate == row.scores.attack_success_rate < 0.1
    with pytest.raises(OutputError, match="exists already"):
        backdoorscan.repair(network, images, options=options, findings=[finding])


def test_the_folder_of_a_repaired_network_is_named_after_its_class(network, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finding = Finding(target_label=2, p_value=0.0, score=1.0, trigger=planted_trigger(2, blocks=3))
    options = RepairOptions(method="prune", settings={"drop": (2.0,)}, rescan=False)
    backdoorscan.repair(network, images, options=options, findings=[finding])
    assert [path.name for path in tmp_path.iterdir()] == ["Sequential-repaired"]


def test_an_evaluation_says_what_it_measured(network, images):
    report = backdoorscan.evaluate(network, images, attacked(images))
    assert (report.scores.clean_accuracy, report.scores.attack_success_rate) == (1, 1)
    assert (report.model["kind"], report.model["path"]) == ("classifier", "Sequential.pt")
    true_labels = replace(attacked(images), labels=images.labels[images.labels != 2], sha256="")
    assert backdoorscan.evaluate(network, images, true_labels, target=2).scores.attack_success_rate == 1
    with pytest.raises(ImagesError, match="target 5"):
        backdoorscan.evaluate(network, images, target=5)


@pytest.mark.parametrize(
    ("module", "read", "message"),
    [
        (nn.Sequential(nn.LazyLinear(5)), None, "lazy layers"),
        (nn.Sequential(nn.Flatten(), Fragile(144, 5)), None, "cannot be copied"),
        (planted_network(2, **SIZES), ReadOptions(arch="a.py:net"), "arch is for files"),
        (Two(), None, "returns a tuple.*\nWrap it in a module"),
    ],
    ids=["lazy", "fragile", "arch", "no classifier"],
)
def test_networks_that_cannot_be_used(module, read, message, images):
    with pytest.raises(BackdoorscanError, match=message):
        scan(module, images, read, ScanOptions(detectors=["head-weights"]))


def test_a_network_in_memory_is_not_kept(network, images, tmp_path):
    with pytest.raises(UsageError, match="not kept"):
        scan(network, images, options=QUICK, keeping=Keeping(tmp_path, reports=True, resume=False, tell=print))
    assert not list(tmp_path.iterdir())


def test_bad_options_are_told_before_any_work():
    with pytest.raises(UnknownNameError):
        scan(nn.Identity(), "missing.npz", options=ScanOptions(detectors=["neural-cleans"]))
    with pytest.raises(UnknownNameError):
        backdoorscan.repair(nn.Identity(), "missing.npz", options=RepairOptions(method="prun"))


def test_render_gives_what_the_format_gives():
    scanned, evaluated = sample_reports()[1], sample_reports()[-1]
    assert '"verdict": "backdoored"' in backdoorscan.render(scanned, "json")
    assert "\x1b[" in backdoorscan.render(scanned, color=True)
    assert max(map(len, backdoorscan.render(scanned, width=90).splitlines())) <= 90
    with pytest.raises(UsageError, match="sarif has no place"):
        backdoorscan.render(evaluated, "sarif")
    with pytest.raises(UnknownNameError, match="'tabel'"):
        backdoorscan.render(scanned, "tabel")


@pytest.mark.parametrize("report", sample_reports(), ids=lambda report: type(report).__name__)
def test_a_notebook_shows_every_report(report):
    page = report._repr_html_()
    assert page.startswith("<table>")
    assert "0.97" in page or "broken.h5" in page
    assert "\x1b" not in page
    assert "<b>" not in page


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """A folder with the files that docs/api.md speaks of."""
    _, images, _ = planted(2, **SIZES, count=60)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"image": {0: "batch"}, "scores": {0: "batch"}}
        names = {"input_names": ["image"], "output_names": ["scores"], "dynamic_axes": axes}
        torch.onnx.export(planted_network(2, **SIZES), (torch.zeros(2, 1, 12, 12),), buffer, dynamo=False, **names)
    (tmp_path / "model.onnx").write_bytes(buffer.getvalue())
    np.savez(tmp_path / "clean.npz", x=images.pixels, y=images.labels)
    np.savez(tmp_path / "poisoned.npz", x=attacked(images).pixels, y=attacked(images).labels)
    (tmp_path / "mine.py").write_text(
        "from backdoorscan.plugin.testing import planted_network\n"
        f"def make_network():\n    return planted_network(2, **{SIZES})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def test_the_manual_speaks_of_every_public_name():
    public = set(backdoorscan.__all__) - {"__version__", "hookimpl"}
    assert [name for name in sorted(public) if not re.search(rf"\b{name}\b", MANUAL)] == []


@pytest.mark.slow
def test_the_code_of_the_manual_runs(documented, capsys):
    names = {}
    said = []
    for code in re.findall(r"^```python\n(.*?)^```$", MANUAL, re.DOTALL | re.MULTILINE):
        exec(compile(code, "docs/api.md", "exec"), names)
        said.append(capsys.readouterr().out)
    assert said[0].splitlines()[0] == "backdoored"
    assert "model.onnx 2" in said[0]
    assert names["repaired"].candidates[0].scores.reversed_success_rate < 0.1
    accuracy, attack_success = said[5].split()
    assert float(accuracy) > 0.7
    assert float(attack_success) < 0.1
    assert any("missing.h5" in text for text in said)
    assert "head-weights: 100%" in said[-1]
    assert (documented / "scan.html").read_text().startswith("<!DOCTYPE html>")


def test_importing_does_not_import_torch():
    code = "import sys, backdoorscan; backdoorscan.BackdoorscanError; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
