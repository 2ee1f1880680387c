import json

import numpy as np
import pytest
import torch
from backdoorscan_plugins.attacks.patch import BadNets
from backdoorscan_plugins.attacks.patches import MultiTarget

from backdoorscan import cache
from backdoorscan.bench import zoo
from backdoorscan.bench.architectures import ARCHITECTURES
from backdoorscan.bench.spec import plan_zoo
from backdoorscan.bench.training import Recipe, right
from backdoorscan.bench.zoo import ZooEntry, train_zoo
from backdoorscan.errors import OutputError, UnknownNameError, UsageError


def test_a_second_run_trains_nothing(specs, tmp_path, trainings):
    first = list(train_zoo(specs, tmp_path))
    assert trainings == [spec.seed for spec in specs]
    assert [entry.fresh for entry in first] == [True] * 3
    second = list(train_zoo(specs, tmp_path))
    assert len(trainings) == 3
    assert [entry.fresh for entry in second] == [False] * 3
    figures = [(entry.spec, entry.path, entry.sha256, entry.accuracy, entry.attack_success) for entry in first]
    assert figures == [(e.spec, e.path, e.sha256, e.accuracy, e.attack_success) for e in second]


def test_an_interrupted_run_goes_on_where_it_ended(specs, tmp_path, trainings):
    run = train_zoo(specs, tmp_path)
    next(run)
    run.close()
    assert trainings == [specs[0].seed]
    assert len(list(train_zoo(specs, tmp_path))) == 3
    assert trainings == [spec.seed for spec in specs]


def test_only_what_is_missing_is_trained(specs, digits, tmp_path, trainings):
    list(train_zoo(specs[:2], tmp_path))
    entries = list(train_zoo(specs, tmp_path))
    assert [entry.fresh for entry in entries] == [False, False, True]
    assert [entry.spec.seed for entry in entries] == [spec.seed for spec in specs]


@pytest.mark.parametrize("damage", ["weights", "no weights", "facts", "no facts", "other facts"])
def test_a_damaged_network_is_trained_again(specs, tmp_path, trainings, damage):
    (entry,) = train_zoo(specs[:1], tmp_path)
    facts = entry.path.with_name("model.json")
    whole = entry.path.read_bytes()
    match damage:
        case "weights":
            entry.path.write_bytes(whole[:-4])
        case "no weights":
            entry.path.unlink()
        case "facts":
            facts.write_text("{")
        case "no facts":
            facts.unlink()
        case "other facts":
            facts.write_text(json.dumps({"sha256": entry.sha256}))
    (again,) = train_zoo(specs[:1], tmp_path)
    assert len(trainings) == 2
    assert again.path.read_bytes() == whole


@pytest.mark.slow
def test_training_in_other_processes_gives_the_same_networks(specs, tmp_path):
    one = [entry.sha256 for entry in train_zoo(specs[1:], tmp_path / "one")]
    two = [entry.sha256 for entry in train_zoo(specs[1:], tmp_path / "two", jobs=2)]
    assert one == two
    assert len(set(one)) == 2


def test_nothing_is_left_half_written(specs, tmp_path):
    list(train_zoo(specs, tmp_path))
    names = sorted(file.name for file in tmp_path.rglob("*") if file.is_file())
    assert names == ["model.json"] * 3 + ["model.safetensors"] * 3


def test_training_depends_on_the_seed_and_not_on_torchs_generator(specs, tmp_path):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = [entry.sha256 for entry in train_zoo(specs[:1], tmp_path / "one")]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert first == [entry.sha256 for entry in train_zoo(specs[:1], tmp_path / "two")]


def test_the_file_loads_as_any_model_does(specs, tmp_path):
    for entry in train_zoo(specs, tmp_path):
        loaded = entry.load()
        assert loaded.artifact.sha256 == entry.sha256
        assert right(loaded.classifier, entry.test) == entry.accuracy
        attacked = entry.spec.attacked()
        assert entry.attack_success == (None if attacked is None else right(loaded.classifier, attacked))


