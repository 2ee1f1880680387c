"""Triggers as files: ``.npz`` with masks and patterns, or HDF5 as the CSAW competition's students hand them in."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt
import torch

from backdoorscan.classifier import Classifier, logits, to_tensor
from backdoorscan.errors import ArtifactError, ImagesError, OutputError
from backdoorscan.files import write_whole
from backdoorscan.findings import Finding
from backdoorscan.formats.images import load_images
from backdoorscan.formats.images.named import read_named
from backdoorscan.formats.images.reading import accessing, read_file
from backdoorscan.formats.sandbox import run_apart
from backdoorscan.images import LabelledImages
from backdoorscan.trigger import Trigger

_NAMES = ("mask", "pattern", "label")

_Array: TypeAlias = npt.NDArray[Any]


def save_triggers(triggers: Sequence[Trigger], path: Path) -> None:
    """Write triggers.

    ``.npz``: ``mask`` (N, 1, H, W) and ``pattern`` (N, C, H, W), float32 in [0, 1], and ``label`` (N,).
    ``.h5``: ``data``, the visible part mask · pattern as uint8 (N, C, H, W), and ``label``; that is what a picture of
    the trigger can hold, so the mask is kept beside it under the names of the ``.npz``.

    Raises:
        OutputError: There are none, the name ends otherwise, or the file cannot be written.
    """
    if not triggers:
        raise OutputError("There are no triggers to save.")
    masks = np.stack([trigger.mask.numpy() for trigger in triggers])
    patterns = np.stack([trigger.pattern.numpy() for trigger in triggers])
    labels = np.array([trigger.target for trigger in triggers])
    buffer = io.BytesIO()
    if path.suffix == ".npz":
        np.savez_compressed(buffer, mask=masks, pattern=patterns, label=labels)
    elif path.suffix in (".h5", ".hdf5"):
        with h5py.File(buffer, "w", track_order=True) as file:
            file.create_dataset("data", data=np.round(255 * masks * patterns).astype(np.uint8))
            file.create_dataset("label", data=labels.astype(np.float64))
            file.create_dataset("mask", data=masks, compression="gzip")
            file.create_dataset("pattern", data=patterns, compression="gzip")
    else:
        raise OutputError(f"{path}: triggers are saved as .npz or .h5.")
    write_whole(path, buffer.getvalue())


def load_triggers(path: Path, classifier: Classifier, images: LabelledImages) -> list[Finding]:
    """Read triggers and try them on a network.

    A file with masks is taken as it is. A file of pictures alone (``data``, as students' reversed triggers are) says
    what is added to an image and not how much is covered: each picture's brightest channel is taken as its mask. A
    label that the network does not have, as N for "backdoored", is replaced by the class that the trigger leads to.

    Args:
        path: ``.npz`` or HDF5.
        classifier: The network the triggers are for.
        images: Clean images to try them on.

    Returns:
        A finding per trigger, with its success on ``images``.

    Raises:
        ImagesError: The file cannot be read, or its pictures are of another size.
    """
    masks, patterns, labels = _read(path)
    if patterns.shape[1:] != classifier.input_shape or masks.shape[2:] != patterns.shape[2:]:
        raise ImagesError(
            f"{path}: triggers of shape {patterns.shape[1:]} do not fit a network of {classifier.input_shape}."
        )
    pixels = to_tensor(images.pixels)
    own = torch.from_numpy(images.labels)
    findings = []
    for mask, pattern, label in zip(masks, patterns, labels, strict=True):
        trigger = Trigger(torch.from_numpy(mask), torch.from_numpy(pattern), int(label))
        predicted = logits(classifier, trigger.stamp(pixels)).argmax(1)
        target = trigger.target
        if not 0 <= target < classifier.num_classes:
            target = int(predicted.bincount().argmax())
            trigger = Trigger(trigger.mask, trigger.pattern, target)
        others = own != target
        success = float((predicted[others] == target).double().mean()) if bool(others.any()) else None
        findings.append(
            Finding(target_label=target, p_value=0.0, score=0.0, trigger=trigger, attack_success_rate=success)
        )
    return findings


def _read(path: Path) -> tuple[_Array, _Array, _Array]:
    """Masks (N, 1, H, W), patterns (N, C, H, W), labels (N,); float32 in [0, 1]."""
    source = str(path)
    with accessing(source):
        content = read_file(path, source)
    try:
        arrays = run_apart(read_named, content, source, _NAMES, name=source)
    except ArtifactError as error:
        raise ImagesError(error.what, why=error.why, hint="Save the triggers again, as .npz.") from error
    if len(arrays) == len(_NAMES):
        masks, patterns = (np.clip(arrays[name], 0, 1).astype(np.float32) for name in ("mask", "pattern"))
        if masks.ndim == patterns.ndim == 4 and len(masks) == len(patterns) == len(arrays["label"]):
            return masks, patterns, np.asarray(arrays["label"]).astype(np.int64)
    images = load_images(path)
    visible = images.pixels.astype(np.float32) / (255 if images.pixels.dtype == np.uint8 else 1)
    masks = visible.max(axis=1, keepdims=True)
    return masks, np.divide(visible, masks, out=np.zeros_like(visible), where=masks > 0), images.labels
