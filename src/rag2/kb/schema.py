"""The tables of a knowledge base, and how a file of the format before becomes one of this.

A file of format 1 knows no namespaces. It is read as it is, through views that put the one without
a name beside its rows, so that a sealed or read-only file stays what it is to the byte; its first
change rewrites it within its own transaction.
"""

import sqlite3

FORMAT = "rag2.kb/2"
OLD = "rag2.kb/1"
# AUTOINCREMENT: the id of a chunk is never given to another one, even after a compaction.
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
    row INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL, metadata TEXT NOT NULL,
    added_version INTEGER NOT NULL, removed_version INTEGER,
    namespace TEXT NOT NULL DEFAULT ''
);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    document TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL,
    "start" INTEGER NOT NULL, "end" INTEGER NOT NULL,
    added_version INTEGER NOT NULL, removed_version INTEGER,
    namespace TEXT NOT NULL DEFAULT ''
);
CREATE TABLE changes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    version INTEGER NOT NULL,
    op TEXT NOT NULL CHECK (op IN ('add', 'update', 'remove')),
    document TEXT NOT NULL,
    namespace TEXT NOT NULL DEFAULT ''
);
CREATE INDEX change_version ON changes (version);
CREATE VIRTUAL TABLE words USING fts5 (title, text, content = 'chunks', content_rowid = 'id');
"""
# What is new in format 2, for a new file and for an old one.
NEWER = """
CREATE UNIQUE INDEX live_document ON documents (namespace, id) WHERE removed_version IS NULL;
CREATE INDEX chunk_document ON chunks (namespace, document);
CREATE INDEX chunk_added ON chunks (added_version);
CREATE INDEX chunk_removed ON chunks (removed_version) WHERE removed_version IS NOT NULL;
CREATE TABLE namespaces (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
INSERT INTO namespaces VALUES (0, '');
"""
TABLES = ("documents", "chunks", "changes")


def create(db: sqlite3.Connection) -> None:
    """Make the tables of a new file."""
    db.executescript(f"BEGIN; {SCHEMA} {NEWER} INSERT INTO meta VALUES ('format', '{FORMAT}');")
    db.execute("COMMIT")


def read_old(db: sqlite3.Connection) -> None:
    """Let this connection see a file of the old format as one of this; the file is not touched."""
    for table in TABLES:
        db.execute(f"CREATE TEMP VIEW {table} AS SELECT *, '' AS namespace FROM main.{table}")
    db.execute("CREATE TEMP VIEW namespaces AS SELECT 0 AS number, '' AS name")


def forget_old(db: sqlite3.Connection) -> None:
    """Let this connection see the file as it is again."""
    views = {name for (name,) in db.execute("SELECT name FROM temp.sqlite_master")}
    for view in views & {*TABLES, "namespaces"}:
        db.execute(f"DROP VIEW temp.{view}")


def is_new(db: sqlite3.Connection) -> bool:
    """Whether the file is of this format, whatever it was when it was opened."""
    return db.execute("SELECT value FROM main.meta WHERE key = 'format'").fetchone()[0] == FORMAT


def upgrade(db: sqlite3.Connection) -> None:
    """Make the file one of this format, in the transaction that is open; nothing if it is one."""
    forget_old(db)
    if is_new(db):  # another process has been here
        return
    for table in TABLES:
        db.execute(f"ALTER TABLE {table} ADD COLUMN namespace TEXT NOT NULL DEFAULT ''")
    for index in ("live_document", "chunk_document"):
        db.execute(f"DROP INDEX {index}")
    for statement in filter(str.strip, NEWER.split(";")):
        db.execute(statement)
    db.execute("UPDATE meta SET value = ? WHERE key = 'format'", (FORMAT,))
