"""What is in a knowledge base, now or at an earlier version."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rag2.kb.chunk import TokenChunker
from rag2.kb.file import File
from rag2.kb.names import encodable
from rag2.kb.words import LIVE
from rag2.registry import UserError
from rag2.types import Chunk, Document

CHUNK = 'SELECT id, document, text, title, "start", "end" FROM chunks'


@dataclass(frozen=True, slots=True)
class News:
    """What has changed since a version: live chunks that are new, with their namespaces.

    Ids of chunks that are gone may include some that came and went since.
    """

    version: int
    added: list[tuple[str, Chunk]]
    removed: list[int]


class State(File):
    """The documents and chunks of an open file."""

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
        if namespace is not None:
            encodable("namespace", namespace)
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
        columns = "text, title, metadata"
        query = f"SELECT {columns} FROM documents WHERE namespace = ? AND id = ? AND {LIVE}"
        given = (encodable("namespace", namespace), encodable("id", id))
        row = self._db.execute(query, given).fetchone()
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

    def may_have_held(self, chunks: Iterable[Chunk]) -> bool:
        """Whether the chunks can be of this file: an id is never given twice.

        What a compaction has erased cannot be compared, and counts as the same.
        """
        with self.reading():
            query = "SELECT seq FROM sqlite_sequence WHERE name = 'chunks'"
            (highest,) = self._db.execute(query).fetchone() or (0,)
            for chunk in chunks:
                row = self._db.execute(f"{CHUNK} WHERE id = ?", (chunk.id,)).fetchone()
                if chunk.id > highest or row is not None and Chunk(*row) != chunk:
                    return False
        return True

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
        given = (encodable("namespace", namespace), encodable("id", document))
        return [Chunk(*row) for row in self._db.execute(query, given)]

    def chunker(self, tokenizer: Path) -> TokenChunker | None:
        """The chunker that cut the documents; None if there is none yet or its tokenizer is gone.

        A tokenizer that was moved is looked for at `tokenizer`; only the same one will do. Raises
        UserError for a chunker that is none of rag2's.
        """
        stored = self._meta("chunker")
        if stored is None:
            return None
        try:
            chunker = TokenChunker.model_validate_json(stored)
        except ValidationError:
            raise UserError(f"{self.path} was cut by somebody's own chunker: {stored}") from None
        moved = chunker.model_copy(update={"tokenizer": str(tokenizer)})
        # A name that is no path may be one on the hub: what lies beside the file needs no network.
        for found in (moved, chunker) if tokenizer.is_dir() else (chunker, moved):
            try:
                if found.fingerprint == self._meta("chunker_fingerprint"):
                    return found
            except UserError:  # it names no tokenizer that is there
                continue
        return None

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

    def missing(self, id: str, namespace: str = "", hint: str = "") -> UserError:
        """The error for a document that is not live in a namespace: where else it is, or a hint."""
        query = f"SELECT namespace FROM documents WHERE id = ? AND {LIVE} ORDER BY namespace"
        others = [name for (name,) in self._db.execute(query, (encodable("id", id),))]
        if others:
            named = ", ".join(repr(name) if name else "the one without a name" for name in others)
            hint = f"; it is in another namespace: {named}"
        return UserError(f"{self.path} has no document {id!r}{_within(namespace)}{hint}")

    def _live(self, id: str, namespace: str) -> tuple[str, str, str] | None:
        """Title, text and metadata of a live document."""
        query = "SELECT title, text, metadata FROM documents WHERE namespace = ? AND id = ?"
        given = (encodable("namespace", namespace), encodable("id", id))
        return self._db.execute(f"{query} AND {LIVE}", given).fetchone()


def fields(document: Document) -> tuple[str, str, str]:
    """Title, text and metadata as they are stored; UserError for metadata that is no JSON."""
    try:
        return document.title, document.text, _json(document.metadata)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"metadata of document {document.id!r:.60} is no JSON: {error}") from None


def _within(namespace: str) -> str:
    """` in namespace 'x'`, or nothing for the one without a name."""
    return f" in namespace {namespace!r}" if namespace else ""


def _json(value: Any) -> str:
    """The one JSON text of a value, for storing and hashing."""
    separators = (",", ":")
    return json.dumps(
        value, ensure_ascii=False, sort_keys=True, allow_nan=False, separators=separators
    )
