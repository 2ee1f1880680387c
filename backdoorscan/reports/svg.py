"""A matplotlib figure as SVG that lies inside an HTML page and takes the page's colours."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING

from backdoorscan.reports.style import COLOURS, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TAG = re.compile(r"<[^>]*>")
_REFERENCE = re.compile(r'(url\(#|href="#)([^)"]+)')
_IDENTIFIER = re.compile(r'\sid="([^"]*)"')
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_COLOUR = re.compile("|".join(COLOURS.values()))
_VARIABLES = {value: f"var(--{name})" for name, value in COLOURS.items()}


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an ``<svg>`` element. The same figure gives the same text.

    Args:
        figure: What to draw.
        name: Unique within the page; letters, digits and hyphens.
        description: Read out in place of the picture.
    """
    stream = io.StringIO()
    with styled({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    used = {target for _, target in _REFERENCE.findall(text)}

    def rewritten(tag: re.Match[str]) -> str:
        return _rewritten(tag[0], name, used)

    text = _TAG.sub(rewritten, text)
    opening = re.search(r'viewBox="([^"]*)"', text)
    box = opening[1] if opening else "0 0 1 1"
    label = html.escape(description, quote=True)
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" role="img" aria-label="{label}">'
    return head + re.sub(r"\n\s*", "\n", text[text.index(">") + 1 :]).strip()


def _rewritten(tag: str, name: str, used: set[str]) -> str:
    """A tag with identifiers that do not clash between charts, short numbers, and colours that follow the page."""

    def identifier(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in used else ""

    if tag.startswith("<image"):
        return _REFERENCE.sub(rf"\1{name}-\2", _IDENTIFIER.sub(identifier, tag))
    tag = _REFERENCE.sub(rf"\1{name}-\2", _IDENTIFIER.sub(identifier, tag))
    tag = _LONG_NUMBER.sub(lambda match: f"{float(match[0]):.2f}", tag)
    return _COLOUR.sub(lambda match: _VARIABLES[match[0]], tag)
