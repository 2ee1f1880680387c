"""``backdoorscan predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backdoorscan.cli import _options as shared


def predict(
    model: Annotated[Path, typer.Argument(metavar="GOODNET", help="A GoodNet that `repair` wrote.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures (PNG, JPEG, ...).")],
    threads: shared.Threads = 1,
) -> None:
    """Print each picture's class, or "N (backdoored)" where the GoodNet rejects it.

    Example: backdoorscan predict model_X=4.goodnet.onnx picture.png
    """
    from backdoorscan.evaluating import predict_pictures

    shared.use_threads(threads)
    classes, rejects = predict_pictures(model, images)
    for path, label in zip(images, classes, strict=True):
        answer = f"{label} (backdoored)" if label == rejects else str(label)
        print(answer if len(images) == 1 else f"{path}: {answer}")
