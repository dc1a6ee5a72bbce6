"""A knowledge base from elsewhere -> whether its file holds our tables and nothing that runs.

A file of SQLite can carry triggers, views and defaults that act on the first change of a table:
what it holds must be, statement by statement, what `schema.create` writes.
"""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from pydantic import ValidationError

from rag2.kb import schema
from rag2.kb.chunk import WORDS, TokenChunker
from rag2.kb.words import create_table

META = {"format", "chunker", "chunker_fingerprint", "compacted"}
TOKENIZER = "tokenizer"  # the folder beside the file

Objects = dict[tuple[str, str], tuple[str, str]]


def flaw(path: Path) -> str | None:
    """What is wrong with a file, in words; None for a whole knowledge base that stands alone.

    It is read as it lies there: no log beside it is looked at, nothing is locked or written.
    """
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as db:
            db.execute("PRAGMA trusted_schema = OFF")
            db.execute("PRAGMA cell_size_check = ON")
            return _foreign(db) or _damaged(db) or _meta(db)
    except (sqlite3.Error, UnicodeDecodeError, ValueError) as error:
        return f"is not a knowledge base: {' '.join(str(error).split())[:200]}"


def _foreign(db: sqlite3.Connection) -> str | None:
    """What the file holds beside our tables, or instead of one; asked before anything else."""
    found = _objects(db)
    numbers = sorted(
        int(name.split("_")[1]) for _, name in found if re.fullmatch(r"words_\d+", name)
    )
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as ours:
        schema.create(ours)
        for number in numbers:
            create_table(ours, number)
        expected = _objects(ours)
    for kind, name in sorted(found.keys() - expected.keys()):
        return f"holds the {kind} {name[:60]!r}, which no knowledge base has"
    for kind, name in sorted(expected.keys() - found.keys()):
        return f"lacks the {kind} {name!r}"
    for (kind, name), made in sorted(found.items()):
        if made != expected[kind, name]:
            return f"has another {kind} {name!r} than a knowledge base has"
    return None


def _objects(db: sqlite3.Connection) -> Objects:
    """(type, name) -> (table, statement without its spaces) of all that is in a file."""
    rows = db.execute("SELECT type, name, tbl_name, coalesce(sql, '') FROM main.sqlite_master")
    return {(kind, name): (table, "".join(sql.split())) for kind, name, table, sql in rows}


def _damaged(db: sqlite3.Connection) -> str | None:
    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    return None if found == "ok" else "is damaged"


def _meta(db: sqlite3.Connection) -> str | None:
    """What is wrong with the rows about the file itself."""
    rows = dict(db.execute("SELECT key, value FROM meta"))
    for key in sorted(rows.keys() - META):
        return f"has the unknown entry {str(key)[:60]!r}"
    if rows.get("format") != schema.FORMAT:
        return f"is not of format {schema.FORMAT}"
    if "chunker" in rows:
        try:
            tokenizer = TokenChunker.model_validate_json(rows["chunker"]).tokenizer
        except (ValidationError, ValueError):
            return "names a chunker that is none of ours"
        if tokenizer not in (WORDS, TOKENIZER):
            return f"was cut by a tokenizer outside it, {tokenizer[:60]!r}"
    return next(_strange(db), None)


def _strange(db: sqlite3.Connection) -> Iterator[str]:
    """Namespaces whose numbers are not those of full-text tables."""
    numbers = {number for (number,) in db.execute("SELECT number FROM namespaces")}
    tables = {name for kind, name in _objects(db) if re.fullmatch(r"words(_\d+)?", name)}
    if {f"words_{number}" if number else "words" for number in numbers} != tables:
        yield "has namespaces without full-text tables, or the other way round"
