"""Which engine is asked for."""

import sys

import pytest

from backdoorscan.engine import named
from backdoorscan.errors import UnknownNameError, UsageError


def test_this_machine_is_no_engine():
    assert named("local") is None


def test_one_that_nobody_knows():
    with pytest.raises(UnknownNameError, match="ray"):
        named("rai")


def test_an_address_without_a_cluster():
    with pytest.raises(UsageError, match="only with --engine ray"):
        named("local", "10.0.0.1:6379")


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "backdoorscan.engine.ray", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="backdoorscan\\[ray\\]"):
        named("ray")
