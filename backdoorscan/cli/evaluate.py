"""``backdoorscan evaluate``."""

from __future__ import annotations

import typer

from backdoorscan.cli import _options as shared
from backdoorscan.cli._advice import after_evaluation
from backdoorscan.cli._console import Terminal


def evaluate(
    context: typer.Context,
    model: shared.Model,
    valid: shared.Valid,
    poisoned: shared.Poisoned = None,
    target: shared.Target = None,
    arch: shared.Arch = None,
    trust: shared.Trust = False,
    limit: shared.Limit = None,
    input_range: shared.InputRange = None,
    mean: shared.Mean = None,
    std: shared.Std = None,
    layout: shared.Layout = None,
    seed: shared.Seed = None,
    threads: shared.Threads = 1,
    device: shared.Device = None,
    format: shared.Format = None,
    output: shared.Output = None,
) -> None:
    """Measure clean accuracy and attack success of a network, a repaired network or a GoodNet.

    Example: backdoorscan evaluate model.h5 --valid clean.h5 --poisoned poisoned.h5
    """
    from backdoorscan import evaluating
    from backdoorscan.formats.images import load_images
    from backdoorscan.measured import EvaluationReport

    terminal: Terminal = context.obj
    terminal.check_formats(format, output, EvaluationReport)
    config = shared.settings(terminal.config)
    read = shared.read_options(arch, input_range, mean, std, layout, trust=trust, device=device or config.device)
    seed = seed if seed is not None else config.seed or 0
    shared.use_threads(threads)
    with terminal.watching() as observer:
        observer("measuring", 0.0)
        images = load_images(valid, limit=limit, seed=seed)
        report = evaluating.evaluate(model, images, poisoned, read, target=target, seed=seed)
    terminal.emit(report, format, output)
    advice = after_evaluation(report, valid, poisoned)
    if advice and terminal.shows_table(format, output):
        terminal.say(advice)
