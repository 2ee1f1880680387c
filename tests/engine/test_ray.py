"""Units and models on a Ray cluster of two nodes, workers and nodes lost on the way."""

import json
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

from backdoorscan.engine import local, named
from backdoorscan.engine.crew import Died
from backdoorscan.engine.keeping import Keeping
from backdoorscan.errors import MethodError, UnknownNameError, UsageError
from backdoorscan.findings import Unit
from backdoorscan.manifest import Entry
from backdoorscan.plugin.method import Context
from backdoorscan.registry import installed
from backdoorscan.scanning import ScanOptions, scan
from backdoorscan.surveying import survey

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray")

STRANGER = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
import ray
import torch
from backdoorscan import hookimpl
from backdoorscan.errors import UnknownNameError
from backdoorscan.findings import Evidence, Judgement, Unit
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import option

@dataclass(frozen=True, kw_only=True)
class Frail(Detector):
    "Draws seeded numbers in six units; some end the process they run in, fail, or wait for a sign."
    id = "frail"
    cost = 99.0
    default = False
    folder: str = option("", help="Where each unit notes its beginning.")
    deadly: str = option("", help="The unit, or the first logit of the model, that ends its process.")
    lives: int = option(1, help="Times that it does.")
    failing: str = option("", help="The unit that fails; with ! by an error of ours.")
    waiting: bool = option(False, help="Whether units wait for the file go.")

    def units(self, classifier, context):
        return [Unit(str(number), (number % 5,)) for number in range(6)]

    def examine(self, unit, classifier, images, context):
        print("this must not stand in a report")
        if self.folder:
            node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
            (Path(self.folder) / f"{unit.id}.{node}.{os.getpid()}").touch()
        logits = classifier(torch.full((1, *classifier.input_shape), 0.5)).detach()
        if self.deadly in (unit.id, f"bias {float(list(classifier.parameters())[-1].detach()[0]):g}"):
            if len(list(Path(self.folder).glob(f"{unit.id}.*"))) <= self.lives:
                os.kill(os.getpid(), signal.SIGKILL)
        if unit.id == self.failing.strip("!"):
            raise UnknownNameError("layer", "convv", ["conv"]) if "!" in self.failing else ValueError("odd")
        while self.waiting and not (Path(self.folder) / "go").exists():
            time.sleep(0.02)
        numbers = torch.rand(3, generator=context.generator(self.id, unit.id)) + logits[0, 0]
        return Evidence(figures={"numbers": numbers.tolist(), "threads": torch.get_num_threads(),
                                 "mean": float(images.pixels.mean()) if images else 0.0}, gradient_samples=7)

    def judge(self, evidence):
        return Judgement(p_value=0.5)

