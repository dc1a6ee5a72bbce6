"""Vectors in Milvus: a file beside the run (milvus-lite), a server or a cluster, by one client."""

import logging
import os
from typing import Any, Literal

import numpy as np
from pydantic import Field, StrictInt, field_validator

from rag2.index.remote import Collection, Remote, empty, one_line
from rag2.registry import UserError

LARGEST_M = 16_384  # a server returns no longer lists
ROW, VECTOR = "row", "embedding"
PATIENCE = 10.0  # seconds to reach a server
ANSWER = 60.0  # seconds for an answer; without a limit the client tries for minutes
TOKEN = "MILVUS_TOKEN"


class Milvus(Remote):
    """Milvus, version 2.4 or newer; a secret comes from MILVUS_TOKEN (user:password, or a key)."""

    name: Literal["milvus"] = "milvus"
    uri: str = "http://localhost:19530"
    """of a server, or a path that ends in .db: milvus-lite, for one process at a time"""
    kind: Literal["hnsw", "flat"] = "hnsw"
    """flat: exact"""
    links: StrictInt = Field(default=32, ge=2, le=2048)
    """hnsw: neighbours of a node"""
    ef_construction: StrictInt = Field(default=200, ge=1)
    """hnsw: candidates kept while a node's neighbours are chosen"""
    ef_search: StrictInt = Field(default=64, ge=1)
    """hnsw: candidates kept while searching"""

    @field_validator("uri")
    @classmethod
    def _without_secret(cls, uri: str) -> str:
        if "@" in uri:
            raise ValueError(f"a secret in uri would be written into files; set {TOKEN}")
        if "://" not in uri and not uri.endswith(".db"):
            raise ValueError(f"{uri!r} is neither a URL nor a path that ends in .db")
        return uri

    @property
    def exact(self) -> bool:
        return self.kind == "flat"

    def collection(self, name: str) -> Collection:
        return _Collection(self, name)


class _Collection(Collection):
    def __init__(self, backend: Milvus, name: str) -> None:
        super().__init__(name)
        self.outlives = "://" in backend.uri  # a file's server is a thread of this process
        pymilvus, rpc_error = import_pymilvus(lite=not self.outlives)
        self.where = f"Milvus at {backend.uri}"
        self._backend = backend
        self._types = pymilvus.DataType
        self._errors = (pymilvus.MilvusException, rpc_error, OSError, ValueError)
        with one_line(self.where, self._errors):
            self._client: Any = pymilvus.MilvusClient(
                backend.uri, token=os.environ.get(TOKEN, ""), timeout=PATIENCE
            )

    def create(self, dimension: int) -> None:
        with one_line(self.where, self._errors):
            schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field(ROW, self._types.INT64, is_primary=True)
            schema.add_field(VECTOR, self._types.FLOAT_VECTOR, dim=dimension)
            self._client.create_collection(self.name, schema=schema, consistency_level="Strong")

    def add(self, first: int, block_MD: np.ndarray) -> None:
        step = max(1, (4 << 20) // block_MD.shape[1])  # 16 MiB a request
        with one_line(self.where, self._errors):
            for start in range(0, len(block_MD), step):
                part = block_MD[start : start + step]
                rows = [{ROW: first + start + i, VECTOR: v} for i, v in enumerate(part)]
                self._client.insert(self.name, rows)

    def publish(self) -> None:
        with one_line(self.where, self._errors):
            self._client.flush(self.name)
            how = self._client.prepare_index_params()
            sizes = {"M": self._backend.links, "efConstruction": self._backend.ef_construction}
            params = {} if self._backend.exact else sizes
            kind = self._backend.kind.upper()
            how.add_index(VECTOR, index_type=kind, metric_type="IP", params=params)
            self._client.create_index(self.name, how)
            self._client.load_collection(self.name)

    def size(self) -> tuple[int, int] | None:
        with one_line(self.where, self._errors):
            if not self._client.has_collection(self.name, timeout=ANSWER):
                return None
            self._client.load_collection(self.name)
            fields = self._client.describe_collection(self.name, timeout=ANSWER)["fields"]
            count = self._client.query(self.name, output_fields=["count(*)"], timeout=ANSWER)
        dimension = next(int(f["params"]["dim"]) for f in fields if f["name"] == VECTOR)
        return int(count[0]["count(*)"]), dimension

    def nearest(self, queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        scores_BM, rows_BM = empty(queries_BD, m)
        if m > LARGEST_M or not len(queries_BD):
            return scores_BM, rows_BM  # none: all rows will be looked at
        params = {} if self._backend.exact else {"ef": max(self._backend.ef_search, m)}
        with one_line(self.where, self._errors):
            found = self._client.search(
                self.name,
                data=list(queries_BD),
                anns_field=VECTOR,
                limit=m,
                search_params={"metric_type": "IP", "params": params},
                output_fields=[ROW],
                timeout=ANSWER,
            )
        for scores_M, rows_M, hits in zip(scores_BM, rows_BM, found, strict=True):
            scores_M[: len(hits)] = [hit["distance"] for hit in hits]
            rows_M[: len(hits)] = [hit[ROW] for hit in hits]
        return scores_BM, rows_BM

    def read(self, rows_M: np.ndarray) -> np.ndarray:
        with one_line(self.where, self._errors):
            found = self._client.query(
                self.name, ids=rows_M.tolist(), output_fields=[ROW, VECTOR], timeout=ANSWER
            )
        by_row = {hit[ROW]: hit[VECTOR] for hit in found}
        if len(by_row) != len(rows_M):
            raise UserError(f"{self.where}: collection {self.name} has lost rows")
        return np.array([by_row[row] for row in rows_M.tolist()], dtype=np.float32)

    def drop(self) -> None:
        with one_line(self.where, self._errors):
            if self._client.has_collection(self.name, timeout=ANSWER):
                self._client.drop_collection(self.name, timeout=ANSWER)


def import_pymilvus(lite: bool) -> tuple[Any, type[Exception]]:
    """The pymilvus module and the error of its transport.

    Raises UserError when it, or the milvus-lite that a file needs, is not installed.
    """
    try:
        import pymilvus
        from grpc import RpcError

        if lite:
            import milvus_lite  # noqa: F401
    except ImportError:
        raise UserError("index=milvus needs its client: pip install 'rag2[milvus]'") from None
    # It prints what it also raises, with tracebacks; the one line that is told says it.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    return pymilvus, RpcError
