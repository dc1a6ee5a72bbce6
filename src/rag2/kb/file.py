"""The SQLite file of a knowledge base: opened and looked at for damage, read and changed whole."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

from rag2.kb import schema
from rag2.kb.words import Words
from rag2.registry import UserError

# What SQLite says of a file that is none of its own, is damaged, or lacks our tables.
OTHER_FILES = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR)


class File:
    """An open file; a context manager that closes it."""

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
        try:
            db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        except sqlite3.OperationalError as error:
            raise UserError(f"{self.path} cannot be opened: {error}") from None
        self._connection, self._words, self._old = db, Words(db), False
        try:
            # FULL: a change that returned survives a power cut, not only a killed process.
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA temp_store = MEMORY")
            if create:
                schema.create(db)
            found = self._meta("format")
            known = found in (schema.FORMAT, schema.OLD)
            looked_at = trusted or not known
            sound = looked_at or db.execute("PRAGMA quick_check").fetchone()[0] == "ok"
            self._old = found == schema.OLD and sound
            if self._old:
                schema.read_old(db)
        except sqlite3.DatabaseError as error:
            code = error.sqlite_errorcode & 0xFF
            if code not in OTHER_FILES:  # a full disk, another's lock
                self.close()
                raise UserError(f"{self.path} cannot be opened: {error}") from None
            known, sound = False, code != sqlite3.SQLITE_CORRUPT
        if not known or not sound:
            self.close()
            what = f"is not a knowledge base of format {schema.FORMAT}" if sound else "is damaged"
            raise UserError(f"{self.path} {what}")

    @property
    def _db(self) -> sqlite3.Connection:
        """The connection, which sees the file in the format that it has by now."""
        if self._old and not self._connection.in_transaction:
            self._see_new()
        return self._connection

    def _see_new(self) -> None:
        """Where another process has rewritten a file of the old format, read it as it is."""
        if schema.is_new(self._connection):
            schema.forget_old(self._connection)
            self._old = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was changed is already safe in it."""
        self._connection.close()

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

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What is read inside is of one version, whoever changes the file meanwhile."""
        if self._db.in_transaction:  # of a batch: it sees its own changes
            yield
            return
        self._db.execute("BEGIN")
        try:
            if self._old:
                self._see_new()  # in the state that is read from here on
            yield
        finally:
            self._db.execute("COMMIT")

    def copy(self, path: Path) -> None:
        """Write all of it, its last changes included, to a new file."""
        with closing(sqlite3.connect(path)) as target:
            self._db.backup(target)

    def seal(self) -> None:
        """Fold the write-ahead log in, so that the file is whole by itself and readers only read.

        The next change turns the log on again.
        """
        self._db.execute("PRAGMA journal_mode = DELETE")

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
            if isinstance(error, UnicodeEncodeError):
                raise UserError(
                    f"a lone surrogate, which no UTF-8 text can hold: {error}"
                ) from None
            raise

    def _meta(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def _set(self, key: str, value: str) -> None:
        self._db.execute("INSERT INTO meta VALUES (?, ?)", (key, value))
