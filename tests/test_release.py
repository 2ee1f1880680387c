"""What is released: a source archive and a wheel, and the wheel at work where nothing of this checkout is."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from importlib.util import find_spec
from pathlib import Path

import pytest

import backdoorscan
from backdoorscan.registry import installed

ROOT = Path(__file__).parents[1]
BUILT_HERE = {"dist", ".venv", ".git"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(find_spec, ("build", "hatchling", "pip"))), reason="build, hatchling or pip is not installed"
    ),
]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def program(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of the wheel, installed beside the dependencies of this interpreter, where this checkout is not."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python, (wheel,) = folder / "bin" / "python", release.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Behind what was installed on the path; only folders, as .pth files in them would bring the checkout in.
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return folder / "bin" / "backdoorscan"


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={"HOME": str(cwd), "OMP_NUM_THREADS": "1", "BACKDOORSCAN_CACHE_DIR": str(cwd / "cache")},
        capture_output=True,
        text=True,
    )


def test_the_wheel_has_the_package_whole_and_nothing_else(release: Path) -> None:
    (path,) = release.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = HeaderParser().parsestr(
            wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
        )
        licensed = any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
    sources = [ROOT / "backdoorscan", ROOT / "plugins" / "backdoorscan_plugins"]
    expected = {
        str(file.relative_to(source.parent))
        for source in sources
        for file in source.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert names == expected
    assert "backdoorscan/py.typed" in names
    assert licensed
    assert metadata["Version"] == backdoorscan.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().startswith("# backdoorscan")


def test_the_source_archive_has_what_builds_and_tests_it(release: Path) -> None:
    (path,) = release.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = [
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "docs/index.md",
        "docs/screenshot.svg",
    ]
    assert [name for name in (*needed, "tests/test_release.py", "backdoorscan/__init__.py") if name not in names] == []
    assert not {name.partition("/")[0] for name in names} & BUILT_HERE


def test_the_wheel_scans_where_the_checkout_is_not(program: Path, tmp_path: Path) -> None:
    python = program.with_name("python")
    where = run(python, "-c", "import backdoorscan as b; print(b.__file__, b.__version__)", cwd=tmp_path)
    file, version = where.stdout.split()
    assert Path(file).is_relative_to(program.parents[1])
    assert version == backdoorscan.__version__
    listed = json.loads(run(program, "plugins", "--json", cwd=tmp_path).stdout)
    ours = {(own["id"], own["kind"]): own["error"] for own in listed if own["distribution"] == "backdoorscan"}
    assert set(ours.values()) == {""}
    assert set(ours) >= {(own.id, own.kind) for own in installed().plugins if own.distribution == "backdoorscan"}
    shown = run(program, "demo", "demo", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "model.h5  BACKDOORED" in shown.stdout
    assert "clean_model.h5  CLEAN" in shown.stdout
