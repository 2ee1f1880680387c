"""``backdoorscan bench`` from end to end, on a zoo of four networks."""

import json
import os
import subprocess
import sys

import pytest

from backdoorscan.cli import run

ZOO = ("--attack", "badnets", "--attack", "single-pixel", "--architecture", "conv-dense", "--clean", "2")
QUICK = ("--samples", "1000", "-d", "neural-cleanse", "-O", "neural-cleanse.steps=3")


@pytest.fixture
def bench(tmp_path, capsys):
    def call(*arguments):
        code = run(["bench", *ZOO, *QUICK, "--cache-dir", str(tmp_path / "cache"), *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def test_from_training_to_a_report(bench, tmp_path):
    code, out, err = bench("-f", "json")
    assert code == 0, err
    report = json.loads(out)
    assert report["schema"] == "backdoorscan.bench/1"
    assert [row["attack"] for row in report["networks"]] == [None, None, "badnets", "single-pixel"]
    assert report["clean"] == 2
    assert "4 networks, 4 of them new" in err

    code, again, err = bench("-f", "json")
    assert code == 0
    assert "4 networks, 0 of them new" in err
    same = ("networks", "groups", "data", "clean", "backdoored")
    assert {name: report[name] for name in same} == {name: json.loads(again)[name] for name in same}

    code, out, err = bench()
    assert code == 0
    assert "All networks, with 95% intervals" in out
    code, out, err = bench("-f", "html", "-o", tmp_path / "bench.html")
    assert (code, out) == (0, "")
    assert "Every network" in (tmp_path / "bench.html").read_text()

    code, out, err = bench("--train-only")
    assert (code, len(out.splitlines())) == (0, 4)
    assert all(line.startswith(str(tmp_path / "cache")) for line in out.splitlines())


def test_options_of_attacks(bench):
    code, out, err = bench("--train-only", "-O", "badnets.rate=0.2", "--clean", 0)
    assert code == 0, err
    assert len(out.splitlines()) == 2
    assert bench("-O", "badnets.rate=2")[0] == 2
    assert bench("-O", "blended.rate=0.2")[0] == 2  # it is no part of this zoo


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--attack", "badnet"), "There is no attack 'badnet'"),
        (("--architecture", "resnet"), "There is no architecture 'resnet'"),
        (("-d", "neural"), "There is no detector 'neural'"),
        (("--repair", "pruning"), "There is no repairer 'pruning'"),
        (("-f", "xml"), "There is no format of a bench 'xml'"),
        (("--data", "nowhere.npz"), "nowhere.npz"),
        (("-o", "no/such/folder.json"), "Cannot write"),
    ],
)
def test_a_mistake_is_one_message_before_any_work(bench, tmp_path, arguments, message):
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("backdoorscan: ")
    assert message in err
    assert not (tmp_path / "cache").exists()


def test_help_lists_every_option_and_imports_no_torch():
    code = "import sys; from backdoorscan.cli import run; run(['bench', '--help']); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "COLUMNS": "160", "TERM": "dumb"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    options = "data attack architecture seeds clean samples train-only detector repair option limit alpha cache-dir"
    for option in (*options.split(), "no-cache", "jobs", "seed", "format", "output"):
        assert f"--{option}" in done.stdout
