"""Files, or the rows of a world, -> the questions and texts that robustness is measured with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rag2.evaluation.html import spread
from rag2.evaluation.questions import load_questions, question_of, with_choices
from rag2.evaluation.robustness import Asked, facts
from rag2.kb.read import read
from rag2.registry import UserError
from rag2.types import Question

Row = Mapping[str, Any]
Item = TypeVar("Item")


def questions(path: str | Path | None, rows: Sequence[Row], limit: int | None) -> list[Question]:
    """The questions of a file if there is one, else of a world's rows; `limit` of them.

    Raises UserError as `load_questions` does, and for questions without choices.
    """
    if path:
        return some(with_choices(load_questions(path), path), limit)
    return [question_of(row, "world") for row in some(rows, limit)]


def some(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit`, evenly spread: a world's questions come one kind of entity after another."""
    return [items[row] for row in spread(len(items), limit or len(items))]


def rewordings(path: str | Path | None, rows: Sequence[Row], limit: int | None) -> list[Question]:
    """The same with `limit` facts; the questions of a fact stand together.

    Raises UserError for a question without `metadata.fact`, and for a fact with one question alone
    or with different choices.
    """
    found, place = questions(path, rows, None), path or "world"
    for question in found:
        if "fact" not in question.metadata:
            raise UserError(f"{place}: question {question.id!r} has no metadata.fact")
    groups = facts(found)
    for group in groups:
        if len(group) < 2 or len({found[row].choices for row in group}) > 1:
            fact = found[group[0]].metadata["fact"]
            raise UserError(f"{place}: fact {fact!r} needs two or more questions of equal choices")
    return [found[row] for group in some(groups, limit) for row in group]


def texts(key: str, path: Path, count: int) -> list[str]:
    """At most `count` texts of a file or folder, evenly spread, each after its title.

    Raises UserError, beginning with the key, for what is no text and for a place without any.
    """
    found = []
    for at, item in read(path):
        if isinstance(item, str):
            raise UserError(f"{key}={path}: {at}: {item}")
        found.append(f"{item.title}\n{item.text}" if item.title else item.text)
    if not found:
        raise UserError(f"{key}={path}: there is no text in it")
    return some(found, count)


def check_ids(asked: Asked) -> None:
    """Raise UserError if two questions share an id: what is known of one would pass for both."""
    seen: dict[str, str] = {}
    for part in ("validation", "test", "control", "absent", "rewordings"):
        for question in getattr(asked, part):
            if question.id in seen:
                raise UserError(
                    f"question id {question.id!r} of {part} is used in {seen[question.id]} already"
                )
            seen[question.id] = part
