"""Vectors in Postgres with the extension pgvector, 0.8 or newer."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, Literal

import numpy as np
from pydantic import Field, StrictInt, field_validator, model_validator

from rag2.index.remote import Collection, Remote, empty, one_line
from rag2.registry import UserError

LARGEST_D = 2000  # pgvector: of an HNSW index, and of a row that fits into a page
LARGEST_EF = 1000  # pgvector
PATIENCE = 10  # seconds to reach a server


class PGVector(Remote):
    """Postgres with pgvector; a password comes from PGPASSWORD or ~/.pgpass, as for psql."""

    name: Literal["pgvector"] = "pgvector"
    dsn: str = ""
    """host=... dbname=... user=..., or postgresql://...; empty: PGHOST, PGDATABASE and so on"""
    kind: Literal["hnsw", "flat"] = "hnsw"
    """flat: exact"""
    links: StrictInt = Field(default=16, ge=2, le=100)
    """hnsw: neighbours of a node"""
    ef_construction: StrictInt = Field(default=64, ge=4, le=1000)
    """hnsw: candidates kept while a node's neighbours are chosen"""
    ef_search: StrictInt = Field(default=64, ge=1, le=1000)
    """hnsw: candidates kept while searching"""

    @field_validator("dsn")
    @classmethod
    def _without_secret(cls, dsn: str) -> str:
        scheme, mark, rest = dsn.partition("://")
        user = rest.partition("@")[0] if mark and "@" in rest else ""
        if "password" in dsn or user.partition(":")[2]:
            raise ValueError(
                "a password in dsn would be written into files; set PGPASSWORD or use ~/.pgpass"
            )
        return dsn

    @model_validator(mode="after")
    def _possible(self) -> "PGVector":
        if self.kind == "hnsw" and self.ef_construction < 2 * self.links:
            least = f"at least 2 links = {2 * self.links}"
            raise ValueError(f"ef_construction={self.ef_construction} must be {least}")
        return self

    @property
    def exact(self) -> bool:
        return self.kind == "flat"

    def collection(self, name: str) -> Collection:
        return _Table(self, name)


class _Table(Collection):
    """A table with one row a vector; each thread that searches at once has a connection."""

    outlives = True

    def __init__(self, backend: PGVector, name: str) -> None:
        super().__init__(name)
        self._psycopg, self._pgvector = import_psycopg()
        self._backend = backend
        self._idle: SimpleQueue[Any] = SimpleQueue()
        weakref.finalize(self, _close, self._idle)
        self.where = "Postgres"
        with self._connection() as connection:
            info = connection.info
            self.where = f"Postgres {info.dbname!r} at {info.host}:{info.port}"
            connection.execute("SELECT")

    def create(self, dimension: int) -> None:
        if not self._backend.exact and dimension > LARGEST_D:
            raise UserError(
                f"{self.where}: pgvector has no HNSW index of {dimension} dimensions, only up to "
                f"{LARGEST_D}; set index.kind=flat"
            )
        with self._connection() as connection:
            columns = f"n bigint NOT NULL, embedding vector({dimension}) NOT NULL"
            connection.execute(f"CREATE TABLE {self.name} ({columns})")
            if dimension <= LARGEST_D:  # in the row itself, not compressed beside the table
                connection.execute(
                    f"ALTER TABLE {self.name} ALTER COLUMN embedding SET STORAGE PLAIN"
                )

    def add(self, first: int, block_MD: np.ndarray) -> None:
        vector = self._pgvector.Vector
        with self._connection() as connection, connection.cursor() as cursor:
            with cursor.copy(f"COPY {self.name} FROM STDIN WITH (FORMAT BINARY)") as copy:
                copy.set_types(["int8", "vector"])
                for row, vector_D in enumerate(block_MD, first):
                    copy.write_row((row, vector(vector_D)))

    def publish(self) -> None:
        with self._connection() as connection:
            connection.execute(f"ALTER TABLE {self.name} ADD PRIMARY KEY (n)")
            if not self._backend.exact:
                how = (
                    f"m = {self._backend.links}, ef_construction = {self._backend.ef_construction}"
                )
                connection.execute(
                    f"CREATE INDEX ON {self.name} USING hnsw (embedding vector_ip_ops) WITH ({how})"
                )
            connection.execute(f"ANALYZE {self.name}")

    def size(self) -> tuple[int, int] | None:
        with self._connection() as connection:
            column = "attrelid = to_regclass(%s) AND attname = 'embedding'"
            found = connection.execute(
                f"SELECT atttypmod FROM pg_attribute WHERE {column}", (self.name,)
            ).fetchone()
            if found is None:
                return None
            count = connection.execute(f"SELECT count(*) FROM {self.name}").fetchone()[0]
        return count, found[0]

    def nearest(self, queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        scores_BM, rows_BM = empty(queries_BD, m)
        ask = f"SELECT -(embedding <#> %(q)s) AS score, n FROM {self.name} "
        ask += "ORDER BY embedding <#> %(q)s LIMIT %(m)s"
        with self._connection() as connection:
            if not self._backend.exact:
                ef = min(max(self._backend.ef_search, m), LARGEST_EF)
                connection.execute("SELECT set_config('hnsw.ef_search', %s, false)", (str(ef),))
            for query_D, scores_M, rows_M in zip(queries_BD, scores_BM, rows_BM, strict=True):
                given = {"q": self._pgvector.Vector(query_D), "m": m}
                found = connection.execute(ask, given, binary=True).fetchall()
                scores_M[: len(found)] = [score for score, _ in found]
                rows_M[: len(found)] = [row for _, row in found]
        return scores_BM, rows_BM

    def read(self, rows_M: np.ndarray) -> np.ndarray:
        ask = f"SELECT embedding FROM {self.name} WHERE n = ANY(%s) ORDER BY n"
        with self._connection() as connection:
            found = connection.execute(ask, (rows_M.tolist(),), binary=True).fetchall()
        if len(found) != len(rows_M):
            raise UserError(f"{self.where}: table {self.name} has lost rows")
        return np.stack([vector.to_numpy() for (vector,) in found]).astype(np.float32)

    def stored(self) -> int:
        ask = "SELECT pg_total_relation_size(to_regclass(%s))"
        with self._connection() as connection:
            return connection.execute(ask, (self.name,)).fetchone()[0]

    def drop(self) -> None:
        with self._connection() as connection:
            connection.execute(f"DROP TABLE IF EXISTS {self.name}")

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        """A connection that no other thread uses meanwhile; one that failed is not used again."""
        with one_line(self.where, (self._psycopg.Error,)):
            try:
                connection = self._idle.get_nowait()
            except Empty:
                connection = self._connected()
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            self._idle.put(connection)

    def _connected(self) -> Any:
        connection = self._psycopg.connect(
            self._backend.dsn, autocommit=True, connect_timeout=PATIENCE
        )
        try:
            connection.execute("SET client_min_messages = warning")
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            # A list longer than ef_search is filled by going on, in the order of the scores.
            connection.execute("SET hnsw.iterative_scan = strict_order")
            self._pgvector.psycopg.register_vector(connection)
        except BaseException:
            connection.close()
            raise
        return connection


def _close(idle: SimpleQueue[Any]) -> None:
    while not idle.empty():
        idle.get_nowait().close()


def import_psycopg() -> tuple[Any, Any]:
    """The modules psycopg and pgvector; raises UserError when they are not installed."""
    try:
        import pgvector
        import pgvector.psycopg
        import psycopg
    except ImportError:
        raise UserError("index=pgvector needs its client: pip install 'rag2[pgvector]'") from None
    return psycopg, pgvector
