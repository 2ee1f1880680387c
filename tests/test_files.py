"""Files and folders are whole or not there."""

import subprocess
import sys
import threading

import pytest

from backdoorscan.errors import OutputError
from backdoorscan.files import whole_file, whole_folder, write_whole


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with whole_file(path) as place:
        place.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert place.parent == path.parent
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("written", [False, True])
def test_a_file_that_fails_changes_nothing(tmp_path, written):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as place:
        if written:
            place.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_disk_that_refuses(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for path in (tmp_path / "folder", tmp_path / "none" / "a"):
        with pytest.raises(OutputError, match="Cannot write") as error:
            write_whole(path, b"x", hint="Try elsewhere.")
        assert error.value.hint == "Try elsewhere."
        assert str(path) in error.value.what
    assert names(tmp_path) == ["folder", "folder/inner"]


def test_a_folder_takes_its_parents_along(tmp_path):
    with whole_folder(tmp_path / "a" / "b" / "c") as place:
        (place / "x").write_text("x")
        assert not (tmp_path / "a" / "b" / "c").exists()
    assert names(tmp_path) == ["a", "a/b", "a/b/c", "a/b/c/x"]


def test_a_folder_that_fails_leaves_no_parents_behind_but_those_in_use(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "mine" / "a" / "b" / "c") as place:
        (place / "x").write_text("x")
        (tmp_path / "mine" / "a" / "note").write_text("of somebody else, meanwhile")
        raise ZeroDivisionError
    assert names(tmp_path) == ["mine", "mine/a", "mine/a/note"]
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "b" / "c"):
        raise ZeroDivisionError
    no_folder = tmp_path / "mine" / "a" / "note"
    with pytest.raises(OutputError, match="Cannot write to"), whole_folder(no_folder / "c" / "d"):
        pass
    assert names(tmp_path) == ["mine", "mine/a", "mine/a/note"]


def test_files_move_into_a_folder_that_exists(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").write_text("kept")
    (out / "x").write_text("old")
    with whole_folder(out) as place:
        (place / "x").write_text("new")
    assert (out / "x").read_text() == "new"
    assert names(tmp_path) == ["out", "out/kept", "out/x"]


def test_a_full_disk_leaves_the_old_content(tmp_path, full_disk):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with full_disk(100), pytest.raises(OutputError, match="Cannot write") as error:
        write_whole(path, bytes(1000))
    assert "too large" in error.value.why
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


HALF = """
import sys
from pathlib import Path
from backdoorscan.files import whole_file, whole_folder

with whole_file(Path("a.bin")) as place, whole_folder(Path("out")) as folder:
    place.write_bytes(b"half")
    (folder / "half").write_bytes(b"half")
    print("written", flush=True)
    sys.stdin.read()
"""


def test_a_process_that_is_killed_leaves_the_old_content_and_nothing_in_the_way(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    command = [sys.executable, "-c", HALF]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        process.kill()
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert not (tmp_path / "out").exists()
    write_whole(tmp_path / "a.bin", b"new")
    with whole_folder(tmp_path / "out") as place:
        (place / "whole").write_bytes(b"whole")
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert names(tmp_path / "out") == ["whole"]


def test_who_writes_the_same_file_at_once_is_not_in_the_way(tmp_path):
    together = threading.Barrier(4, timeout=60)
    failed = []

    def write(content):
        try:
            with whole_file(tmp_path / "a.bin") as place:
                together.wait()
                place.write_bytes(content)
                together.wait()
        except OSError as error:
            failed.append(error)

    contents = [bytes([number]) * 100_000 for number in range(4)]
    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failed == []
    assert (tmp_path / "a.bin").read_bytes() in contents
    assert names(tmp_path) == ["a.bin"]
