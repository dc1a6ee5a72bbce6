"""Answers of a system over a living knowledge base: what they cite, and what they agree with."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag2.answering.ask import Ask
from rag2.answering.draft import _shared
from rag2.answering.rag import Rag
from rag2.answering.settings import Reading
from rag2.answering.text import Text
from rag2.evaluation import score
from rag2.evaluation.arms import Found, Reader, evaluate
from rag2.evaluation.questions import load_questions
from rag2.generator.mixture import Mixture, Mixtures
from rag2.generator.pairs import encode_pairs
from rag2.generator.prompt import Prompt
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.retrieval import Dense
from rag2.types import Document, Question
from small_systems import small_system

READINGS: list[Reading] = ["marginal", "token", "concat"]


@pytest.fixture
def system(home: Path, tmp_path: Path, seed: int) -> Iterator[Rag]:
    """Random models over the small world's documents."""
    with small_system(home, tmp_path) as rag:
        yield rag


@pytest.fixture
def questions(home: Path, dice: random.Random) -> list[Question]:
    """Some of the small world's."""
    return dice.sample(load_questions(home / "data" / "questions.jsonl"), 6)


def test_scores_are_those_of_the_harness(system: Rag, questions: list[Question]):
    with KnowledgeBase(system.live.path) as kb:
        chunks = kb.chunks()
    dense = Dense.over(system.encoder, chunks)
    reader = Reader(system.generator, system.settings.prompt, {c.id: c for c in chunks})
    scores_QK, ids_QK = dense.search(questions, 3)
    found = Found(scores_QK.astype(np.float64), ids_QK)
    table = evaluate(questions, found, reader, concat=[3])
    for reading in score.READINGS:
        expected_QC = score.read(table, reading, 3)
        for question, logp_C in zip(questions, expected_QC, strict=True):
            scored = system.score(question.question, question.choices, reading=reading)
            assert scored.logps == pytest.approx(logp_C.tolist(), rel=1e-6, abs=1e-5)
            assert scored.best == int(np.argmax(logp_C))
            if reading == "marginal":
                shares = [citation.posterior for citation in scored.citations]
                assert sum(filter(None, shares)) == pytest.approx(1)


@pytest.mark.parametrize("reading", READINGS)
def test_the_logp_of_an_answer_is_its_score_as_a_choice(
    system: Rag, questions: list[Question], reading: Reading
):
    model, tokenizer = system.generator.model, system.generator.tokenizer
    for question in questions:
        scored = system.score(question.question, question.choices, reading=reading)
        for choice, expected in zip(question.choices, scored.logps, strict=True):
            (draft,) = system.drafts([Ask(question.question, reading=reading)])
            stem = system.settings.prompt.context(question.question, [], tokenizer).text
            ((_, ids),) = encode_pairs(tokenizer, [(stem, f" {choice}")])
            assert sum(forced(model, draft.mixture, ids)) == pytest.approx(expected, abs=1e-4)


def forced(model: Any, mixture: Mixture, tokens: Sequence[int]) -> list[float]:
    """log p of each of these tokens as the mixture writes them."""
    mixtures, steps = Mixtures(model), []
    mixtures.add([mixture])
    for at, token in enumerate(tokens):
        (logp_V,) = mixtures.next()
        steps.append(float(logp_V[token]))
        mixtures.go_on([token], [at == len(tokens) - 1])
    return steps


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_in_company_are_answers_alone(
    system: Rag, questions: list[Question], dice: random.Random, temperature: float
):
    asks = [
        Ask(
            question.question,
            k=dice.choice([None, 0, 1, 4]),
            reading=dice.choice(READINGS),
            max_new_tokens=dice.randint(1, 12),
            temperature=temperature,
            top_p=dice.choice([1.0, 0.8]),
            seed=number,
        )
        for number, question in enumerate(questions)
    ]
    together = system.answers(asks)
    for ask, answer in zip(asks, together, strict=True):
        (alone,) = system.answers([ask])
        assert answer.text == alone.text and answer.tokens == alone.tokens
        assert answer.logps == pytest.approx(alone.logps, rel=1e-6, abs=1e-5)
        assert [c.chunk for c in answer.citations] == [c.chunk for c in alone.citations]
        assert len(answer.citations) + answer.dropped == (3 if ask.k is None else ask.k)


def test_a_stream_adds_up_to_the_answer(system: Rag, questions: list[Question]):
    for question in questions:
        *pieces, answer = system.stream(question.question, max_new_tokens=30)
        assert not isinstance(answer, str)
        assert "".join(map(str, pieces)) == answer.text
        assert answer.text == system.answer(question.question, max_new_tokens=30).text


def test_a_citation_is_the_place_in_the_document(system: Rag, questions: list[Question]):
    with KnowledgeBase(system.live.path) as kb:
        texts = {document.id: document.text for document in kb.documents()}
    for citation in system.answer(questions[0].question).citations:
        assert texts[citation.document][citation.start : citation.end] == citation.text
        assert citation.posterior is not None and 0 <= citation.posterior <= 1


