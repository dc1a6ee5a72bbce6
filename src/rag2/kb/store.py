"""The knowledge base: documents, their chunks and every change to them, in one SQLite file.

Rows are never rewritten: a document or chunk lives from its `added_version` until before its
`removed_version`, so that the state at version v is a predicate. One change is one transaction is
one version. Nothing in the file depends on the clock.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rag2.kb.chunk import Chunker, TokenChunker
from rag2.kb.names import bounded
from rag2.kb.state import State, fields
from rag2.kb.words import LIVE
from rag2.registry import UserError
from rag2.types import Document

KINDS = {"id": str, "title": str, "text": str, "metadata": dict}


@dataclass(frozen=True, slots=True)
class Put:
    """What became of the documents of a `put`, in documents, and the chunks it wrote."""

    added: int
    updated: int
    unchanged: int
    chunks: int


class KnowledgeBase(State):
    """An open knowledge base, with its changes; a context manager that closes it."""

    def add(self, documents: Iterable[Document], chunker: Chunker, namespace: str = "") -> int:
        """Add documents as one version, all or none; returns the number of their chunks.

        Raises UserError if a document's id is live already in the namespace, or if the chunks in
        the file were cut by another chunker.
        """
        count = 0
        with self._change() as version:
            self._bind(chunker)
            bounded("namespace", namespace)
            for document in _documents(documents):
                if self._live(document.id, namespace):
                    raise UserError(f"{self.path} already has a document {document.id!r}")
                count += self._write("add", document, chunker, namespace, version)
        return count

    def put(self, documents: Iterable[Document], chunker: Chunker, namespace: str = "") -> Put:
        """Add new documents and replace changed ones as one version, all or none.

        Equal ones stay as they are; if all are, there is no new version. Raises UserError if an id
        comes twice, or if the chunks in the file were cut by another chunker.
        """
        added = updated = chunks = 0
        seen: set[str] = set()
        with self._change() as version:
            self._bind(chunker)
            bounded("namespace", namespace)
            for document in _documents(documents):
                if document.id in seen:
                    raise UserError(f"document {document.id!r} is given twice")
                seen.add(document.id)
                old = self._live(document.id, namespace)
                if old == fields(document):
                    continue
                if old:
                    self._bury(document.id, namespace, version)
                op = "update" if old else "add"
                chunks += self._write(op, document, chunker, namespace, version)
                added, updated = added + (not old), updated + bool(old)
        return Put(added, updated, len(seen) - added - updated, chunks)

    def remove(self, ids: Iterable[str], namespace: str = "") -> int:
        """Remove documents as one version, all or none; returns the number of their chunks.

        Raises UserError for an id that no live document of the namespace has.
        """
        count = 0
        with self._change() as version:
            for id in ids:
                if not self._live(id, namespace):
                    raise self.missing(id, namespace)
                count += self._bury(id, namespace, version)
                self._log(version, "remove", id, namespace)
        return count

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Commit the changes made inside together, by one fsync; an exception undoes them all.

        Each is a version of its own. One that fails inside undoes itself alone. None is durable
        before the end of the block.
        """
        with self._transaction():
            yield

    def name_tokenizer(self, tokenizer: str) -> None:
        """Note under which name the tokenizer of the chunker goes from now on, as after a move."""
        with self._transaction():
            stored = self._meta("chunker")
            assert stored is not None, "nothing was cut yet"
            chunker = TokenChunker.model_validate_json(stored)
            renamed = chunker.model_copy(update={"tokenizer": tokenizer}).model_dump_json()
            self._db.execute("UPDATE meta SET value = ? WHERE key = 'chunker'", (renamed,))

    def compact(self) -> int:
        """Erase what was removed from the file and from its log; returns the number of its chunks.

        On return no byte of it is in the file or beside it, and older versions cannot be read any
        more. Raises UserError while somebody else writes the file or reads an older state of it.
        """
        assert not self._db.in_transaction, "a compaction cannot be part of a batch"
        with self._transaction():
            version = self.version
            gone = "removed_version IS NOT NULL"
            chunks = self._db.execute(f"DELETE FROM chunks WHERE {gone}").rowcount
            self._db.execute(f"DELETE FROM documents WHERE {gone}")
            self._db.execute(  # an id may tell as much as a text
                "DELETE FROM changes WHERE NOT EXISTS (SELECT 1 FROM documents"
                f" WHERE namespace = changes.namespace AND id = changes.document AND {LIVE})"
            )
            self._words.rebuild()
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('compacted', ?)", (str(version),))
        # Always, and not only where rows went: an earlier compaction may have been killed here.
        try:
            self._db.execute("VACUUM")
            busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.OperationalError as error:
            raise UserError(f"{self.path} cannot be compacted: {error}") from None
        if busy:
            raise UserError(
                f"{self.path} is being read, which keeps erased text in its log; compact it again"
            )
        return chunks

    @contextmanager
    def _change(self) -> Iterator[int]:
        """The version being written, in a transaction that an exception undoes."""
        with self._transaction():
            yield self.version + 1

    def _bind(self, chunker: Chunker) -> None:
        """Remember the first chunker; refuse another one, since overlap and length would mix."""
        known = self._meta("chunker_fingerprint")
        if known is None:
            self._set("chunker", chunker.model_dump_json())
            self._set("chunker_fingerprint", chunker.fingerprint)
        elif known != chunker.fingerprint:
            stored, given = self._meta("chunker"), chunker.model_dump_json()
            raise UserError(f"{self.path} was cut by chunker {stored}, not by {given}")

    def _write(
        self, op: str, document: Document, chunker: Chunker, namespace: str, version: int
    ) -> int:
        """Insert a document and its chunks; returns their number."""
        self._db.execute(
            "INSERT INTO documents (id, title, text, metadata, added_version, namespace)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (document.id, *fields(document), version, namespace),
        )
        rows = []
        for start, end in chunker(document):
            text = document.text[start:end]
            row = self._db.execute(
                'INSERT INTO chunks (document, title, text, "start", "end", added_version,'
                " namespace) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (document.id, document.title, text, start, end, version, namespace),
            )
            rows.append((row.lastrowid, document.title, text))
        self._words.add(namespace, rows)
        self._log(version, op, document.id, namespace)
        return len(rows)

    def _bury(self, id: str, namespace: str, version: int) -> int:
        """Let a live document and its chunks end before a version; returns their number."""
        self._words.forget(namespace, id)
        rows = 0
        for table, key in (("documents", "id"), ("chunks", "document")):
            which = f"namespace = ? AND {key} = ? AND {LIVE}"
            query = f"UPDATE {table} SET removed_version = ? WHERE {which}"
            rows = self._db.execute(query, (version, namespace, id)).rowcount
        return rows

    def _log(self, version: int, op: str, document: str, namespace: str) -> None:
        self._db.execute(
            "INSERT INTO changes (version, op, document, namespace) VALUES (?, ?, ?, ?)",
            (version, op, document, namespace),
        )


def _documents(given: Iterable[Document]) -> Iterator[Document]:
    """The same; raises TypeError for what is no document, UserError for one that cannot be kept."""
    for document in given:
        if not isinstance(document, Document):
            raise TypeError(f"{document!r:.60} is a {type(document).__name__}, not a Document")
        for name, kind in KINDS.items():
            if not isinstance(value := getattr(document, name), kind):
                what = f"is a {type(value).__name__}, not a {kind.__name__}"
                raise UserError(f"{name} of document {document.id!r:.60} {what}")
        bounded("id", document.id)
        yield document
