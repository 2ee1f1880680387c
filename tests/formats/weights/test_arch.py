import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from backdoorscan.errors import UsageError
from backdoorscan.formats.weights.arch import build

SIMPLE = "from torch import nn\ndef make(): return nn.Linear({size}, 1)\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_class_a_function_and_an_instance(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.py",
        "from torch import nn\n"
        "class Net(nn.Linear):\n    def __init__(self, size=3): super().__init__(size, 1)\n"
        "def make(): return Net(4)\n"
        "ready = Net(5)\n",
    )
    assert [build(f"{file}:{name}").in_features for name in ("Net", "make", "ready")] == [3, 4, 5]
    first, second = build(f"{file}:ready"), build(f"{file}:ready")
    assert first is not second, "loading weights into one must not change the other"


def test_a_package_module() -> None:
    assert isinstance(build("torch.nn:Identity"), nn.Identity)


def test_two_files_of_the_same_name_do_not_clash(tmp_path: Path) -> None:
    one = write(tmp_path / "one" / "net.py", SIMPLE.format(size=1))
    two = write(tmp_path / "two" / "net.py", SIMPLE.format(size=2))
    assert build(f"{one}:make").in_features == 1
    assert build(f"{two}:make").in_features == 2
    assert "net" not in sys.modules


def test_an_edited_file_is_read_again_and_leaves_nothing_behind(tmp_path: Path) -> None:
    file = write(tmp_path / "net.py", SIMPLE.format(size=1))
    assert build(f"{file}:make").in_features == 1
    write(file, SIMPLE.format(size=2))
    assert build(f"{file}:make").in_features == 2
    assert [path.name for path in tmp_path.iterdir()] == ["net.py"]
    assert str(tmp_path) not in sys.path


def test_neighbours_can_be_imported_but_shadow_nothing(tmp_path: Path) -> None:
    write(tmp_path / "neighbour_of_the_arch.py", "SIZE = 7\n")
    write(tmp_path / "json.py", "raise RuntimeError('shadowed')\n")
    file = write(
        tmp_path / "net.py",
        "import json\nfrom neighbour_of_the_arch import SIZE\nfrom torch import nn\n"
        "def make(): return nn.Linear(SIZE, 1)\n",
    )
    assert build(f"{file}:make").in_features == 7


def test_dataclasses_and_pickles_find_their_module(tmp_path: Path) -> None:
    file = write(
        tmp_path / "net.py",
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\nfrom torch import nn\n"
        "@dataclass\nclass Size:\n    n: int = 3\n"
        "class Net(nn.Linear):\n    def __init__(self): super().__init__(Size().n, 1)\n",
    )
    net = build(f"{file}:Net")
    assert torch.equal(pickle.loads(pickle.dumps(net)).weight, net.weight)


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("class Resnet: pass\nimport os\n", "ResNet", "Did you mean 'Resnet'"),
        ("def one(): pass\ndef _two(): pass\n", "zzzz", "It defines: one."),
        ("raise RuntimeError('boom')", "x", "RuntimeError: boom"),
        ("def make(:", "make", "SyntaxError"),
        ("import sys\nsys.exit(3)", "make", "SystemExit: 3"),
        ("import no_such_module_at_all", "make", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("def make(): return 1 / 0", "make", "ZeroDivisionError: division by zero"),
        ("def make(): return [1]", "make", "gives a list, not a torch.nn.Module"),
        ("make = 3", "make", "gives a int, not a torch.nn.Module"),
        ("def make(channels, *, classes, size=3): pass", "make", "needs arguments: channels, classes."),
    ],
)
def test_errors_in_the_file(tmp_path: Path, text: str, name: str, said: str) -> None:
    file = write(tmp_path / "net.py", text)
    before = dict(sys.modules)
    with pytest.raises(UsageError) as caught:
        build(f"{file}:{name}")
    assert said in str(caught.value)
    if text.startswith(("raise", "import")):
        assert caught.value.__cause__ is not None
        assert not [key for key in sys.modules.keys() - before.keys() if key.startswith("_backdoorscan_arch_")]


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("nothing_here.py:Net", "no architecture file nothing_here.py"),
        ("net.py", "names no network"),
        ("net.py:", "names no network"),
        (":Net", "names no network"),
        ("model.h5", "for Keras weights"),
        ("model.json", "for Keras weights"),
        ("no_such_package.sub:Net", "no Python module 'no_such_package.sub'"),
        ("torch.no_such:Net", "no Python module 'torch.no_such'"),
        ("json.decoder.deeper:Net", "no Python module"),
        ("some/folder/net:Net", "neither a .py file nor"),
        ("torch.nn:Linea", "Did you mean 'Linear'"),
        ("torch.nn:Linear", "needs arguments: in_features, out_features"),
    ],
)
def test_errors_in_the_option(arch: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(arch)
    assert said in str(caught.value)
    assert caught.value.hint


def test_errors_say_that_the_code_is_executed() -> None:
    with pytest.raises(UsageError, match="trust"):
        build("net.py")


def test_a_package_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "failing_arch" / "__init__.py", "import absent_dependency_of_it\n")
    write(tmp_path / "failing_arch" / "net.py", "")
    write(tmp_path / "failing_arch_two.py", "raise KeyError('deep')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="absent_dependency_of_it"):
        build("failing_arch.net:Net")
    with pytest.raises(UsageError, match="KeyError: 'deep'"):
        build("failing_arch_two:Net")