@hookimpl
def backdoorscan_detectors():
    return [Frail]
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A cluster of two nodes of one core; its workers know the plugin above."""
    from ray.cluster_utils import Cluster as Nodes

    folder = tmp_path_factory.mktemp("stranger")
    info = folder / "stranger-1.dist-info"
    info.mkdir()
    (folder / "stranger_plugin.py").write_text(STRANGER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[backdoorscan]\nstranger = stranger_plugin\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.syspath_prepend(folder)
        installed.cache_clear()
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20}
        nodes = Nodes(initialize_head=True, head_node_args=head)
        nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        yield nodes
        ray.shutdown()
        nodes.shutdown()
        installed.cache_clear()


@pytest.fixture
def engine(nodes):
    return named("ray", nodes.address)


@pytest.fixture
def frail(engine):
    from stranger_plugin import Frail

    return Frail


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in ("cost", "seconds")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def plain(report):
    return json.dumps(without_times(report.to_json()))


def figures(results):
    return {unit.id: part.figures for unit, part in results}


def begun(folder):
    return Counter(file.name.partition(".")[0] for file in folder.glob("*.*"))


def test_the_report_is_the_same_to_the_byte_and_the_journal_is_kept_here(engine, model_file, tmp_path):
    file = model_file(2)
    quick = {"neural-cleanse": {"steps": 30}, "frail": {"folder": str(tmp_path)}}
    options = ScanOptions(detectors=["neural-cleanse", "latent-shift", "frail"], settings=quick, seed=5)
    here = scan(file.path, file.images, file.read, options)
    seen, failing = [], {**quick, "frail": {**quick["frail"], "failing": "3"}}
    keeping = Keeping(tmp_path / "kept", tell=lambda text: seen.append((text, 0)))
    there = replace(options, engine=engine)
    broken = scan(
        file.path,
        file.images,
        file.read,
        replace(there, settings=failing, detectors=["neural-cleanse", "frail"]),
        keeping=keeping,
        observer=lambda stage, part: seen.append((stage, part)),
    )
    assert [run.error.partition("\n")[0] for run in broken.runs[0].detectors] == ["", "frail failed on 3."]
    (journal,) = (tmp_path / "kept" / "journals").iterdir()
    assert len(journal.read_text().splitlines()) >= 2
    assert [part for stage, part in seen if stage == "neural-cleanse"][-1] == 1
    report = scan(file.path, file.images, file.read, there)
    assert not [run.error for run in here.runs[0].detectors if run.error]
    assert any(run.triggers for run in report.runs[0].detectors)
    assert plain(report) == plain(here)
    assert report.cost.cpu_seconds > 0


def test_a_worker_that_is_killed_is_replaced(engine, frail, triple, tmp_path):
    classifier, images, _ = triple(2)
    units = frail().units(classifier, Context())
    kept, told = [], []
    there = figures(
        engine.run(
            frail(folder=str(tmp_path), deadly="2"),
            units,
            classifier,
            images,
            Context(seed=3, progress=told.append),
            lambda unit, _evidence: kept.append(unit.id),
        )
    )
    assert there == figures(local.run(frail(), units, classifier, images, Context(seed=3)))
    assert begun(tmp_path)["2"] == 2
    assert sorted(kept) == [unit.id for unit in units]
    assert (told, told[-1]) == (sorted(told), 1)


def test_a_node_that_leaves_loses_nothing(nodes, engine, frail, triple, tmp_path):
    classifier, images, _ = triple(2)
    units = frail().units(classifier, Context())
    leaving = nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)

    def take_away():
        while not list(tmp_path.glob(f"*.{leaving.node_id}.*")):
            time.sleep(0.05)
        nodes.remove_node(leaving)
        (tmp_path / "go").touch()

    thread = threading.Thread(target=take_away)
    thread.start()
    there = figures(engine.run(frail(folder=str(tmp_path), waiting=True), units, classifier, images, Context(seed=3)))
    thread.join()
    assert there == figures(local.run(frail(), units, classifier, images, Context(seed=3)))
    assert max(begun(tmp_path).values()) == 2


@pytest.mark.parametrize(("failing", "kind"), [("1", MethodError), ("1!", UnknownNameError)])
def test_what_fails_fails_as_here(engine, frail, triple, failing, kind):
    classifier, images, _ = triple(2)
    errors = []
    for run in (engine.run, local.run):
        with pytest.raises(kind) as caught:
            list(run(frail(failing=failing), [Unit("0"), Unit("1")], classifier, images, Context()))
        errors.append((str(caught.value), vars(caught.value)))
    assert errors[0] == errors[1]


def test_a_node_that_lacks_the_plugin_says_so(engine, frail, triple, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("from stranger_plugin import Frail\nclass Rare(Frail):\n    id = 'rare'\n")
    monkeypatch.syspath_prepend(tmp_path)
    from only_here import Rare

    classifier, images, _ = triple(2)
    with pytest.raises(MethodError, match="only_here"):
        list(engine.run(Rare(), [Unit("0")], classifier, images, Context()))


def test_out_of_time(engine, frail, triple, tmp_path):
    classifier, images, _ = triple(2)
    units = frail().units(classifier, Context())
    late = Context(deadline=time.monotonic() + 1)
    with pytest.raises(MethodError, match="ran out of time"):
        list(engine.run(frail(folder=str(tmp_path), waiting=True), units, classifier, images, late))
    (tmp_path / "go").touch()


def test_what_is_lost_again_and_again_is_given_up(engine, frail, triple, tmp_path, monkeypatch):
    monkeypatch.setattr("backdoorscan.engine.ray.RETRIES", 0)
    classifier, images, _ = triple(2)
    deadly = frail(folder=str(tmp_path), deadly="0", lives=9)
    with pytest.raises(MethodError, match=r"frail failed on 0\.\nIts worker was lost"):
        list(engine.run(deadly, [Unit("0")], classifier, images, Context()))


def test_nodes_with_other_versions_are_refused(engine, frail, triple, monkeypatch):
    monkeypatch.setattr("backdoorscan.engine.ray.versions", lambda: {"torch": "0.1"})
    classifier, images, _ = triple(2)
    with pytest.raises(UsageError, match=r"here are torch 0\.1"):
        list(engine.run(frail(), [Unit("0")], classifier, images, Context()))


def test_a_network_of_the_users_own_code(engine, frail, tmp_path, triple):
    from backdoorscan.formats.loading import ReadOptions, load_model

    arch = tmp_path / "odd.py"
    arch.write_text(
        "from torch import nn\n"
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.head = nn.Linear(144, 5)\n"
        "    def forward(self, x):\n"
        "        return self.head(x.flatten(1)) if x.sum() > 0 else self.head(-x.flatten(1))\n"
    )
    _, images, _ = triple(2)
    torch.save(torch.nn.ModuleDict({"head": torch.nn.Linear(144, 5)}).state_dict(), tmp_path / "odd.pt")
    read = ReadOptions(arch=f"{arch}:Odd", input_range=(0.0, 1.0))
    classifier = load_model(tmp_path / "odd.pt", None, replace(read, input_shape=images.shape)).classifier
    units = frail().units(classifier, Context())[:2]
    there = figures(engine.run(frail(), units, classifier, images, Context()))
    assert there == figures(local.run(frail(), units, classifier, images, Context()))


@pytest.fixture
def fleet(model_file, tmp_path):
    """Four models that differ in the first bias of their heads, of which one is not there, with their images."""
    base = model_file(None)
    weights = torch.load(base.path, weights_only=True)
    *_, last = weights
    entries = []
    for value in (0.25, 9.0, 0.5, 0.75):
        weights[last] = weights[last].clone()
        weights[last][0] = value
        torch.save(weights, tmp_path / f"{value}.pt")
        entries.append(Entry(file=tmp_path / f"{value}.pt", read=replace(base.read, input_range=(0.0, 1.0))))
    entries[2].file.unlink()
    return entries, base.images


def test_a_fleet_of_models(engine, fleet, tmp_path, capfd):
    entries, images = fleet
    settings = {"frail": {"folder": str(tmp_path)}}
    options = ScanOptions(detectors=["frail"], settings=settings, jobs=1)
    here = survey(entries, images, options, observer=lambda *_: None)
    seen, kept, there = [], Keeping(tmp_path / "kept"), replace(options, engine=engine)

    def start():
        return survey(entries, images, there, observer=lambda *step: seen.append(step), keeping=kept)

    capfd.readouterr()
    report = start()
    assert capfd.readouterr().out == ""
    assert plain(report) == plain(here)
    assert [bool(run.error) for run in report.runs] == [False, False, True, False]
    assert report.cost.gradient_samples == 3 * 42
    assert seen[-1] == ("all models", 1.0)
    again = start()
    assert [run.cached for run in again.runs] == [True, True, False, True]


def test_a_model_that_ends_its_worker_takes_no_other_with_it(engine, fleet, tmp_path, monkeypatch):
    entries, images = fleet
    for lives, survives in ((1, True), (99, False)):
        monkeypatch.setattr("backdoorscan.engine.ray.RETRIES", lives if survives else 0)
        folder = tmp_path / str(lives)
        folder.mkdir()
        settings = {"frail": {"folder": str(folder), "deadly": "bias 9", "lives": lives}}
        options = ScanOptions(detectors=["frail"], settings=settings, engine=engine)
        report = survey([entries[0], entries[1], entries[3]], images, options, observer=lambda *_: None)
        assert [bool(run.error) for run in report.runs] == [False, not survives, False]
        assert survives or "worker was lost" in report.runs[1].error


def speak(shared, task, say):
    say(f"working on {task}")
    return shared + task


def test_tasks_are_taken_as_there_is_room(engine):
    taken, heard = [], []

    def tasks():
        for number in range(12):
            taken.append(number)
            yield number

    ready = {}
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module
    for number, result in engine.spread(speak, 100, tasks(), lambda *pair: heard.append(pair)):
        assert not isinstance(result, Died)
        ready[number] = result
        assert len(taken) <= len(ready) + 4
    assert ready == {number: 100 + number for number in range(12)}
    assert sorted(heard) == [(number, f"working on {number}") for number in range(12)]


def test_an_address_where_nothing_listens(nodes, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UsageError, match=r"Cannot connect to the Ray cluster at 127\.0\.0\.1:9"):
        named("ray", "127.0.0.1:9")
