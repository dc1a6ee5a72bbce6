"""Index backends against brute force, FAISS's edges, and generations against damage."""

import numpy as np
import pytest

from nearest import brute_force, generation_of, unit
from rag2.artifact import ArtifactError, follow
from rag2.index import base
from rag2.index.exact import TorchExact
from rag2.index.flat import Flat
from rag2.index.generation import Generation
from rag2.index.hnsw import HNSW
from rag2.index.ivf import IVF
from rag2.index.shards import Shards
from rag2.registry import UserError
from rag2.types import Chunk

BACKENDS = [
    Flat(),
    IVF(nlist=8, nprobe=3),
    HNSW(),
    TorchExact(device="cpu"),
    Shards(count=3),
    Shards(count=7, inner=HNSW()),
]
EXACT = [
    Flat(),
    TorchExact(device="cpu"),
    IVF(nlist=8, nprobe=8),
    Shards(count=3),
    Shards(count=4, inner=IVF(nlist=3, nprobe=3)),
    Shards(count=2, inner=TorchExact(device="cpu")),
]


def kind(backend):
    return "-".join([backend.name, *([backend.inner.name] if backend.name == "shards" else [])])


backends = pytest.mark.parametrize("backend", BACKENDS, ids=kind)
exact_backends = pytest.mark.parametrize("backend", EXACT, ids=kind)


@exact_backends
def test_exact_backends_return_what_brute_force_returns(rng, backend):
    for rows, size, k in [(1, 3, 1), (40, 8, 40), (300, 33, 7), (700, 64, 100)]:
        embeddings, queries = unit(rng, rows, size), unit(rng, 25, size)
        ids = rng.permutation(10 * rows)[:rows]
        scores, found = backend.build(embeddings, ids).search(queries, k)
        expected_scores, expected = brute_force(embeddings, ids, queries, k)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-7)
        assert scores.dtype == np.float32 and found.dtype == np.int64


@exact_backends
def test_equal_scores_are_ordered_by_the_smallest_id_even_across_the_cut(rng, backend):
    # 20 distinct vectors, each stored 30 times: the cut at k falls into a run of equals.
    embeddings = np.repeat(unit(rng, 20, 16), 30, axis=0)
    ids = rng.permutation(5000)[:600]
    queries = unit(rng, 23, 16)
    queries[5] = 0  # everything ties
    for k in (1, 10, 45, 600):
        scores, found = backend.build(embeddings, ids).search(queries, k)
        np.testing.assert_array_equal(found, brute_force(embeddings, ids, queries, k)[1])
        np.testing.assert_array_equal(found[5], np.sort(ids)[:k])


def test_near_ties_beyond_float32_matmul_accuracy_still_find_the_true_best(rng):
    # All vectors in a narrow cone: scores differ by about one unit in the last place.
    embeddings = unit(rng, 1, 64) + 1e-6 * rng.normal(size=(2000, 64)).astype(np.float32)
    ids, queries = np.arange(2000), embeddings[:30] + np.float32(1e-6)
    for backend in (Flat(), TorchExact(device="cpu")):
        found = backend.build(embeddings, ids).search(queries, 5)[1]
        np.testing.assert_array_equal(found, brute_force(embeddings, ids, queries, 5)[1])


def test_scores_do_not_depend_on_the_backend_or_on_the_batch(rng):
    embeddings, queries = unit(rng, 500, 48), unit(rng, 40, 48)
    flat, torch_exact = (b.build(embeddings, np.arange(500)) for b in EXACT[:2])
    together = flat.search(queries, 9)
    alone = zip(*(flat.search(query[None], 9) for query in queries), strict=True)
    for got in (torch_exact.search(queries, 9), [np.concatenate(part) for part in alone]):
        np.testing.assert_array_equal(together[0], got[0])
        np.testing.assert_array_equal(together[1], got[1])


def test_hnsw_finds_95_percent_of_the_nearest_among_2000(rng):
    embeddings, queries = unit(rng, 2000, 32), unit(rng, 100, 32)
    found = HNSW(ef_construction=100).build(embeddings, np.arange(2000)).search(queries, 10)[1]
    truth = brute_force(embeddings, np.arange(2000), queries, 10)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)])
    assert recall >= 0.95


def test_ivf_with_few_cells_searched_trades_recall_and_still_fills_every_list(rng):
    embeddings, queries = unit(rng, 400, 32), unit(rng, 50, 32)
    index = IVF(nlist=100, nprobe=1).build(embeddings, np.arange(400))
    found = index.search(queries, 30)[1]  # a cell holds about 4
    assert (found >= 0).all() and all(len(set(row)) == 30 for row in found)
    truth = brute_force(embeddings, np.arange(400), queries, 1)[1]
    assert (index.search(queries, 1)[1] == truth).mean() < 1


@backends
def test_corpora_of_one_to_five_chunks_work(rng, backend):
    for rows in range(1, 6):
        embeddings = unit(rng, rows, 4)
        found = backend.build(embeddings, np.arange(rows) + 10).search(embeddings, rows)[1]
        assert sorted(found[0]) == list(range(10, 10 + rows))


