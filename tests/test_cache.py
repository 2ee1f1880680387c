"""Names of kept work, and the digests that they are made of."""

import hashlib
import sys
from pathlib import Path

import pytest

import backdoorscan
from backdoorscan import cache
from backdoorscan.errors import OutputError
from backdoorscan.registry import installed


def test_a_digest_follows_from_the_data_alone():
    assert cache.digest({"a": 1, "b": [2, None]}) == cache.digest({"b": [2, None], "a": 1})
    assert cache.digest({"a": 1}) != cache.digest({"a": 2})


def test_json_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "deep" / "down.json"
    cache.write_json(path, {"a": [1, 2.5, None]})
    assert cache.read_json(path) == {"a": [1, 2.5, None]}
    assert [file.name for file in path.parent.iterdir()] == ["down.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_what_is_damaged_is_not_there(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    assert cache.read_json(tmp_path / "x.json") is None
    assert cache.read_json(tmp_path / "none.json") is None


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Cannot write"):
        cache.write(tmp_path / "file" / "x", b"1")


def test_the_source_of_a_method_is_its_module_and_the_mathematics(tmp_path, monkeypatch):
    methods = {p.id: p.component() for p in installed().of_kind("detector")}
    own = cache.method_source(methods["neural-cleanse"])
    assert own == cache.method_source(type(methods["neural-cleanse"])(steps=7))
    assert own != cache.method_source(methods["gangsweep"])
    other = tmp_path / "backdoorscan"
    (other / "ops").mkdir(parents=True)
    for file in Path(backdoorscan.__file__).parent.glob("ops/*.py"):
        (other / "ops" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(backdoorscan, "__file__", str(other / "__init__.py"))
    assert cache.method_source(methods["neural-cleanse"]) == own
    (other / "ops" / "inversion.py").write_text("")
    assert cache.method_source(methods["neural-cleanse"]) != own


def test_an_architecture_is_known_by_its_code_and_its_neighbours(tmp_path):
    def write(text, neighbour="x = 1", folder="one"):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "arch.py").write_text(text)
        (place / "other.py").write_text(neighbour)
        return cache.arch_source(f"{place / 'arch.py'}:net")

    first = write("a")
    assert write("a") == write("a", folder="two") == first
    assert len({first, write("b"), write("a", "x = 2"), cache.arch_source(f"{tmp_path / 'one' / 'arch.py'}:not")}) == 4


def test_an_architecture_of_a_package_or_a_keras_file(tmp_path, monkeypatch):
    package = tmp_path / "nets_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('a digest runs nothing')")
    (package / "small.py").write_text("a")
    monkeypatch.syspath_prepend(tmp_path)
    first = cache.arch_source("nets_of_mine.small:net")
    (package / "small.py").write_text("b")
    assert cache.arch_source("nets_of_mine.small:net") != first
    assert "nets_of_mine" not in sys.modules
    (tmp_path / "model.json").write_text("{}")
    keras = cache.arch_source(str(tmp_path / "model.json"))
    (tmp_path / "model.json").write_text("[]")
    assert cache.arch_source(str(tmp_path / "model.json")) != keras


@pytest.mark.parametrize("arch", ["absent.py:net", "absent_package.a:net", "nothing", ":", "..:x", "json:net"])
def test_an_architecture_that_cannot_be_is_the_loaders_to_refuse(arch):
    assert len(cache.arch_source(arch)) == len(hashlib.sha256().hexdigest())


def test_without_an_architecture():
    assert cache.arch_source(None) is None
