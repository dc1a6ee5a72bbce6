"""What the commands share: how they are set up, and what they show while they work."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

SETTINGS = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}


def status(text: str) -> "Status":
    """A spinner on a terminal's stderr; silent elsewhere."""
    from rich.console import Console

    return Console(stderr=True).status(text)
