"""Names in a knowledge base, ids of documents and namespaces: which can be kept and looked for."""

from collections.abc import Sequence

from rag2.kb.rows import LONGEST
from rag2.registry import UserError, nearest


def bounded(what: str, name: str) -> str:
    """A name to be written; raises UserError for one that is too long."""
    if len(name) > LONGEST:
        raise UserError(f"{what} {name[:40]!r}... has more than {LONGEST:,} characters")
    return name


def encodable(what: str, name: str) -> str:
    """A name to be looked for; raises UserError for one that UTF-8 cannot hold."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        shown = f"{name[:40]!r}{'...' * (len(name) > 40)}"
        raise UserError(f"{what} {shown} holds a lone surrogate, or is no UTF-8") from None
    return name


def there(name: str, live: Sequence[str], path: object) -> None:
    """Raise UserError, with those there are, for a namespace without a live document."""
    if name and name not in live:
        named = ", ".join(repr(other) for other in live[:9] if other) or "none with a name"
        raise UserError(
            f"{path} has no namespace {encodable('namespace', name)[:200]!r}; there are: {named}"
            f"{', ...' * (len(live) > 9)}.{nearest(name, live)}"
        )
