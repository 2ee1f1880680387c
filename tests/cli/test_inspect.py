"""``backdoorscan inspect``: a table for people, JSON for programs, and a report even where the file is refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

from backdoorscan.demo import DemoFiles
from backdoorscan.errors import ExitCode

Cli = Callable[..., Any]

MANUAL = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
DEEP = """
from torch import nn

def net():
    layers = [layer for _ in range(20) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
"""


@pytest.fixture
def deep(elsewhere: Path) -> tuple[str, ...]:
    """Arguments for a network of 42 layers."""
    names: dict[str, Any] = {}
    exec(DEEP, names)
    network: nn.Module = names["net"]()
    (elsewhere / "net.py").write_text(DEEP)
    torch.save(network.state_dict(), elsewhere / "net.pt")
    return "inspect", "net.pt", "--arch", "net.py:net", "--input-shape", "3,8,8"


def test_a_network_as_json(demo: DemoFiles, cli: Cli, validate: Callable[[Any], None]) -> None:
    result = cli("inspect", demo.model, "-f", "json")
    assert (result.code, result.err) == (ExitCode.OK, "")
    report = result.json
    validate(report)
    data = demo.model.read_bytes()
    assert (report["sha256"], report["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert (report["format"], report["layout"], report["error"]) == ("keras-h5", "NHWC", None)
    assert (report["num_classes"], report["head"]["outputs"]) == (10, 10)
    assert report["prunable"]["layer"] in {layer["name"] for layer in report["layers"] if layer["kind"] == "Conv2d"}
    assert report["parameters"] == sum(layer["parameters"] for layer in report["layers"]) > 0


def test_a_network_as_a_table(demo: DemoFiles, cli: Cli) -> None:
    result = cli("inspect", demo.model)
    assert (result.code, result.err) == (ExitCode.OK, "")
    for word in ("keras-h5", hashlib.sha256(demo.model.read_bytes()).hexdigest(), "NHWC", "would be pruned", "Conv2d"):
        assert word in result.out


def test_long_lists_are_folded_unless_all_are_wanted(deep: tuple[str, ...], cli: Cli) -> None:
    folded, everything, data = cli(*deep), cli(*deep, "--all"), cli(*deep, "-f", "json").json
    assert len(data["layers"]) == 42
    assert "18 more" in folded.out
    shown = re.findall(r"Conv2d", folded.out)
    assert 0 < len(shown) < 20
    assert len(re.findall(r"Conv2d", everything.out)) == 20
    assert "more" not in everything.out


def test_both_formats_at_once(demo: DemoFiles, cli: Cli, elsewhere: Path, validate: Callable[[Any], None]) -> None:
    result = cli("inspect", demo.model, "-f", "json=facts.json")
    assert result.code == ExitCode.OK
    assert "would be pruned" in result.out
    validate(json.loads((elsewhere / "facts.json").read_text()))


@pytest.mark.parametrize("content", [b"\x89HDF\r\n\x1a\n" + bytes(64), b"a text"])
def test_a_file_that_cannot_be_read_is_an_error_with_a_report(
    content: bytes, cli: Cli, elsewhere: Path, validate: Callable[[Any], None]
) -> None:
    (elsewhere / "bad").write_bytes(content)
    table, data = cli("inspect", "bad"), cli("inspect", "bad", "-f", "json")
    assert table.code == data.code == ExitCode.ERROR
    digest = hashlib.sha256(content).hexdigest()
    assert digest in table.out
    validate(data.json)
    assert data.json["sha256"] == digest
    assert data.json["error"]["what"] in " ".join(table.out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.h5",), "no model file"),
        (("none.h5", "-f", "html"), "format"),
        (("none.h5", "--layout", "CHWN"), "--layout"),
        (("none.h5", "-o", "none/facts.json"), "no folder"),
    ],
)
def test_what_is_no_file_at_all(arguments: tuple[str, ...], words: str, cli: Cli) -> None:
    result = cli("inspect", *arguments)
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert words in result.err


def test_names_from_the_file_cannot_steer_the_terminal(cli: Cli, elsewhere: Path) -> None:
    (elsewhere / "odd\x1b[2Jname").write_bytes(b"a text")
    assert "\x1b" not in cli("inspect", "odd\x1b[2Jname").out


@pytest.mark.parametrize("name", ["inspection-1", "conversion-1"])
def test_every_field_is_documented_and_every_documented_field_exists(name: str) -> None:
    schema = json.loads((resources.files("backdoorscan.reports") / "schemas" / f"{name}.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    _, _, manual = MANUAL.partition(f"#### `{schema['title']}`")
    own = {"versions", "cost"}
    for part in (schema, *(part for title, part in schema["$defs"].items() if title not in own)):
        assert set(part["required"]) <= set(part["properties"])
        assert not [field for field, value in part["properties"].items() if not value.get("description")]
        where = manual if part is schema else MANUAL.partition(f"#### `{part['title']}`")[2]
        table = where.partition("\n#### ")[0].partition("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(part["properties"])
