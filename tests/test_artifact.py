import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from backdoorscan import artifact as artifacts
from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, UnsafeModelError

ODD = ["../b", "/b", "a/../b", "./b", "a//b", "a/", "", ".", "..", "a\\b", "c:b", "b\n", "\x1b[2J", "\ud800"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree(place: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


def test_a_file(tmp_path: Path) -> None:
    artifact = Artifact.read(tree(tmp_path, {"m": b"abc"}) / "m")
    assert (artifact.data, artifact.sha256, dict(artifact.parts)) == (b"abc", sha256(b"abc"), {})


def test_a_folder_and_its_digest(tmp_path: Path) -> None:
    files = {"b.txt": b"2", "a/c.bin": b"3", "a.txt": b"1"}
    artifact = Artifact.read(tree(tmp_path, {**files, ".git/config": b"x", ".hidden": b"y", "a/.z": b"z"}))
    assert artifact.data == b"" and dict(artifact.parts) == files
    listing = "".join(f"{sha256(files[name])}  {name}\n" for name in ("a.txt", "a/c.bin", "b.txt"))
    assert artifact.sha256 == sha256(listing.encode())


@pytest.mark.parametrize(
    "change", [{"a": b"2", "b": b"1"}, {"a": b"1"}, {"c": b"1", "b": b"2"}, {"a/b": b"1", "b": b"2"}]
)
def test_the_digest_covers_names_and_contents(tmp_path: Path, change: dict[str, bytes]) -> None:
    first = Artifact.read(tree(tmp_path / "1", {"a": b"1", "b": b"2"}))
    assert first.sha256 != Artifact.read(tree(tmp_path / "2", change)).sha256


def link(place: Path) -> None:
    (place / "x").symlink_to(place.parent / "secret")


def dead_link(place: Path) -> None:
    (place / "x").symlink_to("nowhere")


def linked_folder(place: Path) -> None:
    (place / "x").symlink_to(place.parent, target_is_directory=True)


def hard_link(place: Path) -> None:
    os.link(place.parent / "secret", place / "x")


def pipe(place: Path) -> None:
    os.mkfifo(place / "x")


def odd_name(place: Path) -> None:
    (place / "x\ny").write_bytes(b"1")


@pytest.mark.parametrize("trick", [link, dead_link, linked_folder, hard_link, pipe, odd_name])
def test_folders_with_more_than_plain_files(tmp_path: Path, trick: Callable[[Path], None]) -> None:
    tree(tmp_path, {"secret": b"s", "m/a": b"1"})
    trick(tmp_path / "m")
    with pytest.raises(UnsafeModelError) as caught:
        Artifact.read(tmp_path / "m")
    assert caught.value.hint and caught.value.what.isprintable()


def test_folders_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {"a": b"123", "b": b"45"})
    monkeypatch.setattr(artifacts, "_MAX_BYTES", 4)
    with pytest.raises(ArtifactError, match="too large"):
        Artifact.read(tmp_path)
    monkeypatch.setattr(artifacts, "_MAX_FILES", 1)
    with pytest.raises(ArtifactError, match="too large") as caught:
        Artifact.read(tmp_path)
    assert "more than 1 files" in caught.value.why


def test_companions(tmp_path: Path) -> None:
    artifact = Artifact.read(tree(tmp_path, {"m": b"0", "w/1": b"1", "2": b"2", "3": b"3"}) / "m")
    assert artifact.with_companions(()) is artifact
    whole = artifact.with_companions(["w/1", "2", "2"])
    assert (whole.data, dict(whole.parts)) == (b"0", {"w/1": b"1", "2": b"2"})
    listing = "".join(f"{sha256(data)}  {name}\n" for name, data in (("2", b"2"), ("m", b"0"), ("w/1", b"1")))
    assert whole.sha256 == sha256(listing.encode())


@pytest.mark.parametrize("names", [[name] for name in ODD] + [["m"], ["b", "../b"]])
def test_companions_elsewhere(tmp_path: Path, names: Sequence[str]) -> None:
    tree(tmp_path, {"b": b"secret", "f/m": b"0", "f/b": b"1", "f/a/x": b"2"})
    with pytest.raises(UnsafeModelError) as caught:
        Artifact.read(tmp_path / "f" / "m").with_companions(names)
    assert caught.value.what.isprintable()


@pytest.mark.parametrize("trick", [link, hard_link, pipe])
def test_companions_that_are_no_plain_files(tmp_path: Path, trick: Callable[[Path], None]) -> None:
    tree(tmp_path, {"secret": b"s", "m/a": b"1"})
    trick(tmp_path / "m")
    with pytest.raises(UnsafeModelError):
        Artifact.read(tmp_path / "m" / "a").with_companions(["x"])


def test_companions_behind_a_linked_folder(tmp_path: Path) -> None:
    tree(tmp_path, {"out/secret": b"s", "m/a": b"1"})
    (tmp_path / "m" / "x").symlink_to(tmp_path / "out", target_is_directory=True)
    with pytest.raises(UnsafeModelError, match="link"):
        Artifact.read(tmp_path / "m" / "a").with_companions(["x/secret"])


@pytest.mark.parametrize("name", ["absent", "a/b"])
def test_companions_that_are_absent(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="Cannot read"):
        Artifact.read(tree(tmp_path, {"a": b"1"}) / "a").with_companions([name])