def test_an_added_document_is_read_by_the_next_answer_and_a_removed_one_is_not(system: Rag):
    text = "The lighthouse of Sund is kept by Aksel Brandt."
    system.put([Document("sund", text)])
    cited = system.retrieve("Who keeps the lighthouse of Sund?", k=200)
    assert "sund" in [citation.document for citation in cited]
    before = system.answer("Who keeps it?", max_new_tokens=1).place
    system.remove(["sund"])
    cited = system.retrieve("Who keeps the lighthouse of Sund?", k=200)
    assert "sund" not in [citation.document for citation in cited]
    assert system.answer("Who keeps it?", max_new_tokens=1).place.version == before.version + 1


def test_only_the_namespaces_asked_for_are_read(system: Rag, questions: list[Question]):
    system.put([Document("d", f"Aksel knows number {n}.") for n in range(1)], namespace="a")
    for namespaces, count in ((("a",), 1), (("b",), 0), ((), 0)):
        answer = system.answer(questions[0].question, namespaces=namespaces, max_new_tokens=2)
        assert len(answer.citations) == count
        assert {citation.document for citation in answer.citations} <= {"d"}


@pytest.mark.parametrize("stops", [["\n"], ["\n", "###"], ["Ola", "é🙂"]])
def test_a_text_ends_before_its_first_stop_and_is_told_in_pieces_that_stay(
    system: Rag, dice: random.Random, stops: list[str]
):
    tokenizer = system.generator.tokenizer
    for _ in range(200):
        parts = dice.choices(
            [" Ola", " Nora", "é", "🙂", "#", "##", " ", "42", "\n", "é🙂", "x"], k=9
        )
        wanted, text, told = "".join(parts), Text(tokenizer, stops), ""
        for token in tokenizer.encode(wanted, add_special_tokens=False):
            before = text.whole()
            if not text.add(token):
                assert text.ended and before.startswith(text.whole())
                break
            told += text.news(all=False)
            if text.ended:
                break
        told += text.news(all=True)
        cut = min((at for stop in stops if (at := wanted.find(stop)) >= 0), default=len(wanted))
        assert told == text.whole() == wanted[:cut].strip(), (wanted, told)


def test_the_system_stops_where_it_is_told(system: Rag, questions: list[Question]):
    question = questions[0].question
    long = system.answer(question, max_new_tokens=12)
    told = (token for token in long.tokens if token.isprintable() and token.strip())
    first = next((token for token in told if token in long.text), None)  # no text has <s>
    if first is not None:
        short = system.answer(question, max_new_tokens=12, stop=(first,))
        assert short.finish == "stop" and first not in short.text
        assert long.text.startswith(short.text)


def test_mistakes_are_told(system: Rag):
    for wrong in ({"max_new_tokens": 0}, {"max_new_tokens": 10_000}):
        with pytest.raises(UserError):
            system.answer("Who?", **wrong)
    with pytest.raises(UserError, match="choices"):
        system.score("Who?", [])
    with pytest.raises(UserError, match="budget"):
        system.answer("Who " * 1000)


def test_chunks_without_room_are_not_cited(system: Rag, questions: list[Question], home: Path):
    tight = replace_settings(system, Prompt(budget=60))
    answer = tight.answer(questions[0].question, max_new_tokens=2)
    assert len(answer.citations) + answer.dropped == 3
    read = [citation.posterior for citation in answer.citations]
    assert not read or sum(filter(None, read)) == pytest.approx(1)


def replace_settings(system: Rag, prompt: Prompt) -> Rag:
    """The same system with another prompt."""
    settings = system.settings.model_copy(update={"prompt": prompt})
    return Rag(system.encoder, system.generator, system.live, system.chunker, settings)


def test_what_prompts_of_one_passage_begin_with_is_worth_remembering(
    system: Rag, questions: list[Question]
):
    heads: dict[int, list[int]] = {}
    for question in questions:
        for reading in READINGS:
            (draft,) = system.drafts([Ask(question.question, reading=reading, k=30)])
            (closed,) = system.drafts([Ask(question.question, "Be brief.\n", k=0)])
            assert closed.prompts.heads[0] > 0
            prompts = draft.prompts
            if reading == "concat":
                assert prompts.heads == [0]
                continue
            for ids, cut, at in zip(prompts.contexts, prompts.heads, prompts.read, strict=True):
                assert 0 < cut < len(ids)
                chunk = draft.found[at][0].id
                assert heads.setdefault(chunk, ids[:cut]) == ids[:cut]


def test_the_last_token_of_a_prompt_is_never_remembered():
    assert _shared([5, 6, 7], [5, 6, 7]) == 2
    assert _shared([5, 6, 7], [5, 9]) == 1
