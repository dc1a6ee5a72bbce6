"""Public data sets from their own files: what is read, what is rejected and where, what is left."""

import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rag2 import artifact, cli
from rag2.evaluation.questions import load_questions
from rag2.evaluation.tasks import source
from rag2.evaluation.tasks.write import Summary, write
from rag2.kb.read import read
from rag2.registry import TABLES, UserError
from rag2.types import Question


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def mmlu(root: Path) -> None:
    put(root / "dev/law_dev.csv", "Which?,a,b,c,d,D\n")
    put(root / "val/law_val.csv", 'Which ""one""?,a,b,c,d,A\n"Two\nlines?",a,b,c,d,B\n')
    put(
        root / "test/law_test.csv",
        b'Good?,"1, 2",b,c,d,C\n'
        b"Same?,a,a,c,d,A\n"
        b"Blank?,a, ,c,d,A\n"
        b"Short?,a,b,C\n"
        b"Letter?,a,b,c,d,E\n"
        b"\xff?,a,b,c,d,A\n"
        b",a,b,c,d,A\n"
        b"Good too?,a,b,c,d,B\n",
    )
    put(root / "test/world_religions_test.csv", "Who?,a,b,c,d,B\n")
    put(root / "README.txt", "not a question")


def openstax(root: Path) -> None:
    rows = [
        {"module": "m1", "title": "Cells", "text": "First."},
        {"module": "m1", "title": "Cells", "text": "Second."},
        {"module": "m2", "title": "Atoms", "txt": "no text"},
        "{bad",
        {"module": "m3", "title": "Stars", "text": "Third."},
        {"module": "m4", "title": "Void", "text": " "},
    ]
    put(root / "paragraphs.jsonl.gz", gzip.compress(lines(*rows).encode()))
    asked = {"module": "m1", "title": "Cells", "question": "What?", "choices": ["a", "b"]}
    rows = [
        asked | {"answer": 1},
        asked | {"answer": 2},
        asked | {"answer": 0, "choices": ["a"]},
        asked | {"answer": 0, "module": "m9"},
        asked | {"answer": True},
        asked | {"answer": 0},
    ]
    put(root / "mc.jsonl", lines(*rows))


def xquad(root: Path) -> None:
    def asked(id: str, *texts: str) -> dict[str, Any]:
        return {"id": id, "question": f"{id}?", "answers": [{"text": text} for text in texts]}

    paragraph = {
        "context": "Ola lives in Oslo.",
        "qas": [asked("a", "Ola", "Ola", "ola"), asked("b"), {"id": "c"}, asked("a", "Oslo")],
    }
    article = {"title": "Old_Oslo", "paragraphs": [paragraph, {"context": "", "qas": []}, 3]}
    put(root / "xquad.en.json", json.dumps({"data": [article, {"title": "No paragraphs"}]}))


def fairytale(root: Path) -> None:
    head = "question_id,cor_section,question,ex-or-im1,answer1,answer2,answer4\n"
    for name in ("train", "val", "test"):
        put(root / f"section-stories/{name}/the-fox-{name}-story.csv", "section,text\n1,A\n2,B\n")
    put(
        root / "questions/test/the-fox-test-questions.csv",
        head
        + '1,"1, 2",Who?,explicit,the fox,a fox,The fox\n'
        + "1,2,Same number?,implicit,yes,,\n"
        + "\n"
        + "3,9,No such section?,explicit,x,,\n"
        + "4,1,No answer?,explicit, ,y,\n"
        + "5,1,Short,explicit\n",
    )
    put(root / "questions/train/the-fox-train-questions.csv", head + "1,1,Why?,,so,,\n")
    put(root / "questions/val/the-fox-val-questions.csv", head.replace("cor_section", "x") + "1\n")


