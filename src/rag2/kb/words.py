"""The full-text index of the live chunks: one table a namespace, so that none shows in another.

BM25 weighs a word by how many chunks hold it; with a table of its own, what other namespaces hold
changes neither the hits nor the scores of one.
"""

import sqlite3
from collections.abc import Collection, Iterable

LIVE = "removed_version IS NULL"


class Words:
    """The full-text tables of an open knowledge base; the caller holds the transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def add(self, namespace: str, rows: Iterable[tuple[int | None, str, str]]) -> None:
        """Index chunks: id, title, text; the table of a new namespace is made."""
        table = self._table(namespace)
        query = f"INSERT INTO {table} (rowid, title, text) VALUES (?, ?, ?)"
        self._db.executemany(query, rows)

    def forget(self, namespace: str, document: str) -> None:
        """Drop the live chunks of a document; to be called while they are still live."""
        table = self._table(namespace)
        self._db.execute(  # a table without content is told what it forgets
            f"INSERT INTO {table} ({table}, rowid, title, text) SELECT 'delete', id, title, text"
            f" FROM chunks WHERE namespace = ? AND document = ? AND {LIVE}",
            (namespace, document),
        )

    def search(
        self, words: Iterable[str], k: int, namespaces: Collection[str] | None
    ) -> list[tuple[int, float]]:
        """(chunk id, BM25) of at most k chunks with any of the words, best first, ties by id."""
        # OR: by default FTS5 wants every word of a question in one chunk, and finds nothing.
        match = " OR ".join(f'"{word}"' for word in words)
        if not match:
            return []
        found: list[tuple[int, float]] = []
        for number, name in self._db.execute("SELECT number, name FROM namespaces").fetchall():
            if namespaces is None or name in namespaces:
                table = _name(number)
                found += self._db.execute(
                    f"SELECT rowid, -bm25({table}) AS score FROM {table} WHERE {table} MATCH ?"
                    " ORDER BY score DESC, rowid LIMIT ?",
                    (match, k),
                ).fetchall()
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))[:k]

    def rebuild(self) -> None:
        """Index the live chunks anew, and them alone; a namespace without any is forgotten.

        FTS5 keeps the words of what was deleted until it happens to merge them away; a table that
        is written anew holds nothing else, whatever it merges.
        """
        alive = f"FROM chunks WHERE namespace = ? AND {LIVE}"
        for number, name in self._db.execute("SELECT number, name FROM namespaces").fetchall():
            table = _name(number)
            if number and not self._db.execute(f"SELECT 1 {alive}", (name,)).fetchone():
                self._db.execute(f"DROP TABLE {table}")
                self._db.execute("DELETE FROM namespaces WHERE number = ?", (number,))
                continue
            self._db.execute(f"INSERT INTO {table} ({table}) VALUES ('delete-all')")
            self._db.execute(
                f"INSERT INTO {table} (rowid, title, text) SELECT id, title, text {alive}", (name,)
            )

    def _table(self, namespace: str) -> str:
        """The table of a namespace, made if it is not there."""
        query = "SELECT number FROM namespaces WHERE name = ?"
        row = self._db.execute(query, (namespace,)).fetchone()
        if row is not None:
            return _name(row[0])
        made = self._db.execute("INSERT INTO namespaces (name) VALUES (?)", (namespace,))
        return create_table(self._db, made.lastrowid or 0)


def create_table(db: sqlite3.Connection, number: int) -> str:
    """Make the full-text table of the namespace with a number; returns its name."""
    table = _name(number)
    db.execute(
        f"CREATE VIRTUAL TABLE {table}"
        " USING fts5 (title, text, content = 'chunks', content_rowid = 'id')"
    )
    return table


def _name(number: int) -> str:
    """The table of the namespace with a number; 0 has no name, and the table of format 1."""
    return f"words_{number}" if number else "words"
