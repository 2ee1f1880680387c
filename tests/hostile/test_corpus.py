"""Every hostile file through the real door: refused, or loaded as if what is hostile in it were not there."""

from __future__ import annotations

import io
import logging
import pickle
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hostile.corpus import CASES
from hostile.torch_cases import payload, program_of, torch_zip, torchscript
from hostile.yard import Case, Yard

from backdoorscan.formats import sandbox

FAMILIES = {
    "code": 90,
    "other files": 40,
    "exhaustion": 50,
    "malformed": 40,
    "disguise": 12,
    "names": 30,
    "harmless": 1,
}
pytestmark = pytest.mark.skipif(not sandbox.available(), reason="this platform has no fork")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_met(case: Case, yard: Yard, record_property: Callable[[str, object], None]) -> None:
    yard.put(case)
    error = yard.meet()
    assert (error is None) is (case.error is None), error
    if case.error is not None:
        assert isinstance(error, case.error)
    record_property("hostile", [(case.family, "loaded" if error is None else "refused", 1)])


@pytest.mark.parametrize("kind", FAMILIES)
def test_there_are_enough_of_each_family(kind: str) -> None:
    counts = Counter(case.family for case in CASES)
    assert counts.keys() == FAMILIES.keys() and counts[kind] >= FAMILIES[kind]


def test_every_name_is_another() -> None:
    assert len({(case.family, case.name) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("form", ["h5", "keras", "onnx", "pt2", "pt", "legacy", "safetensors"])
def test_the_good_files_load(form: str, yard: Yard) -> None:
    yard.model.write_bytes(yard.good[form])
    assert yard.meet() is None


@pytest.mark.parametrize("way", ["reduce", "eval", "exec", "inst", "obj", "stack global", "protocol 0", "a file"])
def test_the_pickles_bite_those_who_unpickle_them(way: str, yard: Yard) -> None:
    """Or else that nothing happens here would say nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pickle.loads(program_of(payload(yard, way)))
    assert yard.canary.exists()


def test_torch_load_runs_them(yard: Yard) -> None:
    torch.load(io.BytesIO(torch_zip(program_of(payload(yard, "reduce")))), weights_only=False)
    assert yard.canary.exists()


def test_torch_jit_load_runs_what_the_file_says(yard: Yard) -> None:
    data = torchscript(yard)
    yard.canary.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(io.BytesIO(data))
    assert yard.canary.exists()


def test_example_inputs_run_in_torch_export_load(yard: Yard) -> None:
    """So a file that scans clean must not hold any that do."""
    hostile = next(case for case in CASES if case.name == ".pt2: a pickle among the example inputs: reduce")
    yard.put(hostile)
    logging.disable(logging.CRITICAL)
    try:
        torch.export.load(io.BytesIO(yard.model.read_bytes()))
    finally:
        logging.disable(logging.NOTSET)
    assert yard.canary.exists()


def test_what_reads_another_file_is_seen(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch itself."""
    from backdoorscan.formats.weights import loader

    def curious(data: bytes, name: str) -> object:
        yard.secret.read_bytes()
        return original(data, name)

    original = loader.states_of
    monkeypatch.setattr(loader, "states_of", curious)
    yard.model.write_bytes(yard.good["pt"])
    with pytest.raises(AssertionError):
        yard.meet()


def test_weights_with_the_secret_in_them_are_seen(yard: Yard) -> None:
    with zipfile.ZipFile(io.BytesIO(yard.good["pt"])) as archive:
        piece = archive.read(next(name for name in archive.namelist() if name.endswith("data/0")))
    yard.model.write_bytes(yard.good["pt"].replace(piece, yard.secret.read_bytes()[: len(piece)]))
    with pytest.raises(AssertionError, match="the secret was read"):
        yard.meet()