def pubmedqa(root: Path) -> None:
    row = {"QUESTION": "Does it?", "CONTEXTS": ["First.", "Second."], "LONG_ANSWER": "It does."}
    rows = {
        "1": row | {"final_decision": "yes"},
        "2": row | {"final_decision": "maybe"},
        "3": row | {"final_decision": "perhaps"},
        "4": row | {"final_decision": "no"},
        "5": {"QUESTION": "What?", "final_decision": "no"},
    }
    put(root / "ori_pqal.json", json.dumps(rows))
    put(root / "test_ground_truth.json", json.dumps({"1": "yes", "4": "yes", "6": "no"}))


MAKE: dict[str, Callable[[Path], None]] = {
    "mmlu": mmlu,
    "openstax": openstax,
    "xquad": xquad,
    "fairytale": fairytale,
    "pubmedqa": pubmedqa,
}
# name -> accepted questions, accepted documents, and where and why the others are rejected
EXPECTED = {
    "mmlu": (
        6,
        0,
        {
            "test/law_test.csv:2": "'choices' has the same entry twice",
            "test/law_test.csv:3": "'choices' has an empty entry",
            "test/law_test.csv:4": "4 cells, not the 6 of question,A,B,C,D,letter",
            "test/law_test.csv:5": "answer 'E' is none of A, B, C, D",
            "test/law_test.csv:6": "not UTF-8",
            "test/law_test.csv:7": "'question' must be a non-empty string",
        },
    ),
    "openstax": (
        2,
        2,
        {
            "paragraphs.jsonl.gz:3": "no 'text'. Did you mean 'txt'?",
            "paragraphs.jsonl.gz:4": "malformed JSON",
            "paragraphs.jsonl.gz:6": "no text",
            "mc.jsonl:2": "'answer' must be an index from 0 to 1, got 2",
            "mc.jsonl:3": "'choices' needs at least 2 entries, got 1",
            "mc.jsonl:4": "evidence 'book/m9' is no document of this set",
            "mc.jsonl:5": "'answer' is a bool, not a int",
        },
    ),
    "xquad": (
        1,
        1,
        {
            "xquad.en.json: data[0].paragraphs[0].qas[1]": "'answers' must be a list of one or",
            "xquad.en.json: data[0].paragraphs[0].qas[2]": "no 'answers'",
            "xquad.en.json: data[0].paragraphs[0].qas[3]": "duplicate id 'a', first used at",
            "xquad.en.json: data[0].paragraphs[1]": "no text",
            "xquad.en.json: data[0].paragraphs[2]": "expected an object, got int",
            "xquad.en.json: data[1]": "no 'paragraphs'",
        },
    ),
    "fairytale": (
        3,
        6,
        {
            "questions/val/the-fox-val-questions.csv:2": "1 cells under a header of 7",
            "questions/test/the-fox-test-questions.csv:5": "evidence 'the-fox-test/9' is no doc",
            "questions/test/the-fox-test-questions.csv:6": "'answers' must be a list of one or",
            "questions/test/the-fox-test-questions.csv:7": "4 cells under a header of 7",
        },
    ),
    "pubmedqa": (
        2,
        2,
        {
            "ori_pqal.json: 3": "final_decision 'perhaps' is none of yes, no, maybe",
            "ori_pqal.json: 4": "final_decision 'no', test_ground_truth.json 'yes'",
            "ori_pqal.json: 5": "no 'CONTEXTS'",
            "test_ground_truth.json: 6": "no such question in ori_pqal.json",
        },
    ),
}


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Summary]:
    """Writes a small data set, good and broken rows, and turns it into a task in `tmp_path`."""

    def make(name: str) -> Summary:
        MAKE[name](tmp_path / "book")
        return write(name, tmp_path / "book", tmp_path / "out")

    return make


def test_every_task_is_tested_and_told_by_the_help(capsys: pytest.CaptureFixture[str]):
    assert TABLES["task"].keys() == MAKE.keys() == EXPECTED.keys()
    with pytest.raises(SystemExit):
        cli.main(["task", "--help"])
    assert f"Names: {', '.join(TABLES['task'])}." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", EXPECTED)
