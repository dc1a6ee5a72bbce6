"""Questions from JSONL: read whole, or refused with the place."""

import itertools
import json
from pathlib import Path

import pytest

from rag2.evaluation.questions import load_questions, split, subset, to_row, with_choices
from rag2.registry import UserError
from rag2.types import Question

GOOD = {"id": "q1", "question": "Who?", "choices": ["a", "b"], "answer": 1}


def write_rows(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


def test_questions_round_trip_and_split(tmp_path):
    full = GOOD | {
        "id": 7,
        "split": "train",
        "gold_chunk": 3,
        "evidence": "doc",
        "metadata": {"wording": "seen"},
    }
    path = write_rows(tmp_path / "q.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b" ", full)
    first, second = load_questions(path)
    assert first == Question("q1", "Who?", ("a", "b"), 1) and first.gold == "b"
    assert (second.id, second.evidence, second.gold_chunk) == ("7", ("doc",), 3)
    again = load_questions(write_rows(tmp_path / "r.jsonl", to_row(first), to_row(second)))
    assert again == [first, second]
    assert split(again, "train") == [second]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{", "not JSON"),
        (b'{"id": "\xff"}', "not UTF-8 (byte 9 of the line)"),
        (b"[" * 100_000, "not JSON"),
        ([1], "expected a JSON object, got list"),
        ({k: v for k, v in GOOD.items() if k != "choices"} | {"choises": []}, "'choices' is miss"),
        ({"id": "x", "question": "?", "answers": []}, "one or more non-empty strings, got []"),
        ({"id": "x", "question": "?", "answers": ["a", " "]}, "one or more non-empty strings"),
        ({"id": "x", "question": "?", "answers": "a"}, "'answers' must be a list"),
        (GOOD | {"id": "x", "choices": ["a", "a"]}, "the same entry twice"),
        ({k: v for k, v in GOOD.items() if k != "id"}, "'id' is missing"),
        (GOOD | {"id": "x", "question": " "}, "'question' must be a non-empty string"),
        (GOOD | {"id": "x", "choices": ["a"]}, "at least 2 entries, got 1"),
        (GOOD | {"id": "x", "choices": ["a", ""]}, "empty entry"),
        (GOOD | {"id": "x", "choices": ["a", 2]}, "list of strings"),
        (GOOD | {"id": "x", "answer": 2}, "index from 0 to 1, got 2"),
        (GOOD | {"id": "x", "answer": -1}, "index from 0 to 1, got -1"),
        (GOOD | {"id": "x", "answer": True}, "index from 0 to 1, got true"),
        (GOOD | {"id": "x", "answer": "B"}, 'got "B"'),
        (GOOD, "id 'q1' is already used on line 1"),
        (GOOD | {"id": "x", "split": "tests"}, "Did you mean 'test'?"),
        (GOOD | {"id": "x", "split": 3}, "unknown split 3"),
        (GOOD | {"id": "x", "gold_chunk": "3"}, "'gold_chunk' must be a chunk id"),
        (GOOD | {"id": "x", "evidence": [3]}, "'evidence' must be document ids"),
        (GOOD | {"id": "x", "metadata": "m"}, "'metadata' must be a JSON object"),
    ],
)
def test_a_bad_row_is_one_line_with_its_place(tmp_path, row, message):
    path = write_rows(tmp_path / "q.jsonl", GOOD, row)
    with pytest.raises(UserError) as error:
        load_questions(path)
    text = str(error.value)
    assert text.startswith(f"{path}:2: ") and message in text and "\n" not in text


def test_a_file_that_is_missing_or_empty_is_one_line(tmp_path):
    write_rows(tmp_path / "questions.jsonl", GOOD)
    with pytest.raises(UserError, match=r"Did you mean 'questions.jsonl'\?"):
        load_questions(tmp_path / "question.jsonl")
    with pytest.raises(UserError, match="no questions in this file"):
        load_questions(write_rows(tmp_path / "empty.jsonl", b"\n"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_questions(tmp_path)
    questions = load_questions(tmp_path / "questions.jsonl")
    with pytest.raises(UserError, match=r"no question has split 'train'; present: test \(1\)"):
        split(questions, "train")
    with pytest.raises(UserError, match="Did you mean 'validation'"):
        split(questions, "valid")


def ids(questions: list[Question]) -> list[str]:
    return [question.id for question in questions]


def test_a_smaller_share_of_the_questions_lies_inside_a_larger_one(dice):
    questions = [Question(f"q{n}", f"Who {n}?", ("a", "b"), 0) for n in range(dice.randint(1, 400))]
    seed = dice.randrange(1000)
    shares = sorted(dice.uniform(0.001, 1) for _ in range(5))
    nested = [ids(subset(questions, share, seed)) for share in (*shares, 1.0)]
    for smaller, larger in itertools.pairwise(nested):
        assert 1 <= len(smaller) <= len(larger) and {*smaller} <= {*larger}
    assert nested[-1] == ids(questions)
    assert [i for i in nested[-1] if i in nested[2]] == nested[2]  # in their order
    # The other questions of a file, and their order, decide nothing of two that stay.
    shuffled = dice.sample(questions, len(questions))
    assert {*ids(subset(shuffled, shares[2], seed))} == {*nested[2]}


def test_a_share_has_the_size_it_says_and_depends_on_the_seed():
    questions = [Question(f"q{n}", "Who?", ("a", "b"), 0) for n in range(300)]
    for share, count in ((0.1, 30), (0.3, 90), (1.0, 300), (0.001, 1), (1e-9, 1), (0.011, 4)):
        assert len(subset(questions, share, 0)) == count
    assert subset(questions, 0.3, 0) != subset(questions, 0.3, 1)


def test_an_open_question_has_answers_instead_of_choices(tmp_path: Path):
    row = {"id": "o", "question": "Who?", "answers": ["Ola", "Ola Nordmann"], "split": "test"}
    path = tmp_path / "open.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (question,) = load_questions(path)
    assert (question.gold, question.choices, question.answer) == ("Ola", (), -1)
    assert to_row(question) == row
    with pytest.raises(UserError, match=r"open.jsonl: question 'o' has 'answers' and no 'choices'"):
        with_choices([question], path)