def test_networks_that_train_for_real_are_good_and_backdoored(digits, tmp_path):
    recipe = Recipe(samples=12_000)
    for entry in train_zoo(plan_zoo([digits], ["conv-dense"], [BadNets()], clean=1, recipe=recipe), tmp_path):
        assert entry.accuracy > 0.93
        assert entry.attack_success is None or entry.attack_success > 0.9


def test_the_facts_beside_the_weights_say_what_it_is(specs, tmp_path):
    *_, entry = train_zoo(specs, tmp_path)
    facts = json.loads(entry.path.with_name("model.json").read_text())
    assert facts["spec"]["attack"] == "badnets"
    assert facts["targets"] == [entry.spec.target]
    assert facts["arch"] == entry.read.arch == "backdoorscan.bench.architectures:conv_dense_1x16x16_10"
    assert set(facts["versions"]) == {"backdoorscan", "python", "torch", "numpy"}


def test_the_plan_has_every_architecture_clean_and_with_every_attack(digits):
    attacks = [BadNets(), MultiTarget()]
    specs = plan_zoo([digits], [], attacks, clean=2, backdoored=3)
    counts = {(s.architecture, s.attack.id if s.attack else None): 0 for s in specs}
    for spec in specs:
        counts[spec.architecture, spec.attack.id if spec.attack else None] += 1
    expected = {None: 2, "badnets": 3, "multi-target": 3}
    assert counts == {(name, attack): count for name in ARCHITECTURES for attack, count in expected.items()}
    assert len({spec.key for spec in specs}) == len({spec.seed for spec in specs}) == len(specs)
    assert len({spec.target for spec in specs}) > 3
    assert all(0 <= spec.target < 10 for spec in specs)


def test_a_network_does_not_depend_on_what_else_is_in_the_zoo(digits):
    alone = plan_zoo([digits], ["vgg"], [MultiTarget()], clean=0)
    among = plan_zoo([digits], [], [BadNets(), MultiTarget()], clean=4, backdoored=2)
    assert {spec.key for spec in alone} <= {spec.key for spec in among}
    other = plan_zoo([digits], ["vgg"], [MultiTarget()], clean=0, seed=1)
    assert not {spec.key for spec in alone} & {spec.key for spec in other}


def test_the_key_follows_from_everything_that_the_weights_follow_from(digits):
    (spec,) = plan_zoo([digits], ["vgg"], [BadNets()], clean=0)
    others = [
        plan_zoo([digits], ["vgg"], [BadNets(rate=0.2)], clean=0)[0],
        plan_zoo([digits], ["vgg"], [BadNets()], clean=0, recipe=Recipe(rate=1e-3))[0],
        plan_zoo([digits], ["conv-gap"], [BadNets()], clean=0)[0],
        plan_zoo([digits], ["vgg"], [], clean=1)[0],
    ]
    assert spec.key not in {other.key for other in others}


def test_an_attack_that_its_author_changed_is_trained_again(digits, monkeypatch):
    def key():
        return plan_zoo([digits], ["vgg"], [BadNets()], clean=0)[0].key

    before = key()
    assert key() == before
    monkeypatch.setattr(BadNets, "stamp", lambda self, pixels, aim, variant=0: np.zeros_like(pixels))
    assert key() != before


def test_unknown_architectures_and_empty_zoos_are_errors(digits):
    with pytest.raises(UnknownNameError, match="no architecture 'resnet'"):
        plan_zoo([digits], ["resnet"], [])
    with pytest.raises(UsageError, match="no network"):
        plan_zoo([digits], [], [], clean=0)


def test_an_attack_that_fails_did_not_take(specs):
    entry = ZooEntry(specs[2], zoo.Path("x"), "", accuracy=0.9, attack_success=0.49, seconds=1.0)
    assert not entry.took
    assert ZooEntry(specs[0], zoo.Path("x"), "", accuracy=0.9, attack_success=None, seconds=1.0).took


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("BACKDOORSCAN_CACHE_DIR", str(tmp_path / "own"))
    assert cache.default_folder() == tmp_path / "own"
    monkeypatch.delenv("BACKDOORSCAN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache.default_folder() == tmp_path / "backdoorscan"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache.default_folder().parts[-3:] == ("Library", "Caches", "backdoorscan")


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        cache.write(tmp_path / "file" / "x", b"1")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
