"""How stale an index is: nothing at first, more as the encoder moves, and as computed by hand."""

import numpy as np
import pytest

from rag2.reindex.staleness import Probe, Staleness
from rag2.reindex.store import Store
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk
from small_world import roughen

pytestmark = pytest.mark.usefixtures("seed")


def test_staleness_is_nothing_at_first_and_grows_as_the_weights_move(
    store: Store, chunks: list[Chunk], encoder: DualEncoder
):
    made = store.build(0, 0)
    asked = [" ".join(chunk.text.split()[:6]) for chunk in chunks[:40]]
    probe = Probe(Staleness(questions=8, found=12, k=4), asked)
    assert probe.questions == asked[:8]
    first = probe.measure(encoder, made)
    assert first == {"drift": pytest.approx(0, abs=1e-5), "overlap": 1.0}
    drifts, overlaps = [], []
    for _ in range(5):
        roughen(encoder.towers, 0.005)
        found = probe.measure(encoder, made)
        drifts.append(found["drift"])
        overlaps.append(found["overlap"])
    assert 0 < drifts[0] < drifts[-1] <= 2 and 0 <= min(overlaps) < 1
    assert [step for step in range(60) if probe.due(step)] == [24, 49]
    assert not any(Probe(Staleness(every=0), asked).due(step) for step in range(99))


def test_drift_and_overlap_are_those_of_a_computation_by_hand(
    store: Store, chunks: list[Chunk], encoder: DualEncoder
):
    made = store.build(0, 0)
    roughen(encoder.towers, 0.02)
    asked = [" ".join(chunk.text.split()[:6]) for chunk in chunks[:3]]
    got = Probe(Staleness(questions=3, found=len(chunks), k=5), asked).measure(encoder, made)
    old = made.index.vectors(np.arange(len(chunks)))
    new = embed_corpus(encoder, [chunk.passage for chunk in chunks])
    cosine = (old * new).sum(1) / np.linalg.norm(old, axis=1) / np.linalg.norm(new, axis=1)
    assert got["drift"] == pytest.approx(1 - cosine.mean(), abs=1e-5)
    questions = embed_corpus(encoder, asked, side="question")
    best = [np.argsort(-(questions @ rows.T), axis=1)[:, :5] for rows in (old, new)]
    shared = [len({*a} & {*b}) / 5 for a, b in zip(*(rows.tolist() for rows in best), strict=True)]
    assert got["overlap"] == pytest.approx(np.mean(shared))
