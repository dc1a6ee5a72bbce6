"""Facts that change: the documents that state the new ones, and what is asked about them.

Made of test questions, whose evidence is told to state another choice, read from files, or what a
later edition of a world's documents says.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rag2.evaluation import counterfactual
from rag2.evaluation.questions import load_questions, question_of, with_choices
from rag2.kb.read import read
from rag2.kb.rows import document
from rag2.registry import UserError
from rag2.types import Chunk, Document, Question
from rag2.worlds.factbook_revisions import Later

STALE = "stale"  # in a question's metadata: the choice that was right before
ONLY = "update"  # the name of a revision that is the only one


@dataclass(frozen=True, slots=True)
class Revision:
    """New versions of documents; questions that they answer anew, and questions that stay."""

    documents: Sequence[Document]
    changed: Sequence[Question]
    """`answer` is the new one, `metadata.stale` the choice that was right before"""
    unchanged: Sequence[Question]
    removed: Sequence[str] = ()
    """ids of documents that are no longer there"""
    name: str = ONLY


def made(
    questions: Sequence[Question],
    gold: Mapping[str, Sequence[int]],
    chunks: Sequence[Chunk],
    documents: Mapping[str, Document],
    count: int,
) -> Revision:
    """Change the facts that the first `count` questions ask for, as `counterfactual.plan` can.

    No document is changed twice, so all changes hold at once. `gold` names the chunks that answer a
    question. Raises UserError where fewer facts can be changed.
    """
    planned, _ = counterfactual.plan(questions, gold, chunks, documents)
    together = counterfactual.turns(planned)
    chosen = together[0][:count] if together else []
    if len(chosen) < count:
        raise UserError(
            f"edits={count}: of {len(questions)} test questions only {len(chosen)} ask for facts "
            "that can be changed together"
        )
    new: list[Document] = []
    changed: list[Question] = []
    for row in chosen:
        old, value = row.question.gold, row.question.choices[row.target]
        for id in row.documents:
            text, _ = counterfactual.replaced(documents[id].text, old, value)
            new.append(replace(documents[id], text=text))
        metadata = row.question.metadata | {STALE: row.question.answer}
        changed.append(replace(row.question, answer=row.target, metadata=metadata))
    texts = {id: d.text for id, d in documents.items()} | {d.id: d.text for d in new}
    asked_anew = {question.id for question in changed}
    kept = [
        question
        for question in questions
        if question.id not in asked_anew
        # A change may have gone through this question's answer, too.
        and all(
            counterfactual.stated(question.gold, texts[id])
            == counterfactual.stated(question.gold, documents[id].text)
            for id in question.evidence
            if id in texts
        )
    ]
    return Revision(new, changed, kept)


def given(updates: Path, changed: Path, unchanged: Sequence[Question]) -> Revision:
    """The revision of two files: documents, and questions with `metadata.stale`.

    Raises UserError for a row of the first that is no document, for one of the second whose stale
    answer is no other of its choices, and where one of them has none.
    """
    documents = []
    for place, item in read(updates):
        if isinstance(item, str):
            raise UserError(f"updates={updates}: {place}: {item}")
        documents.append(item)
    questions = with_choices(load_questions(changed), changed)
    twice = [id for id, count in Counter(d.id for d in documents).items() if count > 1]
    if twice:
        raise UserError(f"updates={updates}: document {twice[0]!r} is given twice")
    if not documents or not questions:
        empty = updates if not documents else changed
        raise UserError(f"{empty} is empty: nothing changes")
    for question in questions:
        stale = question.metadata.get(STALE)
        others = [n for n in range(len(question.choices)) if n != question.answer]
        if isinstance(stale, bool) or stale not in others:
            raise UserError(
                f"changed={changed}: question {question.id!r}: metadata.stale={stale!r} must be "
                f"the index of the choice that was right before, one of {others}"
            )
    asked_anew = {question.id for question in questions}
    return Revision(documents, questions, [q for q in unchanged if q.id not in asked_anew])


def dated(later: Iterable[Later], count: int) -> list[Revision]:
    """What each edition changes after the one before it, with the first `count` changed questions.

    Raises UserError for an edition that changes fewer of the facts asked for, or none that stays.
    """
    found = []
    for news in later:
        if len(news.changed) < count or not news.unchanged:
            raise UserError(
                f"edits={count}: edition {news.edition!r} changes {len(news.changed)} of the facts "
                f"that are asked for, and leaves {len(news.unchanged)}"
            )
        place = f"edition {news.edition}"
        found.append(
            Revision(
                [document(place, row) for row in news.documents],
                [question_of(row, place) for row in news.changed[:count]],
                [question_of(row, place) for row in news.unchanged],
                news.removed,
                news.edition,
            )
        )
    return found
