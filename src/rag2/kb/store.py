"""The knowledge base: documents, their chunks and every change to them, in one SQLite file.

Rows are never rewritten: a document or chunk lives from its `added_version` until before its
`removed_version`, so that the state at version v is a predicate. One change is one transaction is
one version. Nothing in the file depends on the clock.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

from rag2.kb.chunk import Chunker, TokenChunker
from rag2.registry import UserError
from rag2.types import Chunk, Document

FORMAT = "rag2.kb/1"
# AUTOINCREMENT: the id of a chunk is never given to another one, even after a compaction.
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
    row INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL, metadata TEXT NOT NULL,
    added_version INTEGER NOT NULL, removed_version INTEGER
);
CREATE UNIQUE INDEX live_document ON documents (id) WHERE removed_version IS NULL;
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    document TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL,
    "start" INTEGER NOT NULL, "end" INTEGER NOT NULL,
    added_version INTEGER NOT NULL, removed_version INTEGER
);
CREATE INDEX chunk_document ON chunks (document);
CREATE TABLE changes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    version INTEGER NOT NULL,
    op TEXT NOT NULL CHECK (op IN ('add', 'update', 'remove')),
    document TEXT NOT NULL
);
CREATE INDEX change_version ON changes (version);
CREATE VIRTUAL TABLE words USING fts5 (title, text, content = 'chunks', content_rowid = 'id');
"""
CHUNK = 'SELECT id, document, text, title, "start", "end" FROM chunks'
LIVE = "removed_version IS NULL"


