"""Questions and a knowledge base -> the same base with one fact changed for each question.

What a system then answers shows whether it reads: it follows the edit, or it is stuck at what it
knew. The edits go through a copy of the knowledge base; the original is only read.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rag2.evaluation.arms import Found
from rag2.kb.store import KnowledgeBase
from rag2.retrieval import Dense, Retriever
from rag2.retriever.embed import embed_corpus
from rag2.types import Chunk, Document, Question

Span = tuple[int, int]
# Why a question has no edit.
NO_EVIDENCE = "no evidence in the corpus"
NOT_STATED = "no evidence states the answer word for word"
IN_TITLE = "a title of the evidence states the answer"
NO_OTHER = "the evidence mentions every other choice"


@dataclass(frozen=True, slots=True)
class Planned:
    """The choice that a question's evidence shall state instead of the right one."""

    question: Question
    target: int
    documents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Edit:
    """A question, the choice its evidence now states, and the chunk that stands for each old one.

    `chunks` has the edited documents' chunks that changed.
    """

    question: Question
    target: int
    chunks: Mapping[int, Chunk]


def edit(
    kb: Path, folder: Path, questions: Sequence[Question], gold: Mapping[str, Sequence[int]]
) -> tuple[list[Edit], dict[str, int]]:
    """Change the fact behind each question in a copy of `kb` in `folder`, one at a time.

    `gold` names the chunks that answer a question. The right answer is replaced, as whole words, in
    every document of these that states it, by the next choice that none of them mentions; the
    documents are removed and added again, cut where they were. A document that several questions
    ask about is changed for one after the other, each time from the original. Also returns how many
    questions have no edit, by reason.
    """
    copy = folder / kb.name
    with KnowledgeBase(kb) as source:
        source.copy(copy)
    with KnowledgeBase(copy) as base:
        chunks = base.chunks()
        documents = {document.id: document for document in base.documents()}
        planned, left_out = plan(questions, gold, chunks, documents)
        cut = _by_document(chunks)
        edits = [row for turn in turns(planned) for row in _apply(base, turn, documents, cut)]
    place = {question.id: number for number, question in enumerate(questions)}
    return sorted(edits, key=lambda row: place[row.question.id]), left_out


def plan(
    questions: Sequence[Question],
    gold: Mapping[str, Sequence[int]],
    chunks: Sequence[Chunk],
    documents: Mapping[str, Document],
) -> tuple[list[Planned], dict[str, int]]:
    """What to change for each question, and how many cannot be, by reason."""
    owner = {chunk.id: chunk.document for chunk in chunks}
    planned: list[Planned] = []
    left_out = Counter[str]()
    for question in questions:
        ids = dict.fromkeys(owner[i] for i in gold.get(question.id, ()) if i in owner)
        evidence = [documents[id] for id in ids]
        stating = [d for d in evidence if stated(question.gold, d.text)]
        others = [*range(question.answer + 1, len(question.choices)), *range(question.answer)]
        free = [
            i
            for i in others
            if not stated(question.gold, question.choices[i])
            and not any(stated(question.choices[i], f"{d.title}\n{d.text}") for d in evidence)
        ]
        if not evidence:
            left_out[NO_EVIDENCE] += 1
        elif not stating:
            left_out[NOT_STATED] += 1
        elif any(stated(question.gold, d.title) for d in evidence):
            left_out[IN_TITLE] += 1
        elif not free:
            left_out[NO_OTHER] += 1
        else:
            planned.append(Planned(question, free[0], tuple(d.id for d in stating)))
    return planned, dict(left_out)


def stated(value: str, text: str) -> bool:
    """Whether the text holds the value as whole words, in any case of letters."""
    return bool(_whole(value).search(text))


def replaced(text: str, old: str, new: str) -> tuple[str, Callable[[int], int]]:
    """The text with every `old` replaced, and where each place of the old text is in the new one.

    A capital letter where `old` began with one at the start of a sentence stays one. A place inside
    an `old` moves to its end.
    """
    spans = [match.span() for match in _whole(old).finditer(text)]

    def put(match: re.Match[str]) -> str:
        raised = match[0][:1].isupper() and old[:1].islower()
        return new[:1].upper() + new[1:] if raised else new

    def moved(place: int) -> int:
        before = [end - start for start, end in spans if start < place]
        inside = max((end - place for start, end in spans if start < place < end), default=0)
        return place + inside + sum(len(new) - length for length in before)

    return _whole(old).sub(put, text), moved


