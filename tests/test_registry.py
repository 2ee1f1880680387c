import sys
import textwrap
from pathlib import Path

import pytest

from backdoorscan.errors import ImagesError, PluginError, UnknownNameError, UsageError
from backdoorscan.registry import Registry, installed

GOOD = '''
from dataclasses import dataclass
from backdoorscan import hookimpl
from backdoorscan.findings import Evidence, Judgement
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import option

@dataclass(frozen=True, kw_only=True)
class Good(Detector):
    """A good one."""

    id = "good-one"
    steps: int = option(1, help="Steps.")

    def examine(self, unit, classifier, images, context):
        return Evidence(figures={})

    def judge(self, evidence):
        return Judgement(p_value=1.0)

@hookimpl
def backdoorscan_detectors():
    return [Good]
'''


def variant(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


BROKEN = {
    "does not import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "raises": ("1 / 0", "ZeroDivisionError"),
    "syntax error": ("def", "SyntaxError"),
    "abstract": (variant("def judge", "def jugde"), "TypeError: Good does not implement judge"),
    "without id": (variant('id = "good-one"', ""), "Good has no id"),
    "empty id": (variant('id = "good-one"', 'id = ""'), "Good has no id"),
    "wrong kind": (variant("backdoorscan_detectors", "backdoorscan_repairers"), "is not a subclass of Repairer"),
    "an instance": (variant("[Good]", "[Good()]"), "is not a subclass of Detector"),
    "not a list": (variant("[Good]", "None"), "TypeError"),
    "misspelt hook": (variant("backdoorscan_detectors", "backdoorscan_detectorz"), "backdoorscan_detectorz"),
    "unknown argument": (variant("_detectors():", "_detectors(model):"), "model"),
    "hook raises": (variant("return [Good]", "raise RuntimeError('boom')"), "RuntimeError: boom"),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes distributions that nobody installed visible: ``install(name, source, ...)`` gives the registry."""
    installed()  # it is kept for the rest of the run, so it must not see what is made up here
    monkeypatch.syspath_prepend(str(tmp_path))
    modules: list[str] = []

    def add(distribution: str, source: str, entry: str | None = None) -> Registry:
        module = distribution.replace("-", "_")
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-3.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 3.1\n")
        (info / "entry_points.txt").write_text(f"[backdoorscan]\n{entry or module} = {module}\n")
        return Registry.load()

    yield add
    for module in modules:
        sys.modules.pop(module, None)


def test_a_strangers_plugin_is_found_with_its_origin(install):
    plugin = install("stranger", GOOD).find("detector", "good-one")
    assert (plugin.distribution, plugin.version, plugin.kind, plugin.summary) == (
        "stranger",
        "3.1",
        "detector",
        "A good one.",
    )
    assert plugin.component.__name__ == "Good"


@pytest.mark.parametrize("source,reason", BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_a_row_among_good_ones(install, source, reason):
    install("bad-one", source)
    registry = install("stranger", GOOD)
    (row,) = [plugin for plugin in registry.plugins if plugin.error]
    assert (row.kind, row.id, row.distribution, row.version) == ("plugin", "bad_one", "bad-one", "3.1")
    assert reason in row.error
    assert row.summary == ""
    assert registry.find("detector", "good-one").distribution == "stranger"
    assert {plugin.id for plugin in installed().plugins} <= {plugin.id for plugin in registry.plugins}


def test_asking_for_the_broken_one_says_why(install):
    registry = install("bad-one", "raise OSError('no library')")
    with pytest.raises(PluginError, match=r"bad-one 3\.1 is broken") as caught:
        registry.find("detector", "bad-one")
    assert "no library" in caught.value.why


def test_the_second_of_two_with_one_id_is_broken(install):
    install("first", GOOD)
    registry = install("second", GOOD)
    errors = [plugin.error for plugin in registry.plugins if plugin.error]
    assert len(errors) == 1
    assert "another plugin already provides the detector 'good-one'" in errors[0]
    assert len([plugin for plugin in registry.of_kind("detector") if plugin.id == "good-one"]) == 1


def test_a_broken_plugins_events_are_not_told(install):
    registry = install(
        "bad-one",
        """
        from backdoorscan import hookimpl

        @hookimpl
        def backdoorscan_scan_finished(report):
            raise AssertionError("told")

        @hookimpl
        def backdoorscan_detectors():
            return [1]
        """,
    )
    registry.announce("scan_finished", report=None)


def test_events_reach_every_listener_with_what_it_asks_for(install):
    listener = """
        from backdoorscan import hookimpl
        heard = []

        @hookimpl
        def backdoorscan_unit_finished({0}):
            heard.append([{0}])
        """
    install("one", listener.format("unit"))
    install("two", listener.format("evidence, detector")).announce("unit_finished", detector=1, unit=2, evidence=3)
    assert sys.modules["one"].heard == [[2]]
    assert sys.modules["two"].heard == [[3, 1]]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("ValueError('bad')", PluginError),
        ("__import__('backdoorscan.errors').errors.ImagesError('mine')", ImagesError),
    ],
)
def test_a_listener_that_fails_is_heard(install, raised, expected):
    registry = install(
        "one",
        f"""
        from backdoorscan import hookimpl

        @hookimpl
        def backdoorscan_scan_finished():
            raise {raised}
        """,
    )
    with pytest.raises(expected) as caught:
        registry.announce("scan_finished", report=None)
    assert type(caught.value) is expected


def test_a_name_nobody_provides_gets_a_suggestion(install):
    with pytest.raises(UnknownNameError) as caught:
        install("stranger", GOOD).find("detector", "good-on")
    assert caught.value.hint == "Did you mean 'good-one'?"


def test_a_name_of_another_kind_is_unknown(install):
    with pytest.raises(UnknownNameError, match="no repairer 'good-one'"):
        install("stranger", GOOD).find("repairer", "good-one")


def test_without_any_plugin():
    with pytest.raises(PluginError, match="No plugins are registered"):
        Registry().find("detector", "neural-cleanse")


def test_options_only_for_what_runs(install):
    registry = install("stranger", GOOD)
    registry.check_settings("detector", ["good-one"], {"good-one": {}})
    with pytest.raises(UsageError, match="neural-cleanse, which does not run"):
        registry.check_settings("detector", ["good-one"], {"neural-cleanse": {"steps": 1}})
    with pytest.raises(UnknownNameError):
        registry.check_settings("detector", ["good-one"], {"good-two": {}})


def test_the_project_itself_is_not_broken():
    assert not [plugin for plugin in installed().plugins if plugin.error]
    assert installed() is installed()
    assert {plugin.kind for plugin in installed().plugins} == {"detector", "repairer", "attack", "loader", "reporter"}
    assert all(plugin.summary for plugin in installed().plugins)
