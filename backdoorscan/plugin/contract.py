"""What the checks of every kind of plugin share."""

from __future__ import annotations

import re

_KEBAB = r"[a-z0-9]+(-[a-z0-9]+)*"


class ContractError(AssertionError):
    """A plugin breaks the contract; the message says which part and how to mend it."""


def require(holds: bool, what: str, hint: str) -> None:
    """Check one part of the contract.

    Raises:
        ContractError: It does not hold.
    """
    if not holds:
        raise ContractError(f"{what}. {hint}")


def is_kebab(name: object) -> bool:
    """Whether users can type it as the name of a method or format: lower-case words joined by hyphens."""
    return isinstance(name, str) and re.fullmatch(_KEBAB, name) is not None
