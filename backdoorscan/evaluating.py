"""The verb *evaluate*: clean accuracy and attack success of a network, a repaired network or a GoodNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backdoorscan.artifact import Artifact
from backdoorscan.classifier import logits, to_tensor
from backdoorscan.costing import Meter, versions
from backdoorscan.errors import ArtifactError, ImagesError
from backdoorscan.formats.goodnet import GoodNetFile, is_goodnet
from backdoorscan.formats.images import load_images, load_picture
from backdoorscan.formats.loading import ReadOptions, load_model, read_artifact
from backdoorscan.images import LabelledImages
from backdoorscan.measured import Attacks, EvaluationReport, Scores
from backdoorscan.ops.metrics import accuracy, attack_counts, macro_precision
from backdoorscan.registry import Registry
from backdoorscan.trigger import Trigger


def measure(
    network: nn.Module,
    images: LabelledImages,
    poisoned: LabelledImages | None = None,
    *,
    target: int | None = None,
    rejects: int | None = None,
    triggers: Sequence[Trigger] = (),
) -> Scores:
    """Clean accuracy, precision and, with poisoned images, attack success.

    Args:
        network: Images (N, C, H, W) in [0, 1] -> scores.
        images: Clean labelled images.
        poisoned: Images with the trigger on them. Their labels are the target labels; or the true ones if ``target``
            is given and they are not all equal to it, and then images of the target class do not count.
        target: The target label.
        rejects: For a GoodNet, the class that says "backdoored".
        triggers: Reversed triggers to stamp on the clean images.
    """
    predicted, labels = predictions(network, images), torch.from_numpy(images.labels)
    reversed_rate, reversed_attacks = measure_reversed(network, images, triggers)
    scores = Scores(
        clean_accuracy=accuracy(predicted, labels),
        macro_precision=macro_precision(predicted, labels, rejects),
        false_reject_rate=None if rejects is None else accuracy(predicted, torch.tensor(rejects)),
        reversed_success_rate=reversed_rate,
        reversed_attacks=reversed_attacks,
    )
    if poisoned is None:
        return scores
    predicted, labels = predictions(network, poisoned), torch.from_numpy(poisoned.labels)
    if target is not None and has_true_labels(poisoned, target):
        successful, unsuccessful = attack_counts(predicted, labels, target)
    else:
        successful = int((predicted == labels).sum())
        unsuccessful = len(poisoned) - successful
    return replace(
        scores,
        attack_success_rate=successful / (successful + unsuccessful),
        caught_rate=None if rejects is None else accuracy(predicted, torch.tensor(rejects)),
        successful_attacks=successful,
        unsuccessful_attacks=unsuccessful,
    )


def has_true_labels(poisoned: LabelledImages, target: int | None) -> bool:
    """Whether the labels of poisoned images are known to be the true ones, and not those that the attack leads to."""
    return target is not None and bool((poisoned.labels != target).any())


def measure_reversed(
    network: nn.Module, images: LabelledImages, triggers: Sequence[Trigger]
) -> tuple[float | None, Attacks | None]:
    """What reversed triggers do to clean images; both ``None`` without triggers or images of other classes.

    A reversed trigger is fainter than the true one, as its search ends where it just works. A repair that holds only
    against the faint one is none, so the rate looks at the triggers at twice their strength as well.

    Returns:
        The largest rate of success, 0 to 1, and how many attempts succeed of all triggers as they are.
    """
    pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
    rates: list[float] = []
    successful = unsuccessful = 0
    for trigger in triggers:
        doubled = Trigger((2 * trigger.mask).clamp(max=1), trigger.pattern, trigger.target)
        for form in (trigger, doubled):
            predicted = logits(network, form.stamp(pixels)).argmax(1)
            hits, misses = attack_counts(predicted, labels, trigger.target)
            if hits + misses:
                rates.append(hits / (hits + misses))
            if form is trigger:
                successful, unsuccessful = successful + hits, unsuccessful + misses
    return (max(rates), Attacks(successful, unsuccessful)) if rates else (None, None)


def predictions(network: nn.Module, images: LabelledImages) -> Tensor:
    """The class (N,) a network gives each image."""
    return logits(network, to_tensor(images.pixels)).argmax(1)


def evaluate(
    model: str | Path | Artifact,
    images: LabelledImages | str | Path,
    poisoned: LabelledImages | str | Path | None = None,
    read: ReadOptions | None = None,
    *,
    target: int | None = None,
    seed: int = 0,
    registry: Registry | None = None,
) -> EvaluationReport:
    """Measure a model file: a network, a repaired one, or a GoodNet.

    Args:
        model: The file, or what was read of it.
        images: Clean labelled images, or where to read them.
        poisoned: Images with the trigger on them; see ``measure`` for what their labels mean.
        read: What is known about the file.
        target: The target label.
        seed: Chooses the images that decide how the network was fed.
        registry: Where loaders are found.

    Raises:
        BackdoorscanError: The file or the images cannot be used.
    """
    meter = Meter()
    if not isinstance(images, LabelledImages):
        images = load_images(images)
    if poisoned is not None and not isinstance(poisoned, LabelledImages):
        poisoned = load_images(poisoned)
    network, facts, num_classes = open_network(model, images, read, seed, registry)
    rejects = num_classes if facts["kind"] == "goodnet" else None
    check_images(images, poisoned, target, num_classes)
    scores = measure(network, images, poisoned, target=target, rejects=rejects)
    return EvaluationReport(
        seed=seed,
        versions=versions(),
        cost=meter.read(),
        model=facts,
        images=images.described(),
        poisoned=poisoned.described() if poisoned is not None else None,
        target_label=target,
        scores=scores,
    )


def check_images(images: LabelledImages, poisoned: LabelledImages | None, target: int | None, num_classes: int) -> None:
    """Check that what is to be measured belongs together.

    Raises:
        ImagesError: Labels that the model does not have, or images of different sizes.
    """
    images.check_fits(num_classes)
    if poisoned is not None:
        poisoned.check_fits(num_classes)
        if poisoned.shape != images.shape:
            raise ImagesError(f"{poisoned.source} has images of {poisoned.shape}, {images.source} of {images.shape}.")
    if target is not None and not 0 <= target < num_classes:
        raise ImagesError(f"--target {target} does not exist in a model of {num_classes} classes.")


def open_network(
    model: str | Path | Artifact,
    images: LabelledImages,
    read: ReadOptions | None,
    seed: int,
    registry: Registry | None = None,
) -> tuple[nn.Module, dict[str, Any], int]:
    """A network or a GoodNet, its facts for the report, and its number of classes without "backdoored"."""
    artifact = model if isinstance(model, Artifact) else read_artifact(model, registry)
    if is_goodnet(artifact):
        goodnet = GoodNetFile(artifact)
        if goodnet.input_shape != images.shape:
            raise ImagesError(
                f"{images.source}: images of {images.shape} do not fit a GoodNet of {goodnet.input_shape}."
            )
        facts = {
            "kind": "goodnet",
            "path": str(artifact.path),
            "sha256": artifact.sha256,
            "format": goodnet.format,
            "input_shape": list(goodnet.input_shape),
            "num_classes": goodnet.num_classes,
        }
        return goodnet, facts, goodnet.num_classes
    loaded = load_model(artifact, images, read, seed=seed, registry=registry)
    return loaded.classifier, {"kind": "classifier", **loaded.facts}, loaded.classifier.num_classes


def predict_pictures(model: str | Path, pictures: Sequence[str | Path]) -> tuple[list[int], int]:
    """The class a GoodNet gives each picture, and the class that means "backdoored".

    Raises:
        ArtifactError: The file is not a GoodNet.
        ImagesError: A picture cannot be read or is of another size.
    """
    artifact = Artifact.read(model)
    if not is_goodnet(artifact):
        raise ArtifactError(
            f"{model} is not a GoodNet.",
            hint="`backdoorscan repair` writes GoodNets: files that end in .goodnet.onnx or .goodnet.pt2.",
        )
    goodnet = GoodNetFile(artifact)
    pixels = torch.cat([to_tensor(load_picture(path, goodnet.input_shape))[None] for path in pictures])
    return logits(goodnet, pixels).argmax(1).tolist(), goodnet.num_classes