@backends
def test_a_saved_index_answers_as_before(rng, backend, tmp_path):
    index = backend.build(unit(rng, 200, 16), rng.permutation(900)[:200])
    index.save(tmp_path)
    again = base.load(tmp_path)
    queries = unit(rng, 20, 16)
    for a, b in zip(index.search(queries, 12), again.search(queries, 12), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(again) == 200 and again.backend == backend


@backends
def test_vectors_and_queries_that_are_not_finite_are_refused_by_row(rng, backend):
    for poison in (np.nan, np.inf, -np.inf, 1e300):
        embeddings = unit(rng, 20, 8).astype(np.float64)
        embeddings[13, 2] = poison
        with np.errstate(over="ignore"):
            with pytest.raises(ValueError, match="embedding 13 is not finite"):
                backend.build(embeddings, np.arange(20))
            index = backend.build(unit(rng, 20, 8), np.arange(20))
            with pytest.raises(ValueError, match="query 13 is not finite"):
                index.search(embeddings, 3)


@backends
def test_bad_ids_and_sizes_are_refused_in_one_line(rng, backend):
    vectors = unit(rng, 3, 4)
    for ids, message in [
        ([5, 7, 5], "5 occurs more"),
        ([1, -1, 2], "-1 is neg"),
        ([1, 2], "but 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            backend.build(vectors, np.array(ids))
    with pytest.raises(UserError, match="no chunks"):
        backend.build(vectors[:0], np.array([], dtype=np.int64))
    index = backend.build(vectors, np.arange(3))
    for k in (0, -1, 4, 2**31):
        with pytest.raises(UserError, match=f"k={k} is not between 1 and the 3 chunks"):
            index.search(vectors, k)
    with pytest.raises(ValueError, match="queries have 5 dimensions"):
        index.search(unit(rng, 2, 5), 1)
    assert index.search(vectors[:0], 2)[1].shape == (0, 2)


def test_a_generation_returns_from_disk_with_its_texts_and_its_pointer(rng, tmp_path):
    generation = generation_of(rng)
    generation.save(tmp_path / "000003", pointer=tmp_path / "current")
    current = follow(tmp_path / "current")
    assert current is not None
    again = Generation.load(current, encoder_fingerprint="aa" * 32)
    assert (again.kb_version, again.kb_hash, again.step, len(again)) == (4, "bb", 7, 30)
    for chunk_id in again.ids_N:
        assert again.chunk(chunk_id) == generation.chunk(chunk_id)
        assert again.chunk(chunk_id).text == f"text {chunk_id} é"
    with pytest.raises(KeyError, match="chunk 1001 is not in this generation"):
        again.chunk(1001)
    with pytest.raises(ArtifactError, match="exists"):
        generation.save(tmp_path / "000003")


@backends
def test_a_changed_byte_in_any_file_of_a_generation_is_refused(rng, backend, tmp_path):
    generation_of(rng, backend).save(tmp_path / "g")
    for path in sorted(p for p in (tmp_path / "g").rglob("*") if p.is_file()):
        whole = path.read_bytes()
        place = int(rng.integers(len(whole)))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ArtifactError):
            Generation.load(tmp_path / "g")
        path.write_bytes(whole)
    Generation.load(tmp_path / "g")


def test_a_generation_of_another_encoder_is_refused(rng, tmp_path):
    generation_of(rng, fingerprint="aa" * 32).save(tmp_path / "g")
    with pytest.raises(UserError, match="was embedded by encoder aaaaaaaaaaaa, not cccccccccccc"):
        Generation.load(tmp_path / "g", encoder_fingerprint="cc" * 32)


def test_a_generation_of_other_chunks_than_its_index_is_refused(rng):
    index = Flat().build(unit(rng, 3, 4), np.array([1, 2, 3]))
    for ids in ([1, 2], [1, 2, 4], [1, 3, 2]):
        with pytest.raises(UserError, match="not those of its index"):
            Generation.of(index, [Chunk(i, "d", "t") for i in ids], encoder_fingerprint="")


@backends
def test_an_index_filled_block_by_block_is_the_one_built_at_once(rng, backend):
    embeddings, queries, ids = unit(rng, 500, 16), unit(rng, 20, 16), rng.permutation(900)[:500]
    cuts = np.sort(rng.integers(0, 501, 4))
    parts = base.Blocks(np.split(embeddings, cuts), ids)
    filled, built = backend.fill(parts), backend.build(embeddings, ids)
    rows = np.arange(500)
    np.testing.assert_array_equal(filled.vectors(rows), built.vectors(rows))
    assert filled.max_norm == built.max_norm
    if not kind(backend).endswith("hnsw"):  # the order of insertion is a graph's own
        for a, b in zip(filled.search(queries, 9), built.search(queries, 9), strict=True):
            np.testing.assert_array_equal(a, b)
    for wrong in (embeddings[:-1], np.concatenate([embeddings, embeddings[:1]])):
        with pytest.raises(ValueError, match="embeddings, but 500 chunk ids"):
            backend.fill(base.Blocks(np.array_split(wrong, 7), ids))
    embeddings[321, 3] = np.nan
    with pytest.raises(UserError, match="embedding 321 is not finite"):
        backend.fill(base.Blocks(np.array_split(embeddings, 5), ids))


def test_shards_answer_as_one_flat_index_to_the_bit(rng):
    embeddings = np.repeat(unit(rng, 150, 24), 4, axis=0)  # ties within shards and between them
    embeddings[rng.integers(0, 600, 200)] += 1e-7  # and near-ties
    ids, queries = rng.permutation(5000)[:600], unit(rng, 20, 24)
    queries[3] = 0
    flat = Flat(device="cpu").build(embeddings, ids)
    for count in (1, 2, 7, 599, 600, 1000):
        shards = Shards(count=count).build(embeddings, ids)
        assert shards.exact and len(shards) == 600
        for k in (1, 10, 600):
            for a, b in zip(flat.search(queries, k), shards.search(queries, k), strict=True):
                np.testing.assert_array_equal(a, b)
        rows = rng.integers(0, 600, 50)
        np.testing.assert_array_equal(flat.vectors(rows), shards.vectors(rows))
    assert not Shards(inner=HNSW()).build(embeddings, ids).exact


def test_one_shard_at_a_time_is_filled_from_the_stream(rng):
    embeddings, taken = unit(rng, 100, 4), []

    class Watched(Flat):
        def fill(self, blocks):
            before = len(taken)
            index = super().fill(blocks)
            taken.append(len(index))
            assert len(handed) <= sum(taken) // 10 + 1, "the next shard's rows were read too"
            assert before == len(taken) - 1
            return index

    handed = []

    def blocks():
        for start in range(0, 100, 10):
            handed.append(start)
            yield embeddings[start : start + 10]

    backend = Shards(count=3).model_copy(update={"inner": Watched()})
    index = backend.fill(base.Blocks(blocks(), np.arange(100)))
    assert taken == [33, 33, 34] and len(index) == 100


def test_shards_within_shards_and_unknown_kinds_are_refused():
    for inner in ("shards", "milvus", "flatt"):
        with pytest.raises(ValueError, match="inner"):
            Shards.model_validate({"inner": {"name": inner}})


class Half(TorchExact):
    """Finds its candidates in half precision, and says how far off that may be."""

    def fill(self, blocks):
        index = super().fill(blocks)
        exact = type(index)

        class Rough(exact):
            def candidates(self, queries_BD, m):
                half = self.vectors(np.arange(len(self))).astype(np.float16).astype(np.float32)
                scores_BN = queries_BD @ half.T
                rows_BM = np.argsort(-scores_BN, axis=1, kind="stable")[:, :m]
                return np.take_along_axis(scores_BN, rows_BM, axis=1), rows_BM

            def rounding(self, queries_BD):
                return 3 * 2.0**-10 * np.linalg.norm(queries_BD, axis=1) * self.max_norm

        index.__class__ = Rough
        return index


def test_shards_trust_candidates_no_further_than_the_least_exact_of_them(rng):
    embeddings = unit(rng, 1, 16) + 1e-6 * rng.normal(size=(400, 16))  # all near-ties
    embeddings, queries = embeddings.astype(np.float32), unit(rng, 10, 16)
    shards = Shards(count=3).model_copy(update={"inner": Half()}).build(embeddings, np.arange(400))
    for k in (1, 10):
        found = shards.search(queries, k)
        for a, b in zip(found, brute_force(embeddings, np.arange(400), queries, k), strict=True):
            np.testing.assert_array_equal(a, b)


class Gaps(TorchExact):
    """Pads its lists from the second place on, with scores that mean nothing."""

    def fill(self, blocks):
        index = super().fill(blocks)
        exact = type(index)

        class Padded(exact):
            exact = False

            def candidates(self, queries_BD, m):
                scores_BM, rows_BM = super().candidates(queries_BD, m)
                padded = np.arange(m)[None] % 2 == 1
                return np.where(padded, 1e9, scores_BM), np.where(padded, -1, rows_BM)

        index.__class__ = Padded
        return index


def test_places_that_a_shard_leaves_empty_take_none_from_the_others(rng):
    embeddings, queries = unit(rng, 200, 8), unit(rng, 10, 8)
    shards = Shards(count=4).model_copy(update={"inner": Gaps()}).build(embeddings, np.arange(200))
    scores_BM, rows_BM = shards.candidates(queries, 20)
    assert (rows_BM >= 0).all() and (np.diff(scores_BM, axis=1) <= 0).all()
    first = np.take_along_axis(queries @ embeddings.T, rows_BM, axis=1)
    np.testing.assert_allclose(scores_BM, first, rtol=1e-5)
