"""A JSONL file of questions, multiple-choice or open -> `Question` records, every row checked."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rag2.registry import UserError, nearest
from rag2.types import Question

SPLITS = ("train", "validation", "test")


def load_questions(path: str | Path) -> list[Question]:
    """The questions of a JSONL file in file order, blank lines skipped.

    Raises UserError, one line that starts with `file:line`, at the first row that is no question
    with `choices` and `answer` or with `answers`, and for a missing, unreadable or empty file.
    """
    path = Path(path)
    questions: list[Question] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        question = question_of(_row(line, place), place)
        if question.id in line_of:
            first = line_of[question.id]
            raise UserError(f"{place}: id {question.id!r} is already used on line {first}")
        line_of[question.id] = number
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: no questions in this file; expected one JSON object a line")
    return questions


def split(questions: Sequence[Question], name: str) -> list[Question]:
    """The questions of one split; raises UserError for an unknown or an empty split."""
    if name not in SPLITS:
        raise UserError(
            f"unknown split {name!r}; allowed: {_listed(SPLITS)}.{nearest(name, SPLITS)}"
        )
    chosen = [question for question in questions if question.split == name]
    if not chosen:
        present = Counter(question.split for question in questions)
        found = ", ".join(f"{key} ({count})" for key, count in present.items()) or "no questions"
        raise UserError(f"no question has split {name!r}; present: {found}")
    return chosen


def subset(questions: Sequence[Question], share: float, seed: int) -> list[Question]:
    """`share` (above 0, at most 1) of the questions, rounded up, in their order.

    Which ones depends on the seed and on each question's id alone, and a smaller share lies inside
    a larger one: with more of them nothing is taken away.
    """

    def place(question: Question) -> str:
        return hashlib.sha256(f"{seed}/{question.id}".encode()).hexdigest()

    # Without the rounding, .1 x 30 and the like would be a hair above what they stand for.
    count = max(1, math.ceil(round(share * len(questions), 6)))
    kept = {question.id for question in sorted(questions, key=place)[:count]}
    return [question for question in questions if question.id in kept]


def with_choices(questions: Sequence[Question], source: str | Path) -> Sequence[Question]:
    """The questions; raises UserError if one is open, for it has no choices to compare."""
    for question in questions:
        if not question.choices:
            raise UserError(
                f"{source}: question {question.id!r} has 'answers' and no 'choices'; "
                "open questions are answered by rag2 eval open"
            )
    return questions


def without_choices(questions: Sequence[Question], source: str | Path) -> Sequence[Question]:
    """The questions; raises UserError if one has choices, for it is answered by picking one."""
    for question in questions:
        if question.choices:
            raise UserError(
                f"{source}: question {question.id!r} has 'choices' and no 'answers'; "
                "such questions are answered by rag2 eval mc"
            )
    return questions


def to_row(question: Question) -> dict[str, Any]:
    """The JSON object of a question, without the optional keys it does not use."""
    row: dict[str, Any] = {"id": question.id, "question": question.question}
    if question.choices:
        row |= {"choices": list(question.choices), "answer": question.answer}
    else:
        row["answers"] = list(question.answers)
    row["split"] = question.split
    if question.gold_chunk is not None:
        row["gold_chunk"] = question.gold_chunk
    if question.evidence:
        row["evidence"] = list(question.evidence)
    if question.metadata:
        row["metadata"] = question.metadata
    return row


def question_of(row: Mapping[str, Any], place: str) -> Question:
    """The question of one row; raises UserError, one line that starts with `place`, for none."""
    identity = _required(row, "id", place)
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == "":
        raise UserError(f"{place}: 'id' must be a non-empty string, got {_shown(identity)}")
    text = _required(row, "question", place)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}: 'question' must be a non-empty string, got {_shown(text)}")
    open_ended = "answers" in row and "choices" not in row
    choices = () if open_ended else _choices(row, place)
    return Question(
        id=str(identity),
        question=text,
        choices=choices,
        answer=-1 if open_ended else _answer(row, len(choices), place),
        answers=_answers(row, place) if open_ended else (),
        split=_split(row, place),
        gold_chunk=_gold_chunk(row, place),
        evidence=_evidence(row, place),
        metadata=_metadata(row, place),
    )


def _read(path: Path) -> bytes:
    try:
        # A byte order mark is what some spreadsheet exports put first; JSON forbids it.
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, beside)
        raise UserError(f"questions file {str(path)!r} does not exist.{hint}") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"questions file {str(path)!r} cannot be read: {reason}") from None


def _row(line: bytes, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{place}: half of a surrogate pair, which is no character") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg} (column {error.colno})") from None
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{place}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{place}: not JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected a JSON object, got {type(row).__name__}")
    return row


def _required(row: Mapping[str, Any], key: str, place: str) -> Any:
    if key not in row:
        raise UserError(f"{place}: the key {key!r} is missing; found: {_listed(row) or 'no keys'}")
    return row[key]


def _choices(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    choices = _required(row, "choices", place)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{place}: 'choices' must be a list of strings, got {_shown(choices)}")
    if len(choices) < 2:
        raise UserError(f"{place}: 'choices' needs at least 2 entries, got {len(choices)}")
    if not all(choice.strip() for choice in choices):
        raise UserError(f"{place}: 'choices' has an empty entry: {_shown(choices)}")
    if len(set(choices)) < len(choices):
        raise UserError(f"{place}: 'choices' has the same entry twice: {_shown(choices)}")
    return tuple(choices)


def _answers(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    answers = row["answers"]
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(answer, str) and answer.strip() for answer in answers)
    ):
        raise UserError(
            f"{place}: 'answers' must be a list of one or more non-empty strings, "
            f"got {_shown(answers)}"
        )
    return tuple(answers)


def _answer(row: Mapping[str, Any], count: int, place: str) -> int:
    answer = _required(row, "answer", place)
    if not _is_int(answer) or not 0 <= answer < count:
        allowed = f"an index from 0 to {count - 1}"
        raise UserError(f"{place}: 'answer' must be {allowed}, got {_shown(answer)}")
    return answer


def _split(row: Mapping[str, Any], place: str) -> str:
    name = row.get("split", "test")
    if name not in SPLITS:
        hint = nearest(name, SPLITS) if isinstance(name, str) else ""
        raise UserError(f"{place}: unknown split {_shown(name)}; allowed: {_listed(SPLITS)}.{hint}")
    return name


def _gold_chunk(row: Mapping[str, Any], place: str) -> int | None:
    chunk = row.get("gold_chunk")
    if chunk is not None and not _is_int(chunk):
        raise UserError(f"{place}: 'gold_chunk' must be a chunk id (integer), got {_shown(chunk)}")
    return chunk


def _evidence(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    evidence = row.get("evidence") or []
    evidence = [evidence] if isinstance(evidence, str) else evidence
    if not isinstance(evidence, list) or not all(isinstance(item, str) for item in evidence):
        raise UserError(f"{place}: 'evidence' must be document ids, got {_shown(evidence)}")
    return tuple(evidence)


def _metadata(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{place}: 'metadata' must be a JSON object, got {_shown(metadata)}")
    return metadata


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # JSON true is no index


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: Any) -> str:
    text = ", ".join(names)
    return text if len(text) <= 200 else text[:197] + "..."
