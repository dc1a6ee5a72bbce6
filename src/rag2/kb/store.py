"""The knowledge base: documents, their chunks and every change to them, in one SQLite file.

Rows are never rewritten: a document or chunk lives from its `added_version` until before its
`removed_version`, so that the state at version v is a predicate. One change is one transaction is
one version. Nothing in the file depends on the clock.
"""

import hashlib
import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rag2.kb import schema
from rag2.kb.chunk import Chunker, TokenChunker
from rag2.kb.words import LIVE, Words
from rag2.registry import UserError
from rag2.types import Chunk, Document

CHUNK = 'SELECT id, document, text, title, "start", "end" FROM chunks'


@dataclass(frozen=True, slots=True)
class Put:
    """What became of the documents of a `put`, in documents, and the chunks it wrote."""

    added: int
    updated: int
    unchanged: int
    chunks: int


@dataclass(frozen=True, slots=True)
class News:
    """What has changed since a version: live chunks that are new, with their namespaces.

    Ids of chunks that are gone may include some that came and went since.
    """

    version: int
    added: list[tuple[str, Chunk]]
    removed: list[int]


class KnowledgeBase:
    """An open knowledge base; a context manager that closes it."""

    def __init__(self, path: Path | str, create: bool = False, trusted: bool = False) -> None:
        """Open the file at `path`, or with `create` make a new one.

        A `trusted` one was looked through for damage a moment ago. Raises UserError if it is
        missing, is already there, or is no knowledge base.
        """
        self.path = Path(path)
        if create and self.path.exists():
            raise UserError(f"{self.path} already exists")
        if not create and not self.path.is_file():
            what = "is not a file" if self.path.exists() else "does not exist"
            raise UserError(f"knowledge base {str(self.path)!r} {what}")
        uri = f"{self.path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
        # Transactions are explicit; of several threads, one at a time may call.
        self._db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        self._words = Words(self._db)
        try:
            # FULL: a change that returned survives a power cut, not only a killed process.
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA temp_store = MEMORY")
            if create:
                schema.create(self._db)
            found = self._meta("format")
            known = found in (schema.FORMAT, schema.OLD)
            looked_at = trusted or not known
            sound = looked_at or self._db.execute("PRAGMA quick_check").fetchone()[0] == "ok"
            self._old = found == schema.OLD and sound
            if self._old:
                schema.read_old(self._db)
        except sqlite3.DatabaseError:
            known, sound = False, True
        if not known or not sound:
            self.close()
            what = f"is not a knowledge base of format {schema.FORMAT}" if sound else "is damaged"
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
        # A compaction forgets the changes of what is gone.
        return self._db.execute(
            "SELECT max(coalesce((SELECT max(version) FROM changes), 0),"
            " coalesce((SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'compacted'), 0))"
        ).fetchone()[0]

    @property
    def oldest(self) -> int:
        """The first version whose state can be read: the one of the last compaction, or 0."""
        return int(self._meta("compacted") or 0)

    @property
    def chunker_fingerprint(self) -> str | None:
        """The fingerprint of what cut the chunks in the file; None before the first document."""
        return self._meta("chunker_fingerprint")

    def add(self, documents: Iterable[Document], chunker: Chunker, namespace: str = "") -> int:
        """Add documents as one version, all or none; returns the number of their chunks.

        Raises UserError if a document's id is live already in the namespace, or if the chunks in
        the file were cut by another chunker.
        """
        count = 0
        with self._change() as version:
            self._bind(chunker)
            for document in documents:
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
            for document in documents:
                if document.id in seen:
                    raise UserError(f"document {document.id!r} is given twice")
                seen.add(document.id)
                old = self._live(document.id, namespace)
                if old == _fields(document):
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

    def missing(self, id: str, namespace: str = "", hint: str = "") -> UserError:
        """The error for a document that is not live in a namespace: where else it is, or a hint."""
        query = f"SELECT namespace FROM documents WHERE id = ? AND {LIVE} ORDER BY namespace"
        others = [name for (name,) in self._db.execute(query, (id,))]
        if others:
            named = ", ".join(repr(name) if name else "the one without a name" for name in others)
            hint = f"; it is in another namespace: {named}"
        return UserError(f"{self.path} has no document {id!r}{_within(namespace)}{hint}")

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Commit the changes made inside together, by one fsync; an exception undoes them all.

        Each is a version of its own. One that fails inside undoes itself alone. None is durable
        before the end of the block.
        """
        with self._transaction():
            yield

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
                " WHERE namespace = changes.namespace AND id = changes.document)"
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
    def reading(self) -> Iterator[None]:
        """What is read inside is of one version, whoever changes the file meanwhile."""
        if self._db.in_transaction:  # of a batch: it sees its own changes
            yield
            return
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    def since(self, version: int) -> News | None:
        """What has changed after a version; None if a compaction has forgotten it."""
        with self.reading():
            if version < self.oldest:
                return None
            added = self._db.execute(  # +id: not through all chunks in the order of their ids
                f"{CHUNK.replace('SELECT', 'SELECT namespace,')}"
                f" WHERE added_version > ? AND {LIVE} ORDER BY +id",
                (version,),
            ).fetchall()
            removed = self._db.execute(
                "SELECT id FROM chunks WHERE removed_version > ?", (version,)
            ).fetchall()
            found = [(row[0], Chunk(*row[1:])) for row in added]
            return News(self.version, found, [id for (id,) in removed])

    def alive(self) -> dict[int, str]:
        """Id and namespace of every live chunk, ids increasing."""
        query = f"SELECT id, namespace FROM chunks WHERE {LIVE} ORDER BY id"
        return dict(self._db.execute(query).fetchall())

    def has(self, id: str, namespace: str = "") -> bool:
        """Whether a document is live."""
        return self._live(id, namespace) is not None

    def namespaces(self) -> list[str]:
        """The namespaces with a live document, in order of their names."""
        query = f"SELECT DISTINCT namespace FROM documents WHERE {LIVE} ORDER BY namespace"
        return [name for (name,) in self._db.execute(query)]

    def documents(self, namespace: str | None = None) -> Iterator[Document]:
        """The live documents of a namespace (None: of all) in the order they were added."""
        query = (
            f"SELECT id, text, title, metadata FROM documents WHERE {LIVE}"
            " AND namespace = coalesce(?, namespace) ORDER BY row"
        )
        for id, text, title, metadata in self._db.execute(query, (namespace,)):
            yield Document(id, text, title, json.loads(metadata))

    def listed(self, namespace: str, after: str, limit: int) -> list[Document]:
        """Live documents of a namespace in the order of their ids, those after `after`."""
        query = (
            f"SELECT id, text, title, metadata FROM documents WHERE {LIVE}"
            " AND namespace = ? AND id > ? ORDER BY id LIMIT ?"
        )
        rows = self._db.execute(query, (namespace, after, limit)).fetchall()
        return [Document(id, text, title, json.loads(data)) for id, text, title, data in rows]

    def document(self, id: str, namespace: str = "") -> Document | None:
        """The live document of an id; None if there is none."""
        query = (
            f"SELECT text, title, metadata FROM documents WHERE namespace = ? AND id = ? AND {LIVE}"
        )
        row = self._db.execute(query, (namespace, id)).fetchone()
        return None if row is None else Document(id, row[0], row[1], json.loads(row[2]))

    def chunks(self, version: int | None = None) -> list[Chunk]:
        """The chunks alive at a version (None: now), ordered by id.

        Raises UserError for a version from before the last compaction.
        """
        if version is None:
            rows = self._db.execute(f"{CHUNK} WHERE {LIVE} ORDER BY id")
        elif version < self.oldest:
            raise UserError(f"{self.path}: version {version} was compacted away")
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

    def search_text(
        self, query: str, k: int, namespaces: Collection[str] | None = None
    ) -> list[tuple[int, float]]:
        """(chunk id, BM25 score) of at most k live chunks with a word of the query, best first.

        Ties go by chunk id. Only chunks of the namespaces are looked at (None: of all); each counts
        its words for itself. Raises UserError for k < 1.
        """
        from rag2.kb.lexical import words  # deferred: bm25s takes half a second to import

        if k < 1:
            raise UserError(f"k={k}; allowed: 1 or more")
        if isinstance(namespaces, str):
            raise ValueError(f"namespaces={namespaces!r}: a collection of names, not one name")
        k = min(k, 2**31)
        with self.reading():
            return self._words.search(dict.fromkeys(words(query)), k, namespaces)

    def chunks_of(self, document: str, namespace: str = "") -> list[Chunk]:
        """The live chunks of a document, ordered by id; none where there is no such document."""
        query = f"{CHUNK} WHERE namespace = ? AND document = ? AND {LIVE} ORDER BY id"
        return [Chunk(*row) for row in self._db.execute(query, (namespace, document))]

    def chunker(self, tokenizer: Path) -> TokenChunker | None:
        """The chunker that cut the documents; None if there is none yet or its tokenizer is gone.

        A tokenizer that was moved is looked for at `tokenizer`; only the same one will do.
        """
        stored = self._meta("chunker")
        if stored is None:
            return None
        chunker = TokenChunker.model_validate_json(stored)
        moved = chunker.model_copy(update={"tokenizer": str(tokenizer)})
        # A name that is no path may be one on the hub: what lies beside the file needs no network.
        for found in (moved, chunker) if tokenizer.is_dir() else (chunker, moved):
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

    def name_tokenizer(self, tokenizer: str) -> None:
        """Note under which name the tokenizer of the chunker goes from now on, as after a move."""
        with self._transaction():
            stored = self._meta("chunker")
            assert stored is not None, "nothing was cut yet"
            chunker = TokenChunker.model_validate_json(stored)
            renamed = chunker.model_copy(update={"tokenizer": tokenizer}).model_dump_json()
            self._db.execute("UPDATE meta SET value = ? WHERE key = 'chunker'", (renamed,))

    def content_hash(self) -> str:
        """SHA-256 over the live documents and chunks, whatever their history, ids and order."""
        digest = hashlib.sha256()
        for query in (
            f"SELECT namespace, id, title, text, metadata FROM documents WHERE {LIVE}"
            " ORDER BY namespace, id",
            f'SELECT namespace, document, "start", "end", title, text FROM chunks WHERE {LIVE}'
            ' ORDER BY namespace, document, "start", "end"',
        ):
            for namespace, *row in self._db.execute(query):
                named = [*row, namespace] if namespace else row  # as format 1 counted
                digest.update(_json(named).encode() + b"\n")
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
        with self._transaction():
            yield self.version + 1

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All that is inside or nothing; durable at the end, unless it is inside another one."""
        inner = self._db.in_transaction
        try:
            if not inner:
                self._db.execute("PRAGMA journal_mode = WAL")  # readers go on during a change
            self._db.execute("SAVEPOINT change" if inner else "BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:  # another writer, or a read-only file
            raise UserError(f"{self.path} cannot be changed: {error}") from None
        try:
            if self._old and not inner:
                schema.upgrade(self._db)
            yield
            self._db.execute("RELEASE change" if inner else "COMMIT")
            self._old = self._old and inner
        except BaseException as error:
            if self._db.in_transaction:  # a full disk has rolled it back already
                self._db.execute("ROLLBACK TO change" if inner else "ROLLBACK")
                if inner:
                    self._db.execute("RELEASE change")
            if isinstance(error, sqlite3.OperationalError):  # a full disk, a file gone read-only
                raise UserError(f"{self.path} cannot be changed: {error}") from None
            raise

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
            (document.id, *_fields(document), version, namespace),
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

    def _live(self, id: str, namespace: str) -> tuple[str, str, str] | None:
        """Title, text and metadata of a live document."""
        query = "SELECT title, text, metadata FROM documents WHERE namespace = ? AND id = ?"
        return self._db.execute(f"{query} AND {LIVE}", (namespace, id)).fetchone()

    def _log(self, version: int, op: str, document: str, namespace: str) -> None:
        self._db.execute(
            "INSERT INTO changes (version, op, document, namespace) VALUES (?, ?, ?, ?)",
            (version, op, document, namespace),
        )

    def _meta(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def _set(self, key: str, value: str) -> None:
        self._db.execute("INSERT INTO meta VALUES (?, ?)", (key, value))


def _fields(document: Document) -> tuple[str, str, str]:
    """Title, text and metadata as they are stored."""
    return document.title, document.text, _json(document.metadata)


def _within(namespace: str) -> str:
    """` in namespace 'x'`, or nothing for the one without a name."""
    return f" in namespace {namespace!r}" if namespace else ""


def _json(value: Any) -> str:
    """The one JSON text of a value, for storing and hashing."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