class KnowledgeBase:
    """An open knowledge base; a context manager that closes it."""

    def __init__(self, path: Path | str, create: bool = False) -> None:
        """Open the file at `path`, or with `create` make a new one.

        Raises UserError if it is missing, is already there, or is no knowledge base.
        """
        self.path = Path(path)
        if create and self.path.exists():
            raise UserError(f"{self.path} already exists")
        if not create and not self.path.is_file():
            what = "is not a file" if self.path.exists() else "does not exist"
            raise UserError(f"knowledge base {str(self.path)!r} {what}")
        uri = f"{self.path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
        self._db = sqlite3.connect(uri, uri=True, isolation_level=None)  # explicit transactions
        try:
            # FULL: a change that returned survives a power cut, not only a killed process.
            self._db.execute("PRAGMA synchronous = FULL")
            if create:
                self._db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
                self._set("format", FORMAT)
            found = self._meta("format")
            sound = found != FORMAT or self._db.execute("PRAGMA quick_check").fetchone()[0] == "ok"
        except sqlite3.DatabaseError:
            found, sound = None, True
        if found != FORMAT or not sound:
            self.close()
            what = f"is not a knowledge base of format {FORMAT}" if sound else "is damaged"
            raise UserError(f"{self.path} {what}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was changed is already safe in it."""
        self._db.close()

    @property
    def version(self) -> int:
        """Number of the last change; 0 before the first."""
        return self._db.execute("SELECT coalesce(max(version), 0) FROM changes").fetchone()[0]

    @property
    def chunker_fingerprint(self) -> str | None:
        """The fingerprint of what cut the chunks in the file; None before the first document."""
        return self._meta("chunker_fingerprint")

    def add(self, documents: Iterable[Document], chunker: Chunker) -> int:
        """Add documents as one version, all or none; returns the number of their chunks.

        Raises UserError if a document's id is live already, or if the chunks in the file were cut
        by another chunker.
        """
        count = 0
        with self._change() as version:
            self._bind(chunker)
            for document in documents:
                if self._is_live(document.id):
                    raise UserError(f"{self.path} already has a document {document.id!r}")
                self._db.execute(
                    "INSERT INTO documents (id, title, text, metadata, added_version)"
                    " VALUES (?, ?, ?, ?, ?)",
                    (document.id, document.title, document.text, _json(document.metadata), version),
                )
                for start, end in chunker(document):
                    self._insert_chunk(document, start, end, version)
                    count += 1
                self._log(version, "add", document.id)
        return count

    def remove(self, ids: Iterable[str]) -> int:
        """Remove documents as one version, all or none; returns the number of their chunks.

        Raises UserError for an id that no live document has.
        """
        count = 0
        with self._change() as version:
            for id in ids:
                if not self._is_live(id):
                    raise UserError(f"{self.path} has no document {id!r}")
                self._db.execute(  # a table without content is told what it forgets
                    "INSERT INTO words (words, rowid, title, text) SELECT 'delete', id, title, text"
                    f" FROM chunks WHERE document = ? AND {LIVE}",
                    (id,),
                )
                for table, key in (("documents", "id"), ("chunks", "document")):
                    query = f"UPDATE {table} SET removed_version = ? WHERE {key} = ? AND {LIVE}"
                    rows = self._db.execute(query, (version, id)).rowcount
                    count += rows if table == "chunks" else 0
                self._log(version, "remove", id)
        return count

    def documents(self) -> Iterator[Document]:
        """The live documents in the order they were added."""
        query = f"SELECT id, text, title, metadata FROM documents WHERE {LIVE} ORDER BY row"
        for id, text, title, metadata in self._db.execute(query):
            yield Document(id, text, title, json.loads(metadata))

    def chunks(self, version: int | None = None) -> list[Chunk]:
        """The chunks alive at a version (None: now), ordered by id."""
        if version is None:
            rows = self._db.execute(f"{CHUNK} WHERE {LIVE} ORDER BY id")
        else:
            alive = f"added_version <= :v AND ({LIVE} OR removed_version > :v)"
            rows = self._db.execute(f"{CHUNK} WHERE {alive} ORDER BY id", {"v": version})
        return [Chunk(*row) for row in rows]

    def chunk(self, id: int) -> Chunk:
        """A live chunk; raises UserError if there is none of that id."""
        row = self._db.execute(f"{CHUNK} WHERE id = ? AND {LIVE}", (id,)).fetchone()
        if row is None:
            raise UserError(f"{self.path} has no chunk {id}")
        return Chunk(*row)

    def search_text(self, query: str, k: int) -> list[tuple[int, float]]:
        """(chunk id, BM25 score) of at most k live chunks with a word of the query, best first.

        Ties go by chunk id. Raises UserError for k < 1.
        """
        from rag2.kb.lexical import words  # deferred: bm25s takes half a second to import

        if k < 1:
            raise UserError(f"k={k}; allowed: 1 or more")
        # OR: by default FTS5 wants every word of a question in one chunk, and finds nothing.
        match = " OR ".join(f'"{word}"' for word in dict.fromkeys(words(query)))
        if not match:
            return []
        return self._db.execute(
            "SELECT rowid, -bm25(words) AS score FROM words WHERE words MATCH ?"
            " ORDER BY score DESC, rowid LIMIT ?",
            (match, k),
        ).fetchall()

    def chunks_of(self, document: str) -> list[Chunk]:
        """The live chunks of a document, ordered by id; none where there is no such document."""
        query = f"{CHUNK} WHERE document = ? AND {LIVE} ORDER BY id"
        return [Chunk(*row) for row in self._db.execute(query, (document,))]

    def chunker(self, tokenizer: Path) -> TokenChunker | None:
        """The chunker that cut the documents; None if there is none yet or its tokenizer is gone.

        A tokenizer that was moved is looked for at `tokenizer`; only the same one will do.
        """
        stored = self._meta("chunker")
        if stored is None:
            return None
        chunker = TokenChunker.model_validate_json(stored)
        for found in (chunker, chunker.model_copy(update={"tokenizer": str(tokenizer)})):
            try:
                if found.fingerprint == self._meta("chunker_fingerprint"):
                    return found
            except UserError:  # it names no tokenizer that is there
                continue
        return None

    def copy(self, path: Path) -> None:
        """Write all of it, its last changes included, to a new file."""
        with closing(sqlite3.connect(path)) as target:
            self._db.backup(target)

    def content_hash(self) -> str:
        """SHA-256 over the live documents and chunks, whatever their history, ids and order."""
        digest = hashlib.sha256()
        for query in (
            f"SELECT id, title, text, metadata FROM documents WHERE {LIVE} ORDER BY id",
            f'SELECT document, "start", "end", title, text FROM chunks WHERE {LIVE}'
            ' ORDER BY document, "start", "end"',
        ):
            for row in self._db.execute(query):
                digest.update(_json(row).encode() + b"\n")
            digest.update(b"\n")
        return digest.hexdigest()

    def seal(self) -> None:
        """Fold the write-ahead log in, so that the file is whole by itself and readers only read.

        The next change turns the log on again.
        """
        self._db.execute("PRAGMA journal_mode = DELETE")

    @contextmanager
    def _change(self) -> Iterator[int]:
        """The version being written, in a transaction that an exception undoes."""
        try:
            self._db.execute("PRAGMA journal_mode = WAL")  # readers go on during a change
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:  # another writer, or a read-only file
            raise UserError(f"{self.path} cannot be changed: {error}") from None
        try:
            yield self.version + 1
        except BaseException:
            if self._db.in_transaction:  # a full disk has rolled it back already
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _bind(self, chunker: Chunker) -> None:
        """Remember the first chunker; refuse another one, since overlap and length would mix."""
        known = self._meta("chunker_fingerprint")
        if known is None:
            self._set("chunker", chunker.model_dump_json())
            self._set("chunker_fingerprint", chunker.fingerprint)
        elif known != chunker.fingerprint:
            stored, given = self._meta("chunker"), chunker.model_dump_json()
            raise UserError(f"{self.path} was cut by chunker {stored}, not by {given}")

    def _insert_chunk(self, document: Document, start: int, end: int, version: int) -> None:
        text = document.text[start:end]
        row = self._db.execute(
            'INSERT INTO chunks (document, title, text, "start", "end", added_version)'
            " VALUES (?, ?, ?, ?, ?, ?)",
            (document.id, document.title, text, start, end, version),
        )
        self._db.execute(
            "INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)",
            (row.lastrowid, document.title, text),
        )

    def _is_live(self, id: str) -> bool:
        query = f"SELECT 1 FROM documents WHERE id = ? AND {LIVE}"
        return self._db.execute(query, (id,)).fetchone() is not None

    def _log(self, version: int, op: str, document: str) -> None:
        self._db.execute(
            "INSERT INTO changes (version, op, document) VALUES (?, ?, ?)", (version, op, document)
        )

    def _meta(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def _set(self, key: str, value: str) -> None:
        self._db.execute("INSERT INTO meta VALUES (?, ?)", (key, value))


def _json(value: Any) -> str:
    """The one JSON text of a value, for storing and hashing."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
