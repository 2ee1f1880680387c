"""The contract of an output format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from backdoorscan.report import Report


@dataclass(frozen=True)
class Terminal:
    """Where text for people goes.

    Attributes:
        width: Columns.
        color: Whether escape codes for colour are welcome.
    """

    width: int = 100
    color: bool = False


class Reporter(ABC):
    """Renders a report as text.

    Attributes:
        id: The name users type after ``-f``.
        summary: One line for ``backdoorscan plugins``.
        refuses: Kinds of report it has no place for.
    """

    id: ClassVar[str]
    summary: ClassVar[str]
    refuses: ClassVar[Sequence[type[Report]]] = ()

    @abstractmethod
    def render(self, report: Report, terminal: Terminal) -> str:
        """The whole report, ending in a newline. Pure: the same arguments give the same text.

        Args:
            report: A scan, a repair or an evaluation.
            terminal: For formats people read in a terminal; machine formats ignore it.
        """
