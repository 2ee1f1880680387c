"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from backdoorscan.cli._completion import assignments, ids
from backdoorscan.errors import UsageError

if TYPE_CHECKING:
    from backdoorscan.config import Settings
    from backdoorscan.formats.loading import ReadOptions

FEEDING = "How the model was fed (found on the clean images unless given)"
RUNNING = "How it runs"
REPORT = "The report"
REPORTERS = "table, json, html, markdown, sarif, junit, cyclonedx"


def format_option(formats: str, **settings: Any) -> Any:
    """``-f`` of a command whose report comes in these formats."""
    return typer.Option(
        "-f",
        "--format",
        metavar="FORMAT[=FILE]",
        help=f"{formats}; to stdout or a file; repeatable. [default: table]",
        rich_help_panel=REPORT,
        **settings,
    )


Model: TypeAlias = Annotated[
    Path, typer.Argument(metavar="MODEL", help="The model file: Keras, ONNX, .pt2, or weights with --arch.")
]
Valid: TypeAlias = Annotated[
    str,
    typer.Option(
        "--valid",
        metavar="DATA",
        help="Clean labelled images: .h5, .npz (file.npz#test), idx, folder of class folders.",
    ),
]
OptionalValid: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--valid",
        metavar="DATA",
        envvar="BACKDOORSCAN_VALID",
        help="Clean labelled images: .h5, .npz (file.npz#test), idx, folder of class folders. Optional: without them "
        "the scan makes images from the model, and its verdict is less certain.",
    ),
]
InputShape: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="C,H,W",
        help="Channels, height and width of an image: without --valid, where the file leaves them open.",
        rich_help_panel=FEEDING,
    ),
]
Poisoned: TypeAlias = Annotated[
    str | None,
    typer.Option("--poisoned", metavar="DATA", help="Images with the trigger, labelled with the target label."),
]
Target: TypeAlias = Annotated[
    int | None, typer.Option("--target", help="Target label, if the poisoned images carry their true labels.")
]
Limit: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=1,
        envvar="BACKDOORSCAN_LIMIT",
        help="Use a sample of the clean images, balanced over the classes.",
    ),
]
Arch: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="FILE.py:NAME",
        help="Architecture of a weights-only file: timm:NAME, torchvision:NAME, FILE.py:NAME or package.module:NAME "
        "(your own code, which is run); for Keras weights another .h5, a .keras or a model.json.",
    ),
]
Trust: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Convert what cannot be read as data (TorchScript, pickled networks, SavedModel, Lambda layers), in a "
        "sandbox: that runs code from the file.",
    ),
]
InputRange: TypeAlias = Annotated[
    str | None,
    typer.Option("--input-range", metavar="LOW,HIGH", help="What black and white become.", rich_help_panel=FEEDING),
]
Mean: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="M[,M,M]", help="Subtracted per channel after scaling to the range.", rich_help_panel=FEEDING),
]
Std: TypeAlias = Annotated[
    str | None, typer.Option(metavar="S[,S,S]", help="Divided by per channel.", rich_help_panel=FEEDING)
]
Layout: TypeAlias = Annotated[
    str | None, typer.Option(metavar="NCHW|NHWC", help="Axis order of the model's input.", rich_help_panel=FEEDING)
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="cpu|cuda|mps|xpu",
        envvar="BACKDOORSCAN_DEVICE",
        help="Where the network computes; cuda:1 is the second GPU. [default: cpu]",
        rich_help_panel=RUNNING,
    ),
]
Seed: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=0,
        envvar="BACKDOORSCAN_SEED",
        help="Same input, same seed, same report. [default: 0]",
        rich_help_panel=RUNNING,
    ),
]
Threads: TypeAlias = Annotated[
    int,
    typer.Option(
        min=1,
        envvar="BACKDOORSCAN_THREADS",
        help="Threads; more than one only helps large networks.",
        show_default=True,
        rich_help_panel=RUNNING,
    ),
]
MethodOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "-O",
        "--option",
        metavar="ID.NAME=VALUE",
        autocompletion=assignments,
        help="Set an option of a method (see `plugins show ID`).",
    ),
]
Format: TypeAlias = Annotated[
    list[str] | None,
    format_option(REPORTERS, autocompletion=ids("reporter")),
]
Output: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Write the report there instead of to stdout: of one format.",
        rich_help_panel=REPORT,
    ),
]


def read_options(
    arch: str | None,
    input_range: str | None,
    mean: str | None,
    std: str | None,
    layout: str | None,
    input_shape: str | None = None,
    trust: bool = False,
    device: str | None = None,
) -> ReadOptions:
    """What the user said about the model file.

    Raises:
        UsageError: A value that cannot be.
    """
    from backdoorscan.formats.loading import ReadOptions

    low_high = None if input_range is None else _numbers("--input-range", input_range.replace("..", ","))
    if low_high is not None and len(low_high) != 2:
        raise UsageError(f"--input-range {input_range} is not two numbers.", hint="For example --input-range 0,255.")
    if layout is not None and layout.upper() not in ("NCHW", "NHWC"):
        raise UsageError(f"--layout {layout} is neither NCHW nor NHWC.")
    options = ReadOptions(
        arch=arch,
        input_range=None if low_high is None else (low_high[0], low_high[1]),
        mean=() if mean is None else _numbers("--mean", mean),
        std=() if std is None else _numbers("--std", std),
        layout=layout and layout.upper(),
        input_shape=None if input_shape is None else _shape(input_shape),
        trust=trust,
        device=device or "cpu",
    )
    _ = options.pinned  # complain about impossible values before any work
    return options


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} {text} is not a list of numbers.", hint=f"For example {option} 0.5,0.5,0.5."
        ) from None


def _shape(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"\s*([1-9]\d{0,4})\s*,\s*([1-9]\d{0,4})\s*,\s*([1-9]\d{0,4})\s*", text)
    if not match:
        raise UsageError(f"--input-shape {text} is not C,H,W.", hint="For example --input-shape 3,32,32.")
    return int(match[1]), int(match[2]), int(match[3])


def parse_labels(text: str | None) -> tuple[int, ...] | None:
    """``0-9,33`` as the labels 0 to 9 and 33, in increasing order.

    Raises:
        UsageError: Anything else.
    """
    if text is None:
        return None
    labels: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])) or int(match[2] or match[1]) >= 10**6:
            raise UsageError(f"--labels {text} is not a list of labels.", hint="For example --labels 0-9,33.")
        labels.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(labels))


def method_options(
    assignments: Sequence[str] | None, base: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """``ID.NAME=VALUE`` assignments on top of what the configuration file says.

    Raises:
        UsageError: An assignment of another form.
    """
    settings: dict[str, dict[str, Any]] = {identifier: dict(values) for identifier, values in base.items()}
    for assignment in assignments or ():
        target, equals, value = assignment.partition("=")
        identifier, dot, name = target.partition(".")
        if not equals or not dot or not identifier or not name:
            raise UsageError(f"-O {assignment} is not ID.NAME=VALUE.", hint="For example -O neural-cleanse.steps=200.")
        settings.setdefault(identifier, {})[name.replace("-", "_")] = value
    return settings


def settings(config: Path | None) -> Settings:
    """The configuration file's settings."""
    from backdoorscan import config as configuration
    from backdoorscan.registry import installed

    methods = {plugin.id for kind in ("detector", "repairer") for plugin in installed().of_kind(kind)}
    return configuration.load(config, methods)


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_threads(count: int) -> None:
    """Set the size of the one thread pool that computes."""
    import torch

    torch.set_num_threads(count)
