"""The one style of all charts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "card": "#ffffff",
    "ink": "#1b2431",
    "muted": "#566274",
    "line": "#d3dae3",
    "bar": "#7b90aa",
    "bad": "#b3261e",
    "accent": "#1d5fae",
    "warn": "#8f6200",
}
"""Of light pages; in a page they are replaced by its variables of the same names."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["ink"],
    "legend.frameon": False,
    "legend.fontsize": 8,
}

P = ParamSpec("P")


@contextmanager
def styled(changes: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Matplotlib with this module's style, whatever the user's is, while the context lasts."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has its own fonts
        matplotlib.rcdefaults()
        settings: Any = {**_STYLE, **(changes or {})}
        matplotlib.rcParams.update(settings)
        yield


def in_style(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """``function`` drawing in this style."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with styled():
            return function(*args, **kwargs)

    return wrapped
