"""The registry: every method and format that is installed, each with the distribution it came from.

Plugins are entry points in the group ``backdoorscan``. Each is loaded on its own, so a broken one is a row in
``backdoorscan plugins`` and not the end of the program.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any, TypeAlias

import pluggy

from backdoorscan.errors import BackdoorscanError, PluginError, UnknownNameError, UsageError
from backdoorscan.plugin import hookspecs
from backdoorscan.plugin.attack import Attack
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.loader import Loader
from backdoorscan.plugin.method import Method
from backdoorscan.plugin.repairer import Repairer
from backdoorscan.plugin.reporter import Reporter

Component: TypeAlias = type[Detector] | type[Repairer] | type[Attack] | type[Loader] | type[Reporter]

KINDS: dict[str, type[Any]] = {
    "detector": Detector,
    "repairer": Repairer,
    "attack": Attack,
    "loader": Loader,
    "reporter": Reporter,
}


@dataclass(frozen=True)
class Plugin:
    """One named thing that a distribution brings, or the reason why its entry point brings nothing.

    Attributes:
        kind: A key of ``KINDS``, or ``"plugin"`` for an entry point that failed.
        id: The name users type; the entry point's name where it failed.
        distribution: The distribution it came from.
        version: Of the distribution.
        component: The class, or ``None`` where it failed.
        error: Why it failed, or empty.
    """

    kind: str
    id: str
    distribution: str
    version: str
    component: Component | None = None
    error: str = ""

    @property
    def summary(self) -> str:
        """One line on what it does."""
        if self.component is None:
            return ""
        return self.component.summary() if issubclass(self.component, Method) else self.component.summary


@dataclass
class Registry:
    """All plugins of this installation.

    Attributes:
        plugins: In the order they were found.
        manager: The pluggy manager that the events go through.
    """

    plugins: list[Plugin] = field(default_factory=list)
    manager: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager(hookspecs.PROJECT))

    @classmethod
    def load(cls) -> Registry:
        """Load every entry point of the group, each in isolation."""
        registry = cls()
        registry.manager.add_hookspecs(hookspecs)
        # Our own first: a stranger's plugin cannot take the name of a method that users trust.
        entries = metadata.entry_points(group=hookspecs.PROJECT)
        for entry in sorted(entries, key=lambda entry: not (entry.dist and entry.dist.name == hookspecs.PROJECT)):
            dist = entry.dist
            registry.add(entry.load, entry.name, dist.name if dist else "unknown", dist.version if dist else "")
        return registry

    def add(self, load: Any, name: str, distribution: str, version: str) -> None:
        """Take one plugin in: call ``load`` and collect what its hooks return.

        Whatever goes wrong inside a plugin is kept as its ``error``: one broken plugin must not take the others
        with it.
        """
        found: list[Plugin] = []
        try:
            module = load()
            self.manager.register(module, name=f"{distribution}:{name}")
            self.manager.check_pending()
            for kind in KINDS:
                hook = getattr(module, f"{hookspecs.PROJECT}_{kind}s", None)
                for component in hook() if hook else ():
                    identifier = self._checked(kind, component, found)
                    found.append(Plugin(kind, identifier, distribution, version, component))
        except (Exception, SystemExit) as error:
            if self.manager.has_plugin(f"{distribution}:{name}"):
                self.manager.unregister(name=f"{distribution}:{name}")
            reason = f"{type(error).__name__}: {error}"
            self.plugins.append(Plugin("plugin", name, distribution, version, error=reason))
        else:
            self.plugins.extend(found)

    def _checked(self, kind: str, component: Any, siblings: Sequence[Plugin]) -> str:
        if not (isinstance(component, type) and issubclass(component, KINDS[kind])):
            raise TypeError(f"{component!r} is not a subclass of {KINDS[kind].__name__}")
        if inspect.isabstract(component):
            missing = ", ".join(sorted(getattr(component, "__abstractmethods__", ())))
            raise TypeError(f"{component.__name__} does not implement {missing}")
        identifier = getattr(component, "id", None)
        if not isinstance(identifier, str) or not identifier:
            raise TypeError(f"{component.__name__} has no id")
        if any(plugin.kind == kind and plugin.id == identifier for plugin in (*self.plugins, *siblings)):
            raise ValueError(f"another plugin already provides the {kind} '{identifier}'")
        return identifier

    def of_kind(self, kind: str) -> Iterator[Plugin]:
        """The working plugins of one kind."""
        return (plugin for plugin in self.plugins if plugin.kind == kind)

    def find(self, kind: str, identifier: str) -> Plugin:
        """The plugin a user named.

        Raises:
            UnknownNameError: Nobody provides it.
            PluginError: No plugin is installed at all, or the one that might provide it is broken.
        """
        known = {plugin.id: plugin for plugin in self.of_kind(kind)}
        if identifier in known:
            return known[identifier]
        if not self.plugins:
            raise PluginError("No plugins are registered.", hint="Install the project: pip install -e .")
        wanted = identifier.replace("-", "_")
        broken = next((p for p in self.plugins if p.error and p.id.replace("-", "_") == wanted), None)
        if broken:
            raise PluginError(
                f"The plugin '{identifier}' of {broken.distribution} {broken.version} is broken.",
                why=broken.error,
                hint="See `backdoorscan plugins`.",
            )
        raise UnknownNameError(kind, identifier, known)

    def check_settings(self, kind: str, running: Collection[str], settings: Mapping[str, Any]) -> None:
        """Check that options are set only for methods that run.

        Raises:
            UsageError: Options for anything else.
            PluginError: A method that does not exist or is broken.
        """
        for identifier in (*running, *settings):
            self.find(kind, identifier)
        idle = next((identifier for identifier in settings if identifier not in running), None)
        if idle is not None:
            raise UsageError(
                f"Options are set for {idle}, which does not run.", hint=f"This run uses: {', '.join(running)}."
            )

    def announce(self, event: str, **facts: Any) -> None:
        """Tell all plugins of an event.

        Raises:
            PluginError: A listener failed: a pipeline that relies on it must not believe it ran.
        """
        for implementation in getattr(self.manager.hook, f"{hookspecs.PROJECT}_{event}").get_hookimpls():
            arguments = {name: facts[name] for name in implementation.argnames}
            try:
                implementation.function(**arguments)
            except BackdoorscanError:
                raise
            except Exception as error:
                raise PluginError(
                    f"The plugin {implementation.plugin_name} failed on {event}.",
                    why=f"{type(error).__name__}: {error}",
                ) from error


@cache
def installed() -> Registry:
    """The registry of this installation, loaded once."""
    return Registry.load()
