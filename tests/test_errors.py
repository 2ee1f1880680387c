"""What errors do with the words of strangers."""

from __future__ import annotations

from backdoorscan.errors import ArtifactError


def test_names_out_of_a_file_cannot_drive_the_terminal() -> None:
    error = ArtifactError("layer \x1b[2J'a\nb' is odd", why="tab\there", hint="Ünïcode is fine.")
    error.what = f"model.h5: {error.what}\r"
    assert str(error).splitlines() == ["model.h5: layer �[2J'a�b' is odd�", "tab�here", "Ünïcode is fine."]
