"""Numbers of an answer that a mistake would move: temperature, draws, usage, addresses, state."""

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from exports import exported
from rag2.answering.ask import Answer, Ask, Citation, Place
from rag2.answering.draft import drawer
from rag2.answering.rag import Rag
from rag2.answering.state import State
from rag2.cli.ask import _cited
from rag2.evaluation.questions import load_questions
from rag2.registry import UserError
from rag2.serve import replies
from small_systems import small_system

HOT = 0.25


@pytest.fixture
def system(home: Path, tmp_path: Path, seed: int) -> Iterator[Rag]:
    """A system whose p(z|x) has a temperature of its own."""
    with small_system(home, tmp_path, temperature=HOT) as rag:
        yield rag


@pytest.fixture
def question(home: Path, dice: random.Random) -> str:
    """One of the small world's."""
    return dice.choice(load_questions(home / "data" / "questions.jsonl")).question


def test_the_prior_of_chunks_is_the_softmax_of_scores_over_the_temperature(
    system: Rag, question: str
):
    found = system.retrieve(question, 3)
    heated = np.array([cited.score for cited in found]) / HOT
    expected = np.exp(heated - heated.max()) / np.exp(heated - heated.max()).sum()
    assert [cited.posterior for cited in found] == pytest.approx(expected.tolist(), abs=1e-9)
    (draft,) = system.drafts([Ask(question)])
    assert draft.mixture.log_weights_S.exp().tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 0.4), (0.7, 0.8)])
def test_draws_have_the_probabilities_of_the_heated_nucleus(
    seed: int, temperature: float, top_p: float
):
    logp_V = torch.randn(8).double().log_softmax(0)
    p_V, order_V = (logp_V / temperature).softmax(0).sort(descending=True)
    kept = int((p_V.cumsum(0) - p_V < top_p).sum())
    draws = [
        drawer(Ask("?", temperature=temperature, top_p=top_p, seed=seed + n))(logp_V)
        for n in range(4000)
    ]
    counts = Counter(draws)
    assert set(counts) <= set(order_V[:kept].tolist())
    expected = (p_V[:kept] / p_V[:kept].sum() * len(draws)).tolist()
    observed = [counts[token] for token in order_V[:kept].tolist()]
    assert kept == 1 or chisquare(observed, expected).pvalue > 1e-6


@pytest.mark.parametrize("temperature", [1e-310, 5e-324, 1e-12])
def test_the_smallest_temperature_draws_the_likeliest(seed: int, temperature: float):
    logp_V = torch.randn(50).double().log_softmax(0)
    assert drawer(Ask("?", temperature=temperature, seed=seed))(logp_V) == int(logp_V.argmax())


def answer(text: str, shares: list[float | None], tokens: int, prompt: int) -> Answer:
    """An answer from as many chunks."""
    cited = [
        Citation(n, "k&" * (n == 2), f"a b/{n}", "", 10 * n, 10 * n + 7, 1.0, share, "")
        for n, share in enumerate(shares)
    ]
    words = ("x",) * tokens
    return Answer(text, tuple(cited), words, (-1.0,) * tokens, "stop", prompt, 0, Place("", 0, 0))


def test_annotations_are_the_chunks_with_an_equal_share_or_more_the_best_first():
    noted = replies.annotations(answer("harbour", [0.2, 0.5, 0.3, 0.0], 2, 9))
    found = [note["url_citation"] for note in noted]
    assert [note["url"] for note in found] == [
        "/v1/documents/a%20b%2F1#char=10,17",
        "/v1/documents/a%20b%2F2?namespace=k%26#char=20,27",
    ]
    assert all((note["start_index"], note["end_index"]) == (0, 7) for note in found)
    assert len(replies.annotations(answer("x", [None, None], 1, 9))) == 2


def test_usage_counts_every_choice_and_the_prompt_once():
    used = replies.usage([answer("x", [1.0], 3, 20), answer("y", [1.0], 5, 20)])
    assert used == {"prompt_tokens": 20, "completion_tokens": 8, "total_tokens": 28}


@pytest.mark.parametrize(
    "wrong",
    [
        {"reading": "Marginal"},
        {"temperature": -1},
        {"top_p": 0},
        {"k": -1},
        {"max_tokens": 3},
        {"seed": -1},
    ],
)
def test_a_wrong_wish_is_told_in_a_line(system: Rag, wrong: dict):
    with pytest.raises(UserError, match=next(iter(wrong))) as told:
        system.answer("Who?", **wrong)
    assert "\n" not in str(told.value)


def test_tokens_are_told_with_their_places_in_the_text_and_their_bytes():
    tokens = (" K", "ir", "<s>", "ro\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}", " ir")
    made = replace(answer("Kirro\u00e9 ir", [1.0], 6, 9), tokens=tokens)
    places = replies.completion_logprobs(made)["text_offset"]
    assert places == [0, 1, 3, 3, 3, 6]
    told = [one["bytes"] for one in replies.chat_logprobs(made)["content"]]
    assert told == [
        [*token.encode()] if "\N{REPLACEMENT CHARACTER}" not in token else None for token in tokens
    ]


def test_empty_questions_and_a_text_for_choices_are_refused(system: Rag):
    for call in (
        lambda: system.answer(" "),
        lambda: system.retrieve(""),
        lambda: system.retrieve("a", k=0),  # a closed book retrieves nothing
        lambda: system.score("", ["a"]),
        lambda: system.score("a", "bc"),
    ):
        with pytest.raises(UserError):
            call()


def test_scores_beyond_a_bound_are_refused_before_they_are_computed(system: Rag):
    with pytest.raises(UserError, match="allowed"):
        system.score("Who?", ["Ola " * 200] * 64, k=3)


def test_a_state_is_bound_to_its_export_and_held_by_one(home: Path, tmp_path: Path):
    one = exported(home, tmp_path / "one")
    other = exported(home, tmp_path / "other", index="torch")
    state = State(tmp_path / "state", one)
    with pytest.raises(UserError, match="in use"):
        State(tmp_path / "state", one)
    state.close()
    with pytest.raises(UserError, match="another export"):
        State(tmp_path / "state", other)
    State(tmp_path / "state", one).close()
    (tmp_path / "link").symlink_to(one.directory)
    with pytest.raises(UserError, match="inside the export"):
        State(tmp_path / "link" / "state", one)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="thesis.txt"):
        State(tmp_path / "mine", one)
    shutil.rmtree(tmp_path / "state")


def test_the_command_names_the_namespace_of_a_cited_document():
    lines = _cited(answer("x", [0.2, 0.5, 0.3], 1, 9))
    assert [line.split("#")[-1].split()[:3] for line in lines] == [
        ["a", "b/1", "[10:17]"],
        ["k&:", "a", "b/2"],
        ["a", "b/0", "[0:7]"],
    ]
