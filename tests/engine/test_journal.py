"""The journal: what is written down is read again, and nothing else."""

import pytest
import torch

from backdoorscan.engine.journal import Journal
from backdoorscan.errors import OutputError
from backdoorscan.findings import Evidence, Examined, Judgement, Unit
from backdoorscan.trigger import Trigger


def trigger(seed, target=1):
    random = torch.Generator().manual_seed(seed)
    return Trigger(torch.rand(1, 5, 4, generator=random), torch.rand(3, 5, 4, generator=random), target)


def evidence(seed):
    return Evidence(figures={"x": 0.1 * seed, "rows": [{"a": None}]}, triggers=[trigger(seed)], gradient_samples=seed)


UNITS = [Unit(str(number), (number,)) for number in range(4)]


@pytest.fixture
def told():
    return []


@pytest.fixture
def journal(tmp_path, told):
    opened = []

    def start(resume=True):
        opened.append(Journal(tmp_path / "deep" / "a.jsonl", resume=resume, tell=told.append))
        return opened[-1]

    yield start
    for journal in opened:
        journal.close()


def write(journal, units=UNITS, detector="d", earlier=None):
    for number, unit in enumerate(units, start=1):
        journal.section(detector, earlier or {}).keep(unit, evidence(number))
    journal.close()


def test_what_was_kept_is_taken_over_as_it_was(journal):
    write(journal(), UNITS[:3])
    found = journal().section("d", {}).taken_over(UNITS)
    assert list(found) == ["0", "1", "2"]
    for number, unit in enumerate(UNITS[:3], start=1):
        known, own = found[unit.id], evidence(number)
        assert (known.figures, known.gradient_samples) == (own.figures, own.gradient_samples)
        assert torch.equal(known.triggers[0].mask, own.triggers[0].mask)
        assert torch.equal(known.triggers[0].pattern, own.triggers[0].pattern)
        assert known.triggers[0].target == 1


def test_a_unit_counts_as_the_same_only_if_all_it_was_told_is():
    units = [
        Unit("0", (0,)),
        Unit("1", (0,)),
        Unit("0", (1,)),
        Unit("0", (0,), 1),
        Unit("0", (0,), 0, (trigger(1),)),
        Unit("0", (0,), 0, (trigger(2),)),
    ]
    section = Journal.section(object.__new__(Journal), "d", {})
    assert len({section._key(unit) for unit in units}) == len(units)
    assert section._key(Unit("0", (0,), 0, (trigger(1),))) == section._key(units[4])


def test_what_earlier_detectors_found_is_part_of_what_a_unit_is_told(journal):
    def saw(seed, name="e"):
        return {name: Examined(evidence=[evidence(seed)], judgement=Judgement(p_value=0.5))}

    write(journal(), earlier=saw(1))
    kept = journal()
    assert len(kept.section("d", saw(1)).taken_over(UNITS)) == 4
    for other in (kept.section("d", saw(2)), kept.section("d", saw(1, "f")), kept.section("d", {})):
        assert other.taken_over(UNITS) == {}
    assert kept.section("other", saw(1)).taken_over(UNITS) == {}


def test_a_line_that_was_cut_off_is_not_read_and_the_next_is(journal, tmp_path):
    write(journal(), UNITS[:2])
    path = tmp_path / "deep" / "a.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in (first + 1, first + 40, (first + len(whole)) // 2, len(whole) - 2):
        path.write_bytes(whole[:end])
        again = journal()
        assert list(again.section("d", {}).taken_over(UNITS)) == ["0"]
        again.section("d", {}).keep(UNITS[2], evidence(3))
        again.close()
        assert list(journal().section("d", {}).taken_over(UNITS)) == ["0", "2"]


def test_only_the_newline_is_missing(journal, tmp_path):
    write(journal(), UNITS[:2])
    path = tmp_path / "deep" / "a.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    again = journal()
    again.section("d", {}).keep(UNITS[2], evidence(3))
    again.close()
    assert list(journal().section("d", {}).taken_over(UNITS)) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"1",
        b'{"unit": "x"}',
        b'{"unit": "x", "evidence": {"figures": 3, "triggers": [], "gradient_samples": 0}}',
        b'{"unit": "x", "evidence": {"figures": {}, "triggers": [{"target": 1}], "gradient_samples": 0}}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
)
def test_lines_that_are_no_unit(line, journal, tmp_path):
    write(journal(), UNITS[:1])
    path = tmp_path / "deep" / "a.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes() + line)
    assert list(journal().section("d", {}).taken_over(UNITS)) == ["0"]


def test_a_new_scan_replaces_it_and_a_finished_one_deletes_it(journal, tmp_path):
    write(journal())
    fresh = journal(resume=False)
    assert fresh.found == {}
    write(fresh, UNITS[:1])
    assert len(journal().found) == 1
    fresh.drop()
    assert list((tmp_path / "deep").iterdir()) == []


def test_figures_that_are_no_data_are_not_kept_and_harm_nobody(journal):
    kept = journal()
    kept.section("d", {}).keep(UNITS[0], Evidence(figures={"x": torch.zeros(1)}))
    kept.section("d", {}).keep(UNITS[1], evidence(1))
    kept.close()
    assert list(journal().section("d", {}).taken_over(UNITS)) == ["1"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Cannot write"):
        Journal(tmp_path / "file" / "a", resume=False, tell=print)


def test_a_disk_that_is_full_is_told_once_and_costs_only_what_follows(journal, told, full_disk):
    kept = journal()
    section = kept.section("d", {})
    section.keep(UNITS[0], evidence(1))
    with full_disk(kept.path.stat().st_size + 10):
        for unit in UNITS[1:]:
            section.keep(unit, evidence(1))
        kept.close()
    (warning,) = told
    assert "too large" in warning
    assert set(journal(resume=True).section("d", {}).taken_over(UNITS)) == {UNITS[0].id}
