"""Charts of a report, as matplotlib figures.

Figures are narrow, so that they can be read on a telephone and stand side by side on a desk. The same data
give the same figure whatever the user's settings of matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from backdoorscan.measured import Scores
from backdoorscan.reports.evidence import LabelRow, finite
from backdoorscan.reports.pictures import mask_pixels, stamped_pixels, trigger_pixels
from backdoorscan.reports.style import COLOURS, in_style
from backdoorscan.reports.words import percent, visible
from backdoorscan.trigger import Trigger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ANOMALOUS = 2.0
"""Anomaly index above which the paper calls a label infected (Wang et al. 2019, section V.A)."""

_WIDTH = 4.0
MOST_NARROW = 16
"""Rows of a heat map that fit into half the width of a page."""

_POINTS = 60
"""Points of a curve: longer ones are averaged."""


def _figure(height: float, width: float = _WIDTH) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _label_axis(axes: Axes, rows: Sequence[LabelRow]) -> None:
    """One row per label, the first on top, flagged ones marked by weight, colour and a sign."""
    names = [f"▶ label {row.label}" if row.flagged else f"label {row.label}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    for text, row in zip(axes.get_yticklabels(), rows, strict=True):
        if row.flagged:
            text.set(color=COLOURS["bad"], fontweight="bold")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _write(axes: Axes, text: str, x: float, y: float) -> None:
    """A figure at the end of a bar, on a ground of its own so that no line crosses it."""
    ground = {"facecolor": COLOURS["card"], "edgecolor": "none", "pad": 0.4}
    note = axes.annotate(text, (x, y), (3, -0.5), textcoords="offset points", va="center", bbox=ground, zorder=4)
    note.set(color=COLOURS["muted"], fontsize=7)


def _threshold(axes: Axes, at: float, text: str, colour: str, style: str) -> None:
    axes.axvline(at, color=COLOURS[colour], linewidth=1.2, linestyle=style, label=text, zorder=3)


def _legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=1.4, columnspacing=1.2)


@in_style
def trigger_sizes(rows: Sequence[LabelRow], median: float | None = None, threshold: float | None = None) -> Figure:
    """L1 norm of every label's trigger.

    Args:
        rows: The labels, in the order to draw them.
        median: Over all labels, or ``None``.
        threshold: L1 norm under which a label counts as backdoored, or ``None`` where there is no single one.
    """
    figure, axes = _figure(0.85 + 0.22 * len(rows))
    for position, row in enumerate(rows):
        if row.succeeded:
            axes.barh(position, row.l1, height=0.72, color=COLOURS["bad" if row.flagged else "bar"])
        text = f"{row.l1:.1f}" if row.succeeded else "no trigger found"
        _write(axes, text, row.l1 if row.succeeded else 0, position)
    largest = max((row.l1 for row in rows if row.succeeded), default=1.0)
    if median is not None:
        _threshold(axes, median, f"median {median:.1f}", "muted", "--")
        largest = max(largest, median)
    if threshold is not None:
        _threshold(axes, threshold, f"decision {threshold:.1f}", "accent", "-")
    axes.set_xlim(0, 1.16 * largest or 1)
    axes.set_xlabel("L1 norm of the mask, pixels")
    _label_axis(axes, rows)
    _legend(figure, axes)
    return figure


@in_style
def anomaly_indices(rows: Sequence[LabelRow]) -> Figure:
    """The paper's anomaly index of every label, and the 2 above which the paper calls a label infected."""
    figure, axes = _figure(0.85 + 0.22 * len(rows))
    values = [row.anomaly_index or 0.0 for row in rows]
    axes.barh(range(len(rows)), values, height=0.72, color=[COLOURS["bad" if r.flagged else "bar"] for r in rows])
    for position, row in enumerate(rows):
        text = "none" if row.anomaly_index is None else f"{row.anomaly_index:.2f}"
        _write(axes, text, max(values[position], 0), position)
    low, high = min([0.0, *values]), max([ANOMALOUS, *values])
    axes.set_xlim(low - 0.02 * (high - low), high + 0.16 * (high - low))
    axes.axvline(0, color=COLOURS["line"], linewidth=1)
    _threshold(axes, ANOMALOUS, "2: the paper's threshold", "accent", "-")
    axes.set_xlabel("anomaly index: deviations below the median")
    _label_axis(axes, rows)
    _legend(figure, axes)
    return figure


