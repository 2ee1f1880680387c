import time
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from backdoorscan.errors import UnknownNameError, UsageError
from backdoorscan.plugin.method import Context, Method, option


@dataclass(frozen=True, kw_only=True)
class Tool(Method):
    """Does something.

    In some way.
    """

    id = "tool"

    steps: int = option(5, help="Steps.", minimum=1, maximum=100)
    rate: float = option(0.5, help="Rate.", minimum=0)
    layer: str = option("", help="Layer.")
    fast: bool = option(False, help="Fast.")
    norm: Literal["l1", "l2"] = option("l1", help="Norm.")
    size: Literal[1, 2] = option(1, help="Size.")
    limit: int | None = option(None, help="Limit.", minimum=1)
    drops: tuple[float, ...] = option((2.0, 4.0), help="Drops.", minimum=0, maximum=100)
    layers: tuple[int, ...] = option((), help="Layers.")
    names: tuple[str, ...] = option((), help="Names.")
    hidden: int = 3


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("steps", "7", 7),
        ("steps", 7, 7),
        ("steps", 7.0, 7),
        ("rate", "0.25", 0.25),
        ("rate", "1e-3", 0.001),
        ("rate", 2, 2.0),
        ("layer", "conv_3", "conv_3"),
        ("layer", "", ""),
        ("fast", True, True),
        ("fast", "true", True),
        ("fast", "Yes", True),
        ("fast", "1", True),
        ("fast", "FALSE", False),
        ("fast", "no", False),
        ("fast", "0", False),
        ("norm", "l2", "l2"),
        ("size", "2", 2),
        ("size", 2, 2),
        ("limit", "none", None),
        ("limit", None, None),
        ("limit", "3", 3),
        ("drops", "2", (2.0,)),
        ("drops", "2,4.5, 10", (2.0, 4.5, 10.0)),
        ("drops", [2, 4], (2.0, 4.0)),
        ("drops", 3, (3.0,)),
        ("layers", "1,2", (1, 2)),
        ("layers", "", ()),
        ("layers", [], ()),
        ("names", "a,b", ("a", "b")),
    ],
)
def test_what_a_user_writes_is_read(name, written, value):
    parsed = getattr(Tool.configured({name: written}), name)
    assert parsed == value
    assert type(parsed) is type(value)
    assert not isinstance(parsed, tuple) or [type(part) for part in parsed] == [type(part) for part in value]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("steps", "many"),
        ("steps", "1.5"),
        ("steps", 1.5),
        ("steps", True),
        ("steps", "0"),
        ("steps", 101),
        ("steps", None),
        ("steps", [1]),
        ("rate", "-0.1"),
        ("rate", "nan"),
        ("rate", float("inf")),
        ("rate", False),
        ("layer", 3),
        ("fast", "maybe"),
        ("fast", 2),
        ("norm", "l3"),
        ("size", "3"),
        ("limit", "0"),
        ("limit", "some"),
        ("drops", "2,x"),
        ("drops", "2,101"),
        ("drops", [True]),
        ("layers", "1.5"),
        ("layers", {"a": 1}),
    ],
)
def test_what_makes_no_sense_is_refused(name, written):
    with pytest.raises(UsageError) as caught:
        Tool.configured({name: written})
    assert caught.value.what == f"tool.{name} = {written!r} is not valid."
    assert repr(getattr(Tool(), name)) in caught.value.hint


def test_the_range_is_told():
    with pytest.raises(UsageError, match=r"int from 1 to 100: Steps\."):
        Tool.configured({"steps": "0"})


def test_an_unknown_option_gets_a_suggestion():
    with pytest.raises(UnknownNameError, match=r"no option of tool 'step'(.|\n)*Did you mean 'steps'\?"):
        Tool.configured({"step": 1})


@pytest.mark.parametrize("name", ["hidden", "id"])
def test_only_options_can_be_set(name):
    with pytest.raises(UnknownNameError):
        Tool.configured({name: 1})


def test_options_in_order_with_their_types_in_words():
    assert [(spec.name, spec.type_name) for spec in Tool.options()] == [
        ("steps", "int"),
        ("rate", "float"),
        ("layer", "str"),
        ("fast", "bool"),
        ("norm", "l1|l2"),
        ("size", "1|2"),
        ("limit", "int | None"),
        ("drops", "float, ..."),
        ("layers", "int, ..."),
        ("names", "str, ..."),
    ]


def test_settings_are_the_values_in_force():
    tool = Tool.configured({"drops": "1", "norm": "l2"})
    assert tool.settings() == Tool().settings() | {"drops": (1.0,), "norm": "l2"}
    assert Tool.configured(tool.settings()) == tool


def test_summary():
    assert Tool.summary() == "Does something."


def test_generators_differ_by_seed_and_purpose_alone():
    def draw(seed, *purpose):
        return torch.rand(3, generator=Context(seed=seed).generator(*purpose)).tolist()

    first = draw(0, "a", "b")
    torch.manual_seed(5)
    assert draw(0, "a", "b") == first
    assert first not in (draw(1, "a", "b"), draw(0, "a"), draw(0, "ab"), draw(0, "b", "a"))


def test_out_of_time():
    assert not Context().out_of_time
    assert not Context(deadline=time.monotonic() + 60).out_of_time
    assert Context(deadline=time.monotonic()).out_of_time
