"""PubMedQA (Jin et al. 2019), the 1,000 expert-labelled questions: yes, no or maybe.

The folder holds `ori_pqal.json` and `test_ground_truth.json` of the original. A document is an
abstract without its conclusion, which states the answer, and its title, which is the question.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag2.evaluation.tasks.source import Item, Malformed, by_hash, field, json_file, strings
from rag2.registry import UserError
from rag2.types import Document

CHOICES = ("yes", "no", "maybe")
# The test questions are the official ones; of the others, cross-validated in the paper:
REST = {"train": 3, "validation": 2}


def read(source: Path) -> Iterator[Item]:
    """Abstracts as documents and questions, each with its own abstract as evidence.

    Raises UserError if a file is missing or holds no JSON object.
    """
    rows, official = (
        json_file(source / "ori_pqal.json"),
        json_file(source / "test_ground_truth.json"),
    )
    for name, value in (("ori_pqal.json", rows), ("test_ground_truth.json", official)):
        if not isinstance(value, dict):
            raise UserError(f"{source / name}: expected an object, got {type(value).__name__}")
    for id, row in rows.items():
        place = f"ori_pqal.json: {id}"
        try:
            document, question = _pair(id, row, official)
        except Malformed as reason:
            yield place, str(reason)
        else:
            yield place, document
            yield place, question
    for id in official.keys() - rows.keys():
        yield f"test_ground_truth.json: {id}", "no such question in ori_pqal.json"


def _pair(id: str, row: Any, official: dict[str, Any]) -> tuple[Document, dict[str, Any]]:
    answer = field(row, "final_decision", str)
    if answer not in CHOICES:
        raise Malformed(f"final_decision {answer!r} is none of {', '.join(CHOICES)}")
    if official.get(id, answer) != answer:
        raise Malformed(f"final_decision {answer!r}, test_ground_truth.json {official[id]!r}")
    question = {
        "id": id,
        "question": field(row, "QUESTION", str),
        "choices": list(CHOICES),
        "answer": CHOICES.index(answer),
        "split": "test" if id in official else by_hash(id, REST),
        "evidence": [id],
    }
    return Document(id, "\n\n".join(strings(row, "CONTEXTS"))), question