@in_style
def curves(rows: Sequence[LabelRow], quantity: str) -> Figure:
    """How the search went for every label; flagged labels stand out.

    Args:
        rows: The labels.
        quantity: ``loss`` or ``sizes``.
    """
    figure, axes = _figure(2.9)
    legend = ["other labels"]
    for row in sorted(rows, key=lambda row: row.flagged):
        values = getattr(row, quantity)
        steps, means = _averaged(values)
        colour, width = (COLOURS["bad"], 1.8) if row.flagged else (COLOURS["bar"], 0.8)
        label = f"label {row.label}" if row.flagged else legend.pop() if legend else None
        axes.plot(steps, means, color=colour, linewidth=width, alpha=1 if row.flagged else 0.75, label=label)
    if quantity == "loss":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("step of the search")
    axes.set_ylabel("loss" if quantity == "loss" else "L1 norm, pixels")
    axes.grid(axis="y")
    axes.tick_params(which="both", length=0)
    _legend(figure, axes, columns=4)
    return figure


def _averaged(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """A curve as at most ``_POINTS`` means over equal stretches, and the middle of each stretch."""
    parts = np.array_split(np.arange(1, len(values) + 1), min(_POINTS, len(values)))
    array = np.asarray(values)
    return [float(part.mean()) for part in parts], [max(float(array[part - 1].mean()), 1e-4) for part in parts]


@in_style
def predictions(rows: Sequence[LabelRow]) -> Figure:
    """What the model says of stamped images: a row per stamped label, a column per class, in the same order."""
    columns = [row.label for row in rows]
    known = set(columns)
    shares = np.array([[row.predictions.get(label, 0.0) for label in columns] for row in rows])
    other = np.array([[max(0.0, sum(v for k, v in row.predictions.items() if k not in known))] for row in rows])
    names = [str(label) for label in columns]
    if (other > 5e-4).any():
        shares, names = np.hstack([shares, other]), [*names, "other"]
    large = len(rows) > MOST_NARROW
    height = 0.16 * len(rows) if large else max(1.2, 3.2 * len(rows) / len(names))
    figure, axes = _figure(0.9 + height, 2 * _WIDTH if large else _WIDTH)
    colour = [int(COLOURS["accent"][i : i + 2], 16) for i in (1, 3, 5)]
    picture = np.zeros((*shares.shape, 4), np.uint8)
    picture[..., :3] = colour
    picture[..., 3] = np.rint(np.clip(shares, 0, 1) * 255)
    axes.imshow(picture, aspect="auto", interpolation="none")
    turned = 90 if len(names) > MOST_NARROW else 0
    axes.set_xticks(range(len(names)), names, rotation=turned, fontsize=7)
    _label_axis(axes, rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    if len(names) <= 12:
        for i, j in zip(*np.nonzero(shares >= 0.005), strict=True):
            colour_name = "#fefefe" if shares[i, j] > 0.55 else COLOURS["ink"]
            axes.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", color=colour_name, fontsize=7)
    axes.set_xlabel("predicted class (mean probability, %)")
    return figure


@in_style
def scores(networks: Sequence[tuple[str, Scores]]) -> Figure:
    """Clean accuracy, success of true attacks and of reversed triggers, and false rejects of each network."""
    every = (
        ("clean accuracy", "clean_accuracy", "accent"),
        ("true attack success", "attack_success_rate", "bad"),
        ("success of reversed triggers", "reversed_success_rate", "bar"),
        ("false rejects", "false_reject_rate", "warn"),
    )
    kinds = [kind for kind in every if any(finite(getattr(s, kind[1])) is not None for _, s in networks)]
    step = len(kinds) + 0.9
    figure, axes = _figure(0.75 + 0.17 * step * len(networks))
    for place, (text, attribute, colour) in enumerate(kinds):
        rates = [finite(getattr(score, attribute)) for _, score in networks]
        at = [position * step + place for position in range(len(networks))]
        axes.barh(at, [100 * (r or 0) for r in rates], height=0.86, color=COLOURS[colour], label=text)
        for y, rate in zip(at, rates, strict=True):
            if rate is not None:
                _write(axes, percent(rate), 100 * rate, y)
    middles = [position * step + (len(kinds) - 1) / 2 for position in range(len(networks))]
    axes.set_yticks(middles, [_short(name) for name, _ in networks])
    axes.set_ylim(len(networks) * step - 0.9, -0.8)
    axes.set_xlim(0, 116)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("per cent of the images")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    _legend(figure, axes)
    return figure


def _short(name: str) -> str:
    name = visible(name)
    return name if len(name) <= 22 else name[:21] + "…"


@in_style
def trigger(found: Trigger, base: npt.NDArray[np.float32]) -> Figure:
    """A trigger, its mask, and the trigger stamped on an image (C, H, W) in [0, 1]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 1.9), layout="constrained")
    pictures = {
        "pattern × mask": trigger_pixels(found),
        "mask": mask_pixels(found),
        "stamped": stamped_pixels(found, base),
    }
    for axes, (title, pixels) in zip(figure.subplots(1, 3), pictures.items(), strict=True):
        axes.set_facecolor("#808080")
        axes.imshow(pixels, interpolation="nearest")
        axes.set(xticks=[], yticks=[], title=title)
    return figure
