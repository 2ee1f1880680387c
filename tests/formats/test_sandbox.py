"""What comes out of the sandbox, and what a taken-over reader cannot do from inside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from backdoorscan.errors import ArtifactError, UnknownNameError, UnsafeModelError
from backdoorscan.formats import sandbox
from backdoorscan.formats.sandbox import Limits, run_apart

pytestmark = pytest.mark.skipif(not sandbox.available(), reason="this platform has no fork")

SMALL = Limits(seconds=1, memory=256 * 2**20, output=2**20, deadline=60)


@pytest.fixture
def bad(monkeypatch):
    """The module of functions that misbehave, found by the child as any other module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import misbehaving

    return misbehaving


def refused(function, *args, limits=SMALL):
    with pytest.raises(ArtifactError, match="the file could not be read") as caught:
        run_apart(function, *args, name="the file", limits=limits)
    assert caught.value.hint
    assert run_apart(function.__globals__["same"], 1, name="the next") == 1
    return caught.value.why


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -(10**30), 1.5, float("inf"), "text \ud800 ü", b"", b"\x00\xff", [], (), {}, set(),
        [1, (2, [b"x"]), {"a": {1, 2}, 3: frozenset({"b"})}, {(1, 2): None}], {"tuple": [1], "array": []},
        {"dict": [["bytes", 0]]},
    ],
)  # fmt: skip
def test_plain_data_comes_back_as_it_was(bad, value):
    found = run_apart(bad.same, value, name="x")
    assert found == value and type(found) is type(value)


def test_what_is_no_number_comes_back(bad):
    assert np.isnan(run_apart(bad.same, float("nan"), name="x"))


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "<i8", ">f4", "f2", "f8", "c16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_arrays_come_back_as_they_were(bad, dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    found = run_apart(bad.same, (array, array.T), name="x")
    for ours, theirs in zip(found, (array, array.T), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert ours.tobytes() == theirs.tobytes() and ours.flags.writeable


def test_classes_of_the_module_come_back(bad):
    value = [bad.Point(1, np.arange(3)), bad.Colour.RED, {"deep": (bad.Point(2),)}]
    first, colour, deep = run_apart(bad.same, value, name="x")
    assert first.array.tolist() == [0, 1, 2] and colour is bad.Colour.RED and deep == {"deep": (bad.Point(2),)}


def test_a_large_array_is_not_copied_again(bad):
    array = np.zeros(2**22)
    found = run_apart(bad.same, array, name="x")
    assert found.base is not None and np.array_equal(found, array)


def test_errors_of_readers_come_back(bad):
    with pytest.raises(UnsafeModelError) as caught:
        run_apart(bad.refuse, name="x")
    assert (caught.value.what, caught.value.why, caught.value.hint) == ("what", "why", "hint")
    with pytest.raises(UnknownNameError, match="Convv"):
        run_apart(bad.refuse_name, name="x")


def test_other_errors_say_what_they_are(bad):
    assert "KeyError: 'key'" in refused(bad.fail)


@pytest.mark.parametrize(
    ("name", "args", "why"),
    [
        ("allocate", (), "more than 256 MiB of memory"),
        ("allocate_array", (2**30,), "more than 256 MiB of memory"),
        ("loop", (), "more than 1 s of processor time"),
        ("segfault", (), "crashed: Segmentation fault"),
        ("abort", (), "crashed: Aborted"),
        ("end", (), "did not answer"),
        ("leave", (), "without an answer"),
        ("nest", (), "RecursionError"),
    ],
)
def test_what_a_child_takes_or_breaks_is_its_own(bad, name, args, why):
    assert why in refused(getattr(bad, name), *args)


def test_a_child_that_waits_for_ever(bad):
    assert "more than 1 s" in refused(bad.sleep, limits=Limits(10, 2**28, 2**20, deadline=1.0))


def test_a_result_that_is_too_large(bad):
    assert "takes more than 1 MiB" in refused(bad.same, bytes(2**21))


@pytest.mark.parametrize("kind", ["function", "object", "loose", "text array", "type"])
def test_what_is_no_plain_data(bad, kind):
    assert "no plain data" in refused(bad.not_plain, kind)
    with pytest.raises(TypeError, match="no plain data"):
        run_apart(bad.same, bad.not_plain(kind), name="x")


def test_nothing_of_the_users_is_at_hand(bad, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("API_TOKEN", "secret")
    monkeypatch.chdir(tmp_path)
    sandbox._HELPER.stop()
    environment, typed = run_apart(bad.environment, name="x")
    assert "API_TOKEN" not in environment and not typed
    run_apart(bad.print_much, name="x")
    assert capfd.readouterr() == ("", "")


def test_heavy_modules_are_not_imported(bad):
    from backdoorscan.formats.keras.parse import parse as parse_keras
    from backdoorscan.formats.onnx.parse import parse as parse_onnx

    for function, args in ((parse_keras, (b"", "x")), (parse_onnx, (b"\xff", {}, "x"))):
        with pytest.raises(ArtifactError):
            run_apart(function, *args, name="x")
    assert not {"torch", "scipy", "typer", "rich", "pytest"} & set(run_apart(bad.modules, name="x"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_helper_has_one_thread(bad):
    """One with several could not be forked safely."""
    from backdoorscan.formats.onnx.reference import Excerpt, run

    with pytest.raises(ArtifactError):
        run_apart(run, b"", {}, Excerpt([], [], "x", []), [], name="x")
    process = sandbox._HELPER._process
    assert process is not None
    inner = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *inner):
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1


def landlock() -> bool:
    import ctypes

    return sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) >= 1


@pytest.mark.skipif(not landlock(), reason="this kernel has no Landlock")
def test_files_of_the_user_are_out_of_reach(bad, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    assert "Permission" in refused(bad.read_file, str(secret))
    assert "Permission" in refused(bad.write_file, str(tmp_path / "new"))
    assert "Permission" in refused(bad.remove_file, str(secret))
    assert refused(bad.write_file, "here")
    assert [path.name for path in tmp_path.iterdir()] == ["secret"] and secret.read_text() == "secret"


def namespaces() -> bool:
    code = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x70000000) != 0)"
    return sys.platform == "linux" and subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not namespaces(), reason="this system does not allow namespaces")
