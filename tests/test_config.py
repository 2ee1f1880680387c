from pathlib import Path

import pytest

from backdoorscan import config
from backdoorscan.errors import UnknownNameError, UsageError

METHODS = ["neural-cleanse", "prune"]

FULL = """
[tool.other]
alpha = 5

[tool.backdoorscan]
alpha = 0.05
fail_on = "high"
baseline = "accepted.toml"
seed = 3
detectors = ["neural-cleanse"]
valid = "sets.npz#test"
limit = 100
formats = ["table", "json=scan.json"]
jobs = 2
threads = 1
timeout = 3.5
cache = false
cache_dir = "/cache"

[tool.backdoorscan.neural-cleanse]
steps = 200
"""


def write(folder: Path, text: str, name="pyproject.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(text)
    return file


def test_everything(tmp_path):
    file = write(tmp_path, FULL)
    expected = config.Settings(
        alpha=0.05,
        fail_on="high",
        baseline=tmp_path / "accepted.toml",
        seed=3,
        detectors=("neural-cleanse",),
        valid=str(tmp_path / "sets.npz#test"),
        limit=100,
        formats=("table", "json=scan.json"),
        jobs=2,
        threads=1,
        timeout=3.5,
        cache=False,
        cache_dir=Path("/cache"),
        methods={"neural-cleanse": {"steps": 200}},
        source=file,
    )
    assert config.load(file, METHODS) == expected


def test_a_file_of_its_own_needs_no_prefix(tmp_path):
    file = write(tmp_path, "seed = 4\n[prune]\ndrop = [2]\n", "mine.toml")
    settings = config.load(file, METHODS)
    assert (settings.seed, settings.methods, settings.alpha) == (4, {"prune": {"drop": [2]}}, None)


def test_a_file_of_its_own_may_have_the_prefix(tmp_path):
    assert config.load(write(tmp_path, FULL, "mine.toml"), METHODS).seed == 3


def test_a_pyproject_without_our_table_says_nothing(tmp_path):
    assert config.load(write(tmp_path, "[tool.other]\nseed = 1"), METHODS).seed is None


def test_the_nearest_pyproject_counts(tmp_path):
    write(tmp_path, FULL)
    nearer = write(tmp_path / "a", "[tool.backdoorscan]\nseed = 9")
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    assert config.load(None, METHODS, start=tmp_path / "a" / "b" / "c").source == nearer
    assert config.load(None, METHODS, start=tmp_path).seed == 3


def test_a_file_of_its_own_is_found_and_comes_before_a_pyproject(tmp_path):
    write(tmp_path, FULL)
    own = write(tmp_path, "seed = 8\nvalid = 'clean.h5'", "backdoorscan.toml")
    below = tmp_path / "below"
    write(below, "[tool.other]")
    settings = config.load(None, METHODS, start=below)
    assert (settings.source, settings.seed, settings.valid) == (own, 8, str(tmp_path / "clean.h5"))


def test_the_current_folder_is_where_it_starts(tmp_path, monkeypatch):
    write(tmp_path, FULL)
    monkeypatch.chdir(tmp_path)
    assert config.load(None, METHODS).seed == 3


@pytest.mark.parametrize(
    "line",
    [
        "alpha = '0.1'",
        "alpha = true",
        "seed = 1.5",
        "seed = false",
        "seed = -1",
        "detectors = 'prune'",
        "detectors = [1]",
        "formats = 'json'",
        "fail_on = true",
        "jobs = 0",
        "limit = 0",
        "timeout = -1",
        "cache = 'no'",
        "cache_dir = ''",
        "prune = 3",
    ],
)
def test_values_of_the_wrong_type(tmp_path, line):
    with pytest.raises(UsageError, match=line.partition(" ")[0]):
        config.load(write(tmp_path, f"[tool.backdoorscan]\n{line}"), METHODS)


@pytest.mark.parametrize(
    ("text", "hint"),
    [("alhpa = 1", "'alpha'"), ("[tool.backdoorscan.prun]\ndrop = 1", "'prune'"), ("failon = 'low'", "'fail_on'")],
)
def test_a_key_nobody_knows(tmp_path, text, hint):
    file = write(tmp_path, text if text.startswith("[") else f"[tool.backdoorscan]\n{text}")
    with pytest.raises(UnknownNameError) as caught:
        config.load(file, METHODS)
    assert hint in caught.value.hint


@pytest.mark.parametrize("content", [b"[tool", b"\xff\xfe", b"[tool]\nbackdoorscan = 3"])
def test_a_broken_file(tmp_path, content):
    file = tmp_path / "pyproject.toml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"pyproject\.toml"):
        config.load(file, METHODS)


def test_a_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"none\.toml"):
        config.load(tmp_path / "none.toml", METHODS)
