"""What the commands share: how they are set up, and what they show while they work."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rag2.registry import UserError, nearest

if TYPE_CHECKING:
    from rich.status import Status

SETTINGS = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}


def status(text: str) -> "Status":
    """A spinner on a terminal's stderr; silent elsewhere."""
    from rich.console import Console

    return Console(stderr=True).status(text)


def one_of(option: str, value: str | None, allowed: Sequence[str]) -> None:
    """Raises UserError, with the nearest name, where an option's value is none of these."""
    if value is not None and value not in allowed:
        names = ", ".join(allowed)
        raise UserError(f"{option} {value!r}; allowed: {names}.{nearest(value, allowed)}")