def test_good_rows_are_kept_and_bad_ones_told_with_place_and_reason(made, tmp_path: Path, name):
    summary = made(name)
    questions, documents, reasons = EXPECTED[name]
    found = {reject.place: reject.reason for reject in summary.rejected}
    assert found.keys() == reasons.keys() and len(found) == len(summary.rejected)
    for place, reason in reasons.items():
        assert found[place].startswith(reason), (place, found[place])
    assert (len(summary.questions), len(summary.documents)) == (questions, documents)
    assert summary.total == questions + documents + len(reasons)
    # What was written is what the rest of rag2 reads, to the last field.
    out = tmp_path / "out"
    artifact.verify(out, kind="task")
    assert load_questions(out / "questions.jsonl") == summary.questions
    assert (out / "documents.jsonl").exists() == bool(documents)
    if documents:
        items = [item for _, item in read(out / "documents.jsonl")]
        assert items == summary.documents


def test_questions_keep_text_answer_split_and_evidence(made, tmp_path: Path):
    by_id = {q.id: q for q in made("mmlu").questions}
    good = by_id["law/test/0"]
    assert good == Question(
        "law/test/0", "Good?", ("1, 2", "b", "c", "d"), 2, metadata={"subject": "law"}
    )
    assert by_id["law/test/7"].gold == "b"  # a rejected row does not move the ids behind it
    assert by_id["law/val/1"].question == "Two\nlines?"
    assert by_id["law/val/1"].split == "validation" and by_id["law/dev/0"].split == "train"
    assert by_id["world_religions/test/0"].subject == "world_religions"


def test_open_questions_have_every_annotators_answer_once(made):
    (question,) = made("xquad").questions
    assert question.answers == ("Ola", "ola") and question.evidence == ("Old_Oslo/0",)


def test_a_fairytales_question_names_its_sections_and_its_two_annotators(made):
    first = {q.id: q for q in made("fairytale").questions}["the-fox-test/q1"]
    assert first.answers == ("the fox", "The fox") and first.split == "test"
    assert first.evidence == ("the-fox-test/1", "the-fox-test/2")


def test_a_textbooks_section_is_one_document_and_its_ids_name_the_book(made):
    summary = made("openstax")
    assert summary.documents[0].text == "First.\n\nSecond."
    assert [q.id for q in summary.questions] == ["book/m1/q1", "book/m1/q5"]
    assert {q.evidence for q in summary.questions} == {("book/m1",)}
    assert len({q.split for q in summary.questions}) == 1


def test_an_abstract_is_read_without_the_conclusion_that_holds_the_answer(made):
    summary = made("pubmedqa")
    assert all(d.text == "First.\n\nSecond." and not d.title for d in summary.documents)
    first, second = summary.questions
    assert (first.gold, first.split) == ("yes", "test")
    assert second.gold == "maybe" and second.split in ("train", "validation")


