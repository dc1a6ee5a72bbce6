"""Settings of indexes on a server that can be refused without one."""

import sys

import numpy as np
import pytest

from nearest import unit
from rag2.index.milvus import Milvus
from rag2.index.pgvector import PGVector
from rag2.index.remote import Remote
from rag2.registry import UserError


@pytest.mark.parametrize(
    ("module", "backend"),
    [("pymilvus", Milvus()), ("milvus_lite", Milvus(uri="x.db")), ("psycopg", PGVector())],
    ids=["pymilvus", "milvus_lite", "psycopg"],
)
def test_a_missing_extra_is_named(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, module: str, backend: Remote
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'rag2\[{backend.name}\]'"):  # type: ignore[attr-defined]
        backend.build(unit(rng, 3, 4), np.arange(3))


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (Milvus, {"uri": "http://me:secret@host:19530"}, "MILVUS_TOKEN"),
        (Milvus, {"uri": "localhost:19530"}, "neither a URL nor"),
        (PGVector, {"dsn": "postgresql://me:secret@host/db"}, "PGPASSWORD"),
        (PGVector, {"dsn": "host=h password=secret"}, "PGPASSWORD"),
        (PGVector, {"links": 40}, "at least 2 links = 80"),
    ],
)
def test_secrets_and_impossible_settings_are_refused(cls, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        cls.model_validate(settings)
