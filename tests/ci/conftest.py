"""A repository with models, and runners for it."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def module_of() -> Callable[[Path], ModuleType]:
    """``module_of(path)``: a script as a module."""

    def load(path: Path) -> ModuleType:
        name = f"script_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # its dataclasses look for themselves there
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def pipeline(module_of: Callable[[Path], ModuleType]) -> ModuleType:
    """The script that plays a pipeline."""
    return module_of(ROOT / "tests" / "ci" / "pipeline.py")


@pytest.fixture(scope="session")
def repository(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``models/{backdoored,clean,corrupt}.pt2`` and what they need; read only."""
    return pipeline.make_repository(tmp_path_factory.mktemp("ci") / "repository")


@pytest.fixture
def yaml() -> Any:
    """PyYAML."""
    return pytest.importorskip("yaml")


@pytest.fixture
def example(yaml: Any) -> Callable[[str], Any]:
    """``example("GitLab CI")``: the first block of YAML in that section of the guide."""

    def find(section: str) -> Any:
        text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8").split(f"\n## {section}\n", 1)[1]
        block = re.search(r"^```yaml\n(.*?)^```", text.split("\n## ")[0], re.MULTILINE | re.DOTALL)
        assert block is not None
        return yaml.safe_load(block[1])

    return find