def test_splits_by_hash_have_their_shares_and_depend_on_the_name_alone(seed: int):
    names = [hashlib.sha256(f"{seed} {n}".encode()).hexdigest() for n in range(5000)]
    counts = Counter(source.by_hash(name) for name in names)
    assert counts["train"] == pytest.approx(2000, abs=200)
    assert counts["validation"] == pytest.approx(1000, abs=160)
    assert source.by_hash("Warsaw") == "train" and source.by_hash("Normans") == "test"


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("mlmu", None, "unknown task 'mlmu'; allowed: mmlu, .* Did you mean 'mmlu'"),
        ("mmlu", "val", "val' does not exist"),
        ("openstax", "paragraphs.jsonl.gz", r"paragraphs.jsonl.gz' does not exist"),
        ("pubmedqa", "test_ground_truth.json", "test_ground_truth.json' does not exist"),
        ("xquad", "xquad.en.json", "xquad.en.json' does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str, says: str
):
    (tmp_path / "book").mkdir()
    if damage:
        MAKE[name](tmp_path / "book")
        (tmp_path / "book" / damage).rename(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["task", name, str(tmp_path / "book"), str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match=says):
        write(name, tmp_path / "book", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "file", "content", "says"),
    [
        ("mmlu", "test/x_test.csv", "a,b\n", "1 rejected, the first test/x_test.csv:1: 2 cells"),
        ("openstax", "paragraphs.jsonl.gz", b"\x1f\x8bno archive", "broken archive"),
        ("openstax", "paragraphs.jsonl.gz", "plain text", "broken archive"),
        ("xquad", "xquad.en.json", '{"data": \n[', "xquad.en.json:2: malformed JSON"),
        ("xquad", "xquad.en.json", b"\xff", "not UTF-8"),
        ("xquad", "xquad.en.json", "[]", "expected an object, got list"),
        ("pubmedqa", "ori_pqal.json", "{}", "nothing of pubmedqa was accepted"),
        ("pubmedqa", "ori_pqal.json", "[]", "expected an object, got list"),
    ],
)
def test_a_set_of_which_nothing_is_good_is_refused(tmp_path, name, file, content, says):
    root = tmp_path / "book"
    for folder in ("dev", "val", "test"):
        (root / folder).mkdir(parents=True)
    put(root / "test_ground_truth.json", '{"1": "yes"}')
    put(root / file, content)
    with pytest.raises(UserError, match=says):
        write(name, root, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["book"]


def test_the_command_prints_what_became_of_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mmlu(tmp_path / "book")
    words = ["task", "mmlu", str(tmp_path / "book"), str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    shown = capsys.readouterr()
    assert caught.value.code == 0
    assert shown.out.splitlines() == [
        "6 accepted + 6 rejected = 12",
        "6 questions (1 train, 2 validation, 3 test), 0 documents",
    ]
    assert shown.err.startswith("rejected test/law_test.csv:2: 'choices' has the same entry twice")
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert "exists already" in capsys.readouterr().err


# folder -> task, questions of train, validation and test, documents, rejected
REAL = {
    "mmlu": ("mmlu", (25, 89, 855), 0, 0),
    "openstax_psychology": ("openstax", (138, 59, 114), 105, 0),
    "openstax_astronomy": ("openstax", (0, 0, 0), 194, 0),
    "openstax_anthropology": ("openstax", (0, 0, 0), 121, 0),
    "xquad_en": ("xquad", (425, 266, 499), 240, 0),
    "fairytaleqa": ("fairytale", (8548, 1025, 1007), 4094, 1),
    "pubmedqa": ("pubmedqa", (287, 213, 500), 1000, 0),
}


@pytest.mark.slow
@pytest.mark.skipif("RAG2_DATA" not in os.environ, reason="RAG2_DATA: folder of the real data sets")
@pytest.mark.parametrize("folder", REAL)
def test_the_real_data_sets_have_these_counts(tmp_path: Path, folder: str):
    name, splits, documents, rejected = REAL[folder]
    summary = write(name, Path(os.environ["RAG2_DATA"]) / folder, tmp_path / "out")
    counts = Counter(question.split for question in summary.questions)
    assert (counts["train"], counts["validation"], counts["test"]) == splits
    assert (len(summary.documents), len(summary.rejected)) == (documents, rejected)


@pytest.mark.slow
@pytest.mark.skipif("RAG2_DATA" not in os.environ, reason="RAG2_DATA: folder of the real data sets")
def test_the_books_together_have_no_id_twice(tmp_path: Path):
    ids = []
    for book in (name for name in REAL if name.startswith("openstax")):
        summary = write("openstax", Path(os.environ["RAG2_DATA"]) / book, tmp_path / book)
        ids += [document.id for document in summary.documents]
    assert len(set(ids)) == len(ids) == 420