def edited_found(
    edits: Sequence[Edit],
    found: Found,
    retriever: Retriever | None,
) -> tuple[Found, np.ndarray]:
    """The chunks found for the edits' questions with the edited ones in their places, and whether
    any is among them [Q].

    A dense retriever scores an edited chunk by its new embedding. Of others the score stays: the
    words of the question are the same in both.
    """
    ids_QK, scores_QK = found.ids_QK.copy(), found.scores_QK.copy()
    places = [
        (row, column, edit.question.question, edit.chunks[chunk])
        for row, edit in enumerate(edits)
        for column, chunk in enumerate(found.ids_QK[row].tolist())
        if chunk in edit.chunks
    ]
    for row, column, _, chunk in places:
        ids_QK[row, column] = chunk.id
    if isinstance(retriever, Dense) and places:
        rows, columns, asked, chunks = zip(*places, strict=True)
        scores_QK[list(rows), list(columns)] = scored(
            retriever, asked, [chunk.passage for chunk in chunks]
        )
    touched_Q = np.zeros(len(edits), dtype=bool)
    touched_Q[[row for row, *_ in places]] = True
    return Found(scores_QK, ids_QK), touched_Q


def scored(dense: Dense, questions: Sequence[str], passages: Sequence[str]) -> np.ndarray:
    """The score of each question with its own passage, as a search would give it."""
    queries_PD = embed_corpus(dense.encoder, questions, side="question")
    passages_PD = embed_corpus(dense.encoder, passages)
    return (queries_PD * passages_PD).sum(axis=1) * float(dense.encoder.scale.detach())


@dataclass(frozen=True, slots=True)
class _Cuts:
    """A chunker that cuts given documents at given places: an edit is not to move the others."""

    fingerprint: str
    spans: Mapping[str, list[Span]]

    def model_dump_json(self) -> str:
        return "{}"

    def __call__(self, document: Document) -> list[Span]:
        return self.spans[document.id]


def turns(planned: Sequence[Planned]) -> list[list[Planned]]:
    """Edits that can be made together: no two of a turn change one document."""
    found: list[list[Planned]] = []
    taken: list[set[str]] = []
    for row in planned:
        at = next((i for i, used in enumerate(taken) if used.isdisjoint(row.documents)), None)
        if at is None:
            at = len(found)
            found.append([])
            taken.append(set())
        found[at].append(row)
        taken[at].update(row.documents)
    return found


def _apply(
    base: KnowledgeBase,
    turn: Sequence[Planned],
    documents: Mapping[str, Document],
    chunks: Mapping[str, Sequence[Chunk]],
) -> list[Edit]:
    """Make the edits of a turn; `documents` and their `chunks` are the original ones."""
    changed: list[Document] = []
    spans: dict[str, list[Span]] = {}
    for row in turn:
        for id in row.documents:
            new = row.question.choices[row.target]
            text, moved = replaced(documents[id].text, row.question.gold, new)
            changed.append(replace(documents[id], text=text))
            spans[id] = [(moved(chunk.start), moved(chunk.end)) for chunk in chunks[id]]
    assert base.chunker_fingerprint is not None, "a knowledge base with chunks knows what cut them"
    base.remove(spans)
    base.add(changed, _Cuts(base.chunker_fingerprint, spans))
    made = _by_document(base.chunks())
    edits = []
    for row in turn:
        pairs = [
            (old, new)
            for id in row.documents
            for old, new in zip(chunks[id], made[id], strict=True)
            if old.text != new.text
        ]
        answer, value = row.question.gold, row.question.choices[row.target]
        assert any(stated(value, new.text) for _, new in pairs), (row.question.id, value)
        assert not any(stated(answer, new.text) for _, new in pairs), (row.question.id, answer)
        edits.append(Edit(row.question, row.target, {old.id: new for old, new in pairs}))
    return edits


def _by_document(chunks: Sequence[Chunk]) -> dict[str, list[Chunk]]:
    found: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        found.setdefault(chunk.document, []).append(chunk)
    return found


def _whole(value: str) -> re.Pattern[str]:
    # "12" is neither in "120" nor in "12.5".
    value = re.escape(value)
    return re.compile(rf"(?<!\w)(?<!\d[.,]){value}(?!\w)(?![.,]\d)", re.IGNORECASE)
