"""What there is room for: passages leave the answer its positions, prompts are read once."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rag2.answering.ask import Ask
from rag2.answering.rag import Rag
from rag2.answering.settings import Reading
from rag2.evaluation.questions import load_questions
from rag2.generator.pairs import positions
from rag2.generator.past import Past
from rag2.types import Question
from small_systems import small_system


@pytest.fixture
def system(home: Path, tmp_path: Path, seed: int) -> Iterator[Rag]:
    """Random models over the small world's documents, with more budget than positions."""
    with small_system(home, tmp_path) as rag:
        prompt = rag.settings.prompt.model_copy(update={"budget": 4096})
        rag.settings = rag.settings.model_copy(update={"prompt": prompt})
        yield rag


@pytest.fixture
def question(home: Path, dice: random.Random) -> Question:
    """One of the small world's."""
    return dice.choice(load_questions(home / "data" / "questions.jsonl"))


@pytest.mark.parametrize("wanted", [None, 1, 100])
def test_passages_are_dropped_to_leave_the_answer_its_positions(
    system: Rag, question: Question, wanted: int | None
):
    limit = positions(system.generator.model)
    assert limit is not None
    answer = system.answer(question.question, k=40, reading="concat", max_new_tokens=wanted)
    room = system.settings.max_new_tokens if wanted is None else wanted
    assert answer.dropped > 0 and len(answer.citations) == 40 - answer.dropped
    assert answer.prompt_tokens <= limit - room + 1
    (draft,) = system.drafts([Ask(question.question, k=40, reading="concat")])
    (next_one,) = system.drafts([Ask(question.question, k=40 - answer.dropped, reading="concat")])
    assert draft.prompts.dropped or next_one.prompts.contexts == draft.prompts.contexts
    scored = system.score(question.question, question.choices, k=40, reading="concat")
    assert all(logp < 0 for logp in scored.logps)


def test_a_question_that_leaves_little_room_is_answered_in_less(system: Rag):
    limit = positions(system.generator.model)
    tokenizer, question = system.generator.tokenizer, "Who"
    while len(tokenizer.encode(f"Question: {question}\nAnswer:")) < (limit or 0) - 8:
        question += " a"
    answer = system.answer(question, k=3)
    assert answer.dropped == 3 and 0 < len(answer.tokens) <= 9


@pytest.mark.parametrize("reading", ["marginal", "token"])
def test_scoring_many_choices_reads_every_prompt_once(
    system: Rag, question: Question, reading: Reading, monkeypatch: pytest.MonkeyPatch
):
    read: list[int] = []
    plain = Past.read

    def counted(self: Past, model: Any, ids: Any, rows: Any = None) -> Any:
        read.append(sum(map(len, ids)))
        return plain(self, model, ids, rows)

    monkeypatch.setattr(Past, "read", counted)
    counts = []
    for choices in (question.choices[:1], [f"{text} {n}" for n in range(9) for text in "ab"]):
        read.clear()
        system.score(question.question, choices, k=5, reading=reading)
        counts.append(sum(read))
    assert counts[0] == counts[1] > 0


def test_a_question_is_searched_with_its_own_k_whoever_is_beside_it(
    system: Rag, question: Question, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[int, int]] = []
    search = system.search

    def noted(questions: Any, k: int, namespaces: Any) -> Any:
        asked.append((len(questions), k))
        return search(questions, k, namespaces)

    monkeypatch.setattr(system, "search", noted)
    system.drafts([Ask(question.question, k=k) for k in (2, 7, 2, None, 0)])
    assert sorted(asked) == [(1, system.settings.k), (1, 7), (2, 2)]
