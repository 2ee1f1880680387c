"""The material of ``backdoorscan demo``: a backdoored network, its clean twin and images for both."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np

from backdoorscan.demo.badnet import TARGET, attack, poison
from backdoorscan.demo.digits import NUM_CLASSES, load_digits
from backdoorscan.demo.keras_writer import write_keras
from backdoorscan.demo.training import accuracy, fit
from backdoorscan.errors import OutputError
from backdoorscan.files import write_whole
from backdoorscan.images import LabelledImages

__all__ = ["DemoFiles", "make_demo"]


@dataclass(frozen=True)
class DemoFiles:
    """What :func:`make_demo` wrote, and what it measured on the held-out images.

    Attributes:
        folder: Where everything lies.
        model: The backdoored network, a Keras file that takes images (N, H, W, C) in [0, 1].
        clean_model: The network trained alike on the same images without the poison.
        clean: The defender's clean images. This and the other images are HDF5 files with ``data``, uint8
            (N, C, H, W), and ``label``, float64 (N,).
        poisoned: Held-out images of other classes with the trigger, labelled with the target.
        test: Held-out clean images.
        target: The label that the trigger leads to.
        accuracy: Of ``model`` on ``test``, in [0, 1].
        attack_success: Of ``model`` on ``poisoned``: the share that it gives the target.
        clean_model_accuracy: The accuracy of ``clean_model``.
        clean_model_attack_success: The share of ``poisoned`` that ``clean_model`` gives the target.
    """

    folder: Path
    model: Path
    clean_model: Path
    clean: Path
    poisoned: Path
    test: Path
    target: int
    accuracy: float
    attack_success: float
    clean_model_accuracy: float
    clean_model_attack_success: float


def make_demo(folder: Path, seed: int = 0, *, force: bool = False) -> DemoFiles:
    """Train the demo's two networks and write them and their images; seconds, and no download.

    Args:
        folder: Made if it does not exist.
        seed: The same seed gives the same files, byte for byte, on the same machine.
        force: Write into a folder that holds files already, over those of the same name.

    Raises:
        UsageError: scikit-learn is not installed.
        OutputError: ``folder`` holds files and ``force`` is false, or it cannot be written to.
    """
    _prepare(folder, force)  # before the work, not after it
    digits = load_digits(seed)
    bad = fit(poison(digits.train, seed), NUM_CLASSES, seed)
    twin = fit(digits.train, NUM_CLASSES, seed)
    poisoned = attack(digits.test)
    shape = digits.test.shape
    return DemoFiles(
        folder=folder,
        model=_write(folder / "model.h5", lambda place: write_keras(place, bad, shape)),
        clean_model=_write(folder / "clean_model.h5", lambda place: write_keras(place, twin, shape)),
        clean=_write(folder / "clean.h5", lambda place: _write_images(place, digits.clean)),
        poisoned=_write(folder / "poisoned.h5", lambda place: _write_images(place, poisoned)),
        test=_write(folder / "test.h5", lambda place: _write_images(place, digits.test)),
        target=TARGET,
        accuracy=accuracy(bad, digits.test),
        attack_success=accuracy(bad, poisoned),
        clean_model_accuracy=accuracy(twin, digits.test),
        clean_model_attack_success=accuracy(twin, poisoned),
    )


def _prepare(folder: Path, force: bool) -> None:
    """Make ``folder``, or check that it may be written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as err:
        raise OutputError(f"{folder} cannot be used as a folder.", why=err.strerror or str(err)) from err
    if occupied and not force:
        raise OutputError(
            f"{folder} already holds files.",
            why="The demo would write among them.",
            hint="Name a new folder, or overwrite the demo's own files in this one with --force.",
        )


def _write(path: Path, write: Callable[[BinaryIO], None]) -> Path:
    """Put what ``write`` writes at ``path`` once it is complete."""
    content = io.BytesIO()  # not the disk: the HDF5 library crashes where that is full
    write(content)
    write_whole(path, content.getvalue())
    return path


def _write_images(place: BinaryIO, images: LabelledImages) -> None:
    """Write ``images`` as the file that the CSAW backdoor competition uses."""
    with h5py.File(place, "w") as file:
        # A time of change would make every file another one.
        file.create_dataset("data", data=images.pixels, track_times=False)
        file.create_dataset("label", data=images.labels.astype(np.float64), track_times=False)
