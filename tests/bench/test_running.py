import pytest
from backdoorscan_plugins.attacks.patch import BadNets

from backdoorscan.bench import running
from backdoorscan.bench.running import BenchOptions, judge_zoo
from backdoorscan.bench.spec import plan_zoo
from backdoorscan.bench.training import Recipe, right
from backdoorscan.bench.zoo import train_zoo
from backdoorscan.errors import MethodError, UnknownNameError, UsageError
from backdoorscan.registry import installed

QUICK = {"neural-cleanse": {"steps": "3", "restarts": "1"}}
SCAN = BenchOptions(detectors=["neural-cleanse"], settings=QUICK)


@pytest.fixture
def entries(specs, tmp_path):
    return list(train_zoo(specs, tmp_path))


@pytest.fixture
def scans(monkeypatch):
    """The files of all networks that are scanned in this process."""
    paths = []
    scan_model = running.scan_model

    def counted(loaded, *arguments, **options):
        paths.append(loaded.artifact.path)
        return scan_model(loaded, *arguments, **options)

    monkeypatch.setattr(running, "scan_model", counted)
    return paths


def test_a_second_run_only_reads(entries, tmp_path, scans):
    first = list(judge_zoo(entries, SCAN, tmp_path))
    assert scans == [entry.path for entry in entries]
    assert [judged.entry for judged in first] == entries
    assert list(judge_zoo(entries, SCAN, tmp_path)) == first
    assert len(scans) == 3
    for judged in first:
        assert set(judged.scanned.p_values) == {"neural-cleanse"}
        assert judged.scanned.gradient_samples > 0
        assert 0 <= judged.scanned.p_value <= 1
        assert judged.scanned.errors == {}


@pytest.mark.parametrize(
    "other",
    [
        BenchOptions(detectors=["neural-cleanse"], settings={"neural-cleanse": {"steps": "4", "restarts": "1"}}),
        BenchOptions(detectors=["neural-cleanse"], settings=QUICK, seed=1),
        BenchOptions(detectors=["neural-cleanse"], settings=QUICK, alpha=0.05),
    ],
    ids=["option", "seed", "alpha"],
)
def test_results_are_kept_apart_by_what_they_follow_from(entries, tmp_path, scans, other):
    list(judge_zoo(entries[:1], SCAN, tmp_path))
    list(judge_zoo(entries[:1], other, tmp_path))
    assert len(scans) == 2


def test_a_method_that_was_worked_on_runs_again(entries, tmp_path, scans, monkeypatch):
    list(judge_zoo(entries[:1], SCAN, tmp_path))
    monkeypatch.setattr(running.cache, "method_source", lambda method: "changed")
    list(judge_zoo(entries[:1], SCAN, tmp_path))
    assert len(scans) == 2


def test_without_the_cache_nothing_is_taken_or_kept(entries, tmp_path, scans):
    for _ in range(2):
        list(judge_zoo(entries[:1], SCAN, tmp_path, use_cache=False))
    assert len(scans) == 2
    assert not (tmp_path / "results").exists()


def test_a_detector_that_fails_is_counted_and_does_not_end_the_bench(entries, tmp_path, monkeypatch):
    component = installed().find("detector", "neural-cleanse").component

    def fail(*_arguments):
        raise RuntimeError("no")

    monkeypatch.setattr(component, "examine", fail)
    (judged,) = judge_zoo(entries[:1], SCAN, tmp_path)
    assert "RuntimeError: no" in judged.scanned.errors["neural-cleanse"]
    assert (judged.scanned.p_value, judged.scanned.p_values) == (1.0, {"neural-cleanse": None})
    assert (judged.scanned.verdict, judged.scanned.flagged) == ("inconclusive", [])


def test_repairs_are_of_backdoored_networks_alone_and_are_measured_on_the_test_images(digits, tmp_path):
    entries = list(
        train_zoo(plan_zoo([digits], ["conv-dense"], [BadNets()], clean=1, recipe=Recipe(samples=6000)), tmp_path)
    )
    options = BenchOptions(detectors=["neural-cleanse"], repairs=["prune"], settings={**QUICK, "prune": {"drop": "3"}})
    clean, bad = judge_zoo(entries, options, tmp_path)
    assert clean.repaired == []
    classifier = entries[1].load().classifier
    before = right(classifier, entries[1].test), right(classifier, entries[1].spec.attacked())
    kinds = {row.name for row in bad.repaired}
    assert kinds == {"X=3 repaired", "X=3 goodnet"}
    for row in bad.repaired:
        assert (row.method, row.error) == ("prune", "")
        assert (row.accuracy_before, row.attack_success_before) == pytest.approx(before)
        gain, cost = max(0, before[1] - row.attack_success), max(0, before[0] - row.accuracy)
        assert row.effectiveness == pytest.approx((gain - cost + 1) / 2)
    assert list(judge_zoo(entries, options, tmp_path))[1].repaired == bad.repaired
    assert not list(tmp_path.rglob("*repaired*"))


def test_a_repair_that_fails_is_a_row_and_not_the_end(entries, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise MethodError("cannot", why="because")

    monkeypatch.setattr(running, "repair", fail)
    options = BenchOptions(detectors=["neural-cleanse"], repairs=["prune"], settings=QUICK)
    taken = running.ZooEntry(**{**vars(entries[2]), "attack_success": 1.0})
    (judged,) = judge_zoo([taken], options, tmp_path)
    (row,) = judged.repaired
    assert (row.method, row.error, row.effectiveness) == ("prune", "cannot\nbecause", None)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (BenchOptions(detectors=["neural-clean"]), UnknownNameError),
        (BenchOptions(repairs=["prun"]), UnknownNameError),
        (BenchOptions(settings={"neural-cleanse": {"stepz": 1}}), UnknownNameError),
        (BenchOptions(repairs=["prune"], settings={"prune": {"dropp": 1}}), UnknownNameError),
        (BenchOptions(settings={"prune": {"drop": 1}}), UsageError),
        (BenchOptions(alpha=0), UsageError),
    ],
    ids=["detector", "repair", "option", "option of a repair", "idle", "alpha"],
)
def test_what_cannot_be_is_said_before_any_work(options, error):
    with pytest.raises(error):
        running.check(options, installed())
