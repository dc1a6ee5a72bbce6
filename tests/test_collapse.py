"""Collapses of a retriever are noticed, healthy ones are left in peace."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rag2.index.flat import Flat
from rag2.registry import UserError
from rag2.reindex.collapse import Guard, Health, Watchdog
from rag2.reindex.live import LiveIndex
from rag2.reindex.policy import SyncRefresh
from rag2.reindex.store import Store
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk
from small_world import roughen

CHUNKS, QUESTIONS, WIDTH = 600, 120, 48


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def world(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Chunks around themes, as a corpus is, and questions near one chunk each."""
    themes = rng.normal(size=(30, WIDTH))
    chunks = unit(themes[rng.integers(30, size=CHUNKS)] + 0.8 * rng.normal(size=(CHUNKS, WIDTH)))
    near = chunks[rng.integers(CHUNKS, size=QUESTIONS)]
    return chunks, unit(near + 0.1 * rng.normal(size=near.shape))


def health(chunks: np.ndarray, questions: np.ndarray) -> Health:
    return Health.of(chunks, np.argsort(-(questions @ chunks.T), axis=1)[:, :10], CHUNKS)


def cone(rng: np.random.Generator, chunks: np.ndarray, questions: np.ndarray) -> list[np.ndarray]:
    """Everything points nearly one way."""
    axis = 3 * unit(rng.normal(size=(1, WIDTH)))
    return [unit(chunks + axis), unit(questions + axis)]


def flat(rng: np.random.Generator, chunks: np.ndarray, questions: np.ndarray) -> list[np.ndarray]:
    """Everything lies in three dimensions."""
    plane = rng.normal(size=(WIDTH, 3)) @ rng.normal(size=(3, WIDTH))
    return [unit(chunks @ plane), unit(questions @ plane)]


def hub(rng: np.random.Generator, chunks: np.ndarray, questions: np.ndarray) -> list[np.ndarray]:
    """One chunk lies in the middle of most questions."""
    middle = unit(rng.normal(size=(1, WIDTH)))
    changed = chunks.copy()
    changed[rng.integers(CHUNKS)] = middle
    pulled = rng.random(QUESTIONS) < 0.7
    return [changed, unit(questions + 4 * middle * pulled[:, None])]


@pytest.mark.parametrize("collapse", [cone, flat, hub])
def test_every_planted_collapse_is_noticed(collapse, rng: np.random.Generator):
    for _ in range(30):
        chunks, questions = world(rng)
        first = health(chunks, questions)
        now = health(*collapse(rng, chunks, questions))
        assert Guard().complaints(first, now), (first, now)


def test_a_healthy_retriever_is_left_in_peace(rng: np.random.Generator):
    for _ in range(30):
        chunks, questions = world(rng)
        first = health(chunks, questions)
        # As training moves it: noise, a turn of the whole space, questions nearer to their chunks.
        turn, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
        noise = 0.3 * rng.normal(size=chunks.shape) / np.sqrt(WIDTH)
        now = health(unit((chunks + noise) @ turn), unit(questions @ turn))
        assert not Guard().complaints(first, now), (first, now)


def test_the_collapse_of_a_real_run_is_noticed_and_its_healthy_generations_are_not():
    # The almanac, seed 2, candidates from an index of every 40 steps alone: validation questions
    # found their chunk among five in 100, 97, 1.5 and 25.5 % of cases.
    first = Health(87.123, 0.069, 0.040, 0.199, 2.055)
    later = [
        Health(67.166, 0.542, 0.040, 0.233, 1.925),
        Health(62.671, 0.363, 0.410, 0.037, 11.053),
    ]
    healthy, collapsed = (Guard().complaints(first, now) for now in later)
    assert not healthy
    assert collapsed == [
        "different chunks among all found 3.7%, at first 19.9%",
        "skewness of finds 11.1, at first 2.1",
    ]


def test_each_detector_notices_its_own_figure_alone():
    healthy = Health(50.0, 0.1, 0.05, 0.2, 2.0)
    planted = {
        "effective_rank": (14.0, "effective rank 14.0, at first 50.0"),
        "mean_cosine": (0.7, "mean cosine 0.70, at first 0.10"),
        "top1_share": (0.6, "60% of the questions find one chunk first"),
        "unique_rate": (0.09, "different chunks among all found 9.0%, at first 20.0%"),
        "skewness": (8.5, "skewness of finds 8.5, at first 2.0"),
    }
    for name, (value, words) in planted.items():
        assert Guard().complaints(healthy, replace(healthy, **{name: value})) == [words]
    hubbed = replace(healthy, top1_share=0.4, skewness=10.0)  # where it began with hubs
    assert not Guard().complaints(hubbed, replace(hubbed, top1_share=0.7, skewness=29.0))


def test_the_figures_are_those_of_their_definitions():
    axes = np.eye(4, dtype=np.float32)
    found = np.array([[0, 1], [0, 2], [3, 0]])
    spread = Health.of(axes, found, 5)
    assert spread.effective_rank == pytest.approx(4) and spread.mean_cosine == pytest.approx(0)
    assert spread.top1_share == pytest.approx(2 / 3) and spread.unique_rate == pytest.approx(4 / 6)
    times = np.array([3, 1, 1, 1, 0])  # N_2 of the five chunks
    moments = [np.mean((times - times.mean()) ** power) for power in (2, 3)]
    assert spread.skewness == pytest.approx(moments[1] / moments[0] ** 1.5)
    assert Health.of(axes, np.array([[0, 1], [2, 3]]), 4).skewness == 0
    same = Health.of(np.tile(axes[:1], (4, 1)), found, 4)
    assert same.effective_rank == pytest.approx(1) and same.mean_cosine == pytest.approx(1)


def test_a_collapsed_generation_warns_or_cuts_once_or_is_not_swapped_in(
    home: Path, tmp_path: Path, chunks: list[Chunk], caplog: pytest.LogCaptureFixture
):
    asked = [" ".join(chunk.text.split()[:8]) for chunk in chunks[:40]]
    for action in ("warn", "cut", "stop"):
        encoder = DualEncoder.load(home / "retriever")
        roughen(encoder.towers, 0.1)  # fresh weights hold all texts for alike
        store = Store(tmp_path / action, chunks, encoder, Flat(device="cpu"), 1, "h")
        watchdog = Watchdog(Guard(action=action), encoder, asked)
        live = LiveIndex(store, SyncRefresh(every=1), check=watchdog.check)
        first = live.generation
        assert "collapsing" not in caplog.text
        for name, weight in encoder.towers.named_parameters():
            if "word_embeddings" in name:
                weight.data.mul_(1e-4)  # all words are one
        live.refresh(0)
        if action != "stop":
            assert live.poll(0) and "the retriever is collapsing (index of step 1)" in caplog.text
            assert watchdog.figures()["mean_cosine"] > 0.9
            caplog.clear()
            assert watchdog.rate == (0.1 if action == "cut" else 1.0)
            again = Watchdog(Guard(action=action), encoder, asked, watchdog.state())
            assert again.rate == watchdog.rate and again.first == watchdog.first
            assert again.figures() == watchdog.figures()
            LiveIndex(store, SyncRefresh(every=1), live.state(), check=again.check)
            assert again.state() == watchdog.state()  # a checkpoint's index is not judged anew
        else:
            with pytest.raises(UserError, match="collapsing .* a lower lr_retriever"):
                live.poll(0)
            assert live.generation is first