def test_no_network_and_no_other_processes(bad, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        refused(bad.connect, server.getsockname()[1])
        with pytest.raises(TimeoutError):
            server.accept()
    assert "ProcessLookupError" in refused(bad.kill, os.getpid())
    refused(bad.run, ["true"])
    refused(bad.fork, str(tmp_path / "late"))
    time.sleep(0.8)
    assert not list(tmp_path.iterdir())


ARRAY = {"tuple": ["value", {"array": ["<f4", [2], 0]}]}


@pytest.mark.parametrize(
    ("head", "places"),
    [
        ('{"tuple": ["value", 1', "[]"),
        ("[" * 100_000, "[]"),
        ({"tuple": ["value", {"object": ["os:system", {"command": "true"}]}]}, []),
        ({"tuple": ["value", {"object": ["backdoorscan.artifact:Artifact", {}]}]}, []),
        ({"tuple": ["value", {"object": ["misbehaving:Loose", {"x": 1}]}]}, []),
        ({"tuple": ["value", {"object": ["misbehaving:Point", {"x": 1}]}]}, []),
        ({"tuple": ["value", {"object": ["misbehaving:Point", {"x": 1, "array": 2, "more": 3}]}]}, []),
        ({"tuple": ["value", {"enum": ["misbehaving:Point", "x"]}]}, []),
        ({"tuple": ["value", {"enum": ["misbehaving:Colour", "__class__"]}]}, []),
        ({"tuple": ["value", {"lambda": 1}]}, []),
        ({"tuple": ["value", {}]}, []),
        ({"tuple": ["value", {"dict": [[[], 1]]}]}, []),
        ({"tuple": ["value", {"bytes": 0}]}, [[0, 2**40]]),
        ({"tuple": ["value", {"bytes": 0}]}, [[-64, 64]]),
        ({"tuple": ["value", {"bytes": 0}]}, [[0, -1]]),
        ({"tuple": ["value", {"bytes": -1}]}, [[0, 1]]),
        ({"tuple": ["value", {"bytes": "0"}]}, [[0, 1]]),
        ({"tuple": ["value", {"bytes": 0}]}, [[0.0, 1.0]]),
        (ARRAY, [[0, 16]]),
        (ARRAY, [[2**63, 8]]),
        (ARRAY, []),
        ({"tuple": ["value", {"array": ["|O8", [1], 0]}]}, [[0, 8]]),
        ({"tuple": ["value", {"array": ["f4,f4", [1], 0]}]}, [[0, 8]]),
        ({"tuple": ["value", {"array": ["<f4", [-1, -2], 0]}]}, [[0, 8]]),
        ({"tuple": ["value", {"array": ["<f4", [0, 2**70], 0]}]}, [[0, 0]]),
        ({"tuple": ["value", {"array": ["<f4", [True, 2], 0]}]}, [[0, 8]]),
        ({"tuple": ["refused", "Exception", "what", "why", "hint"]}, []),
        ({"tuple": ["refused", "difflib", "what", "why", "hint"]}, []),
        ({"tuple": ["refused", "UsageError", 1, 2, 3]}, []),
        ({"tuple": ["value"]}, []),
        (1, []),
    ],
)
def test_forged_results(bad, head, places):
    assert "did not answer in a way that can be read" in refused(bad.forge, head, places, bytes(64))


@pytest.mark.parametrize("lengths", [(2**62, 2), (0, 0), (2, 2**62), (2**64 - 1, 2**64 - 1)])
def test_forged_lengths(bad, lengths):
    assert "did not answer" in refused(bad.forge, "[]", "[]", b"", lengths)


def test_ctrl_c_leaves_nothing_running(bad):
    run_apart(bad.same, 1, name="x")
    process = sandbox._HELPER._process
    assert process is not None
    # Where the tests run in the background, the signal may be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            run_apart(bad.sleep, name="x")
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.poll() is not None
    assert run_apart(bad.same, 1, name="x") == 1


def test_several_threads(bad):
    sandbox._HELPER.stop()
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda n: found.append(run_apart(bad.same, n, name="x")), args=(n,)) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(8))
    assert sandbox._HELPER._process is not None and sandbox._HELPER._process.poll() is None


PROGRAM = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import misbehaving
from backdoorscan.formats import sandbox
sandbox.run_apart(misbehaving.same, 1, name="x")
"""


def program(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM + code, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_program_that_forks_has_a_helper_in_each_part(bad):
    ran = program("""
if child := os.fork():
    os.waitpid(child, 0)
print(sandbox.run_apart(misbehaving.same, 1 if child else 2, name="x"), flush=True)
""")
    assert (ran.stdout, ran.stderr) == ("2\n1\n", "")


def test_the_helper_ends_with_the_program(bad):
    ran = program("print(sandbox._HELPER._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    status = Path(f"/proc/{int(ran.stdout)}/status")
    for _ in range(200):
        try:
            if "zombie" in status.read_text():
                return
        except OSError:
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


def test_without_fork_the_reports_say_so(bad, monkeypatch):
    assert sandbox.facts() == {}
    monkeypatch.setattr(sandbox, "available", lambda: False)
    assert run_apart(bad.same, 3, name="x") == 3
    assert "no fork" in sandbox.facts()["sandbox"]
