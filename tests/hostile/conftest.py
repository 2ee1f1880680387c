"""The hostile corpus: what its tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# This way of importing tests leaves their folder out of the path; the corpus is several modules.
sys.path.append(str(Path(__file__).parents[1]))

from hostile.good import good_files
from hostile.yard import Yard


@pytest.fixture(scope="session")
def good() -> dict[str, bytes]:
    """The good file of each format."""
    return good_files()


@pytest.fixture
def yard(tmp_path: Path, good: dict[str, bytes]) -> Yard:
    """A folder to meet a hostile file in."""
    return Yard(tmp_path, good)
