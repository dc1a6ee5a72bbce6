"""A data set's own files -> questions.jsonl and documents.jsonl, whole or not at all."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rag2 import artifact
from rag2.evaluation.questions import question_of, to_row
from rag2.evaluation.tasks.source import Item, existing
from rag2.kb.clean import clean, is_blank
from rag2.kb.ingest import Reject
from rag2.registry import UserError, lookup
from rag2.types import Document, Question


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of a data set: accepted + rejected = total."""

    questions: list[Question]
    documents: list[Document]
    rejected: list[Reject]

    @property
    def accepted(self) -> int:
        """Questions and documents."""
        return len(self.questions) + len(self.documents)

    @property
    def total(self) -> int:
        """Everything that was looked at."""
        return self.accepted + len(self.rejected)


def write(name: str, source: Path | str, out: Path | str) -> Summary:
    """Write the task's files to the new directory `out`; what is rejected is in the summary.

    A set without questions, or without documents, has no such file. Raises UserError for an unknown
    name, a source that lacks files, an `out` that exists, and when nothing was accepted.
    """
    read = lookup("task", name)
    source = existing(Path(source))
    with artifact.committing(out, kind="task", meta={"task": name}) as staging:
        summary = collect(read(source))
        if not summary.accepted:
            raise UserError(_nothing(name, source, summary.rejected))
        _write_rows(staging / "questions.jsonl", [to_row(q) for q in summary.questions])
        _write_rows(staging / "documents.jsonl", [asdict(d) for d in summary.documents])
    return summary


def collect(items: Iterable[Item]) -> Summary:
    """The items that are good: ids used once, evidence that exists, rows that `questions` takes."""
    documents: dict[str, tuple[str, Document]] = {}
    questions: dict[str, tuple[str, Question]] = {}
    rejected: list[Reject] = []
    for place, item in items:
        try:
            if isinstance(item, str):
                raise UserError(item)
            if isinstance(item, Document):
                _add(documents, place, _checked(item))
            else:
                _add(questions, place, _parsed(item, place))
        except UserError as reason:
            rejected.append(Reject(place, str(reason)))
    for id, (place, question) in list(questions.items()):
        if lost := [name for name in question.evidence if name not in documents]:
            rejected.append(Reject(place, f"evidence {lost[0]!r} is no document of this set"))
            del questions[id]
    return Summary(
        [question for _, question in questions.values()],
        [document for _, document in documents.values()],
        rejected,
    )


def _add(known: dict[str, tuple[str, Any]], place: str, item: Document | Question) -> None:
    if item.id in known:
        raise UserError(f"duplicate id {item.id!r}, first used at {known[item.id][0]}")
    known[item.id] = place, item


def _checked(document: Document) -> Document:
    """The document as the knowledge base will hold it."""
    _check_text(asdict(document))
    text = clean(document.text)
    if is_blank(text):
        raise UserError("no text")
    return Document(document.id, text, document.title, document.metadata)


def _parsed(row: Mapping[str, Any], place: str) -> Question:
    _check_text(row)
    try:
        return question_of(row, place)
    except UserError as error:
        raise UserError(str(error).removeprefix(f"{place}: ")) from None


def _check_text(row: Mapping[str, Any]) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("not UTF-8, or half of a surrogate pair") from None


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8", newline="\n")


def _nothing(name: str, source: Path, rejected: list[Reject]) -> str:
    """The error for a source without anything good, with the first reason."""
    if not rejected:
        return f"nothing of {name} in {source}"
    first = rejected[0]
    return (
        f"nothing of {name} was accepted from {source}: {len(rejected)} rejected,"
        f" the first {first.place}: {first.reason}"
    )
