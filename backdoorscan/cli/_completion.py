"""What a shell offers on TAB: the names that plugins bring. Loading plugins takes seconds, so the names are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from backdoorscan.errors import OutputError

Offers = list[tuple[str, str]]
"""Words, each with a line on what it is."""

KEPT_SECONDS = 24 * 3600.0
"""A plugin that somebody works on changes its names without changing its version."""


def ids(kind: str, *others: tuple[str, str]) -> Callable[[str], Offers]:
    """Completes the ids of a kind of plugin.

    Args:
        kind: A kind of the registry, e.g. ``"detector"``.
        others: Words that may stand there as well.
    """

    def complete(incomplete: str) -> Offers:
        known = [(id, entry["summary"]) for id, entry in _known().get(kind, {}).items()]
        return _beginning(incomplete, [*known, *others])

    return complete


def assignments(incomplete: str) -> Offers:
    """Completes ``ID.NAME=`` of ``-O``."""
    methods: dict[str, dict[str, str]] = {}
    for kind in ("detector", "repairer", "attack"):
        for id, entry in _known().get(kind, {}).items():
            methods.setdefault(id, {}).update(entry["options"])
    id, dot, _ = incomplete.partition(".")
    if not dot:
        return _beginning(incomplete, [(f"{name}.", "") for name, options in methods.items() if options])
    return _beginning(incomplete, [(f"{id}.{name}=", help) for name, help in methods.get(id, {}).items()])


def _beginning(incomplete: str, offers: Iterable[tuple[str, str]]) -> Offers:
    return [offer for offer in offers if offer[0].startswith(incomplete)]


def _known() -> Mapping[str, Mapping[str, Any]]:
    """Kind -> id -> summary and options of all that is installed."""
    from importlib import metadata

    from backdoorscan import cache

    points = metadata.entry_points(group="backdoorscan")
    installed = sorted(
        [p.name, p.value, p.dist.name if p.dist else "", p.dist.version if p.dist else ""] for p in points
    )
    path = cache.default_folder() / "completion" / f"{cache.digest({'installed': installed})}.json"
    stored = cache.read_json(path)
    if stored is None or time.time() - path.stat().st_mtime > KEPT_SECONDS:
        stored = _read()
        with suppress(OutputError):
            cache.write_json(path, stored)
    return stored


def _read() -> dict[str, dict[str, Any]]:
    from backdoorscan.plugin.method import Method
    from backdoorscan.registry import installed

    found: dict[str, dict[str, Any]] = {}
    for plugin in installed().plugins:
        if plugin.component is not None:
            options = plugin.component.options() if issubclass(plugin.component, Method) else ()
            entry = {"summary": plugin.summary, "options": {spec.name: spec.help for spec in options}}
            found.setdefault(plugin.kind, {})[plugin.id] = entry
    return found
