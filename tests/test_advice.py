"""Advice: every number is the table's, every arm is in it, and other numbers give other advice."""

import ast
import copy
import functools
import json
import operator
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made import exactly, make_arm
from rag2 import cli
from rag2.evaluation import advice
from rag2.evaluation.contrasts import CONTROLS
from rag2.evaluation.figures import Answer
from rag2.evaluation.results import summarize

COMPARE = "rag2 eval compare -c runs/x/config.yaml"
QUESTIONS = ["stability", "resources", "updates", "verifiability", "performance"]
NUMBER = re.compile(r"(?<!\w)[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]\d+)?")
RAG: dict[str, Any] = {"retriever": "warm", "reading": "marginal", "k": 4, "recall_at_1": 0.3}


def table(**changes: dict[str, Any]) -> dict[str, Any]:
    """results.json of five arms and a control, every cost known and different; with changes."""
    results = json.loads(summarized())
    for name, changed in changes.items():
        results["arms"][name] |= changed
    return results


@functools.cache
def summarized(**right: int) -> str:
    """The same as it was measured, where an arm may have got another number right."""
    facts: dict[str, dict[str, Any]] = {
        "majority": {"right": 21, "generator": "majority"},
        "base": {"right": 25, "train_seconds": 0.0, "ship_bytes": 0, "inference_flops": 4.1e7},
        "ft": {"right": 31, "generator": "ft", "train_seconds": 17.3, "ship_bytes": 5_100_000}
        | {"inference_flops": 4.2e7, "document_seconds": 17.3, "control_accuracy": 0.41},
        "frozen_rag": {"right": 71, **RAG, "recall_at_k": 0.91, "train_seconds": 140.9}
        | {"ship_bytes": 3_800_000, "inference_flops": 5.7e8, "document_seconds": 0.034},
        "ft_rag": {"right": 70, **RAG, "generator": "ft", "recall_at_k": 0.93, "k": 5}
        | {"train_seconds": 158.2, "ship_bytes": 8_900_000, "inference_flops": 6.3e8}
        | {"document_seconds": 0.036, "control_accuracy": 0.37},
        "joint": {"right": 88, **RAG, "retriever": "joint", "generator": "joint", "k": 3}
        | {"recall_at_k": 0.97, "train_seconds": 519.4, "ship_bytes": 8_800_000}
        | {"inference_flops": 4.4e8, "document_seconds": 0.023, "control_accuracy": 0.53},
    }
    facts["base"]["control_accuracy"] = 0.79
    facts["frozen_rag"]["control_accuracy"] = 0.67
    arms = []
    for place, (name, known) in enumerate(facts.items(), 1):
        known = {**known, "latency_ms": (11.1 * place, 11.1 * place + 3)}
        correct = exactly(right.get(name, int(known["right"])), 100)
        del known["right"]
        arms.append(make_arm(name, correct, **known))
    return json.dumps(summarize("made up", arms, seed=0, environment={}))


def advised(results: dict[str, Any], alpha: float | None = None) -> dict[str, Answer]:
    return {answer.question: answer for answer in advice.advise(results, COMPARE, alpha)}


def text_of(answer: Answer) -> str:
    return " ".join(answer.sentences)


def computed(source: str, names: dict[str, Any]) -> float:
    """A formula's value over the table, by Python's own arithmetic."""
    signs: dict[type, Any] = {
        ast.Add: operator.add, ast.Sub: operator.sub, ast.Div: operator.truediv,
    }  # fmt: skip
    numbered = re.sub(r"\.(\d+)(?=[.\s)]|$)", r"[\1]", source)  # pairwise.holm_p.0.1

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return names[node.id]
            case ast.Attribute():
                return value(node.value)[node.attr]
            case ast.Subscript():
                return value(node.value)[value(node.slice)]
            case ast.BinOp():
                return signs[type(node.op)](value(node.left), value(node.right))
        raise AssertionError(ast.dump(node))

    return value(ast.parse(numbered, mode="eval").body)


def check(results: dict[str, Any], alpha: float | None = None) -> None:
    """Every number shown is one that was noted, and every formula gives the number noted."""
    for answer in advised(results, alpha).values():
        shown = {number for noted in answer.figures for number in NUMBER.findall(noted["shown"])}
        assert set(NUMBER.findall(text_of(answer))) <= shown, text_of(answer)
        for noted in answer.figures:
            again = computed(noted["from"], {**results, "alpha": alpha})
            assert again == pytest.approx(noted["value"], rel=1e-12), noted
        words = set(re.findall(r"\w+", text_of(answer)))
        assert set(answer.arms) <= set(results["arms"]) - set(CONTROLS)
        assert not words & set(CONTROLS)


def test_the_five_questions_are_answered_from_rows_and_columns_that_are_there():
    found = advised(table())
    assert list(found) == QUESTIONS
    for answer in found.values():
        assert answer.sentences and answer.arms and answer.keys and not answer.missing, answer
    check(table())
    check(table(), alpha=0.05)


def test_every_number_is_the_tables_whatever_is_in_it(rng: np.random.Generator):
    results = table()
    for _ in range(40):
        drawn = copy.deepcopy(results)
        for arm in drawn["arms"].values():
            for key in ("accuracy", "recall_at_k", "recall_at_1", "control_accuracy"):
                arm[key] = None if key != "accuracy" and rng.random() < 0.2 else rng.random()
            for key in (*advice.COSTS, "document_seconds", "peak_memory_bytes"):
                arm[key] = None if rng.random() < 0.2 else float(10 ** rng.uniform(-3, 10))
            arm["k"] = [None, 0, 1, 3][rng.integers(4)]
        check(drawn, alpha=0.05)
        assert drawn != results


def test_a_number_that_no_cell_gave_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(advice, "_lead", lambda *_: ", 12345 points ahead.")
    with pytest.raises(AssertionError, match="12345"):
        check(table())


@pytest.mark.parametrize(
    ("question", "name", "key"),
    [
        ("stability", "joint", "document_seconds"),
        ("stability", "ft", "document_seconds"),
        ("stability", "ft", "train_seconds"),
        ("resources", "frozen_rag", "ship_bytes"),
        ("resources", "joint", "inference_flops"),
        ("resources", "ft", "train_seconds"),
        ("updates", "ft_rag", "document_seconds"),
        ("updates", "ft", "document_seconds"),
        ("verifiability", "joint", "recall_at_k"),
        ("verifiability", "frozen_rag", "recall_at_1"),
        ("performance", "joint", "accuracy"),
        ("performance", "joint", "control_accuracy"),
        ("performance", "base", "control_accuracy"),
    ],
)
def test_each_answer_goes_by_the_key_that_its_question_is_about(question, name, key):
    """A swapped key shows: the cell, made another number, is in the answer with its new value."""
    before, results = advised(table())[question], table()
    results["arms"][name][key] = 0.8763
    after = advised(results)[question]
    assert text_of(after) != text_of(before)
    noted = {(figure["from"], figure["value"]) for figure in after.figures}
    assert (f"arms.{name}.{key}", 0.8763) in noted


# --- stability and updates -----------------------------------------------------------------------


def test_the_break_even_is_where_both_ways_of_staying_current_take_as_long():
    answer = advised(table())["stability"]
    assert "fewer than 752 documents change between two trainings of ft" in text_of(answer)
    assert 17.3 / 0.023 == pytest.approx(752, abs=0.5)
    noted = {figure["from"]: figure["value"] for figure in answer.figures}
    first = "(arms.joint.train_seconds - arms.ft.train_seconds) / "
    first += "(arms.ft.document_seconds - arms.joint.document_seconds)"
    updates = noted[first]
    # So many single changes later both have taken as many seconds in all.
    assert 519.4 + updates * 0.023 == pytest.approx(17.3 + updates * 17.3)
    slow = advised(table(joint={"document_seconds": 17.3 * 2}))["stability"]
    assert "Training ft again takes no longer than one document takes joint" in text_of(slow)
    cheap = advised(table(joint={"train_seconds": 3.0}))["stability"]
    assert "joint takes no longer to train than ft in the first place" in text_of(cheap)


def test_arms_are_listed_by_how_soon_a_new_document_is_in_them():
    text = text_of(advised(table())["updates"])
    places = [text.index(f"{name} 0.0") for name in ("joint", "frozen_rag", "ft_rag")]
    assert places == sorted(places) < [text.index("by a whole run of training alone: ft 17.3 s")]
    assert "base cannot take one in" in text
    swapped = text_of(advised(table(joint={"document_seconds": 0.05}))["updates"])
    assert swapped.index("frozen_rag") < swapped.index("ft_rag") < swapped.index("joint")


# --- resources -----------------------------------------------------------------------------------


def front(results: dict[str, Any]) -> set[str]:
    """The arms of the first sentence: those on the front."""
    first = advised(results)["resources"].sentences[0]
    return {name for name in results["arms"] if re.search(rf"\b{name} \d", first)}


def test_the_front_has_the_arms_that_no_other_beats_in_everything():
    assert front(table()) == {"base", "ft", "frozen_rag", "joint"}
    dominated = advised(table())["resources"].sentences[1]
    assert dominated.startswith("frozen_rag is as good as these or better in all: ft_rag 70.0 %")


@pytest.mark.parametrize("name", ["base", "ft", "frozen_rag", "ft_rag"])
def test_an_arm_made_better_and_cheaper_than_all_is_alone_on_the_front(name: str):
    best = {"accuracy": 0.99, "train_seconds": 0.0, "ship_bytes": 0, "inference_flops": 1.0}
    assert front(table(**{name: best})) == {name}
    worst = {"accuracy": 0.01, "train_seconds": 1e9, "ship_bytes": 10**12, "inference_flops": 1e15}
    assert name not in front(table(**{name: worst}))


def test_the_front_is_that_of_a_search_over_all_pairs(rng: np.random.Generator):
    for _ in range(30):
        results = table()
        for arm in results["arms"].values():
            arm |= {key: float(rng.integers(1, 5)) for key in advice.COSTS}
            arm["accuracy"] = rng.integers(1, 5) / 5
        names = [name for name in results["arms"] if name not in CONTROLS]
        goods = {
            n: [results["arms"][n]["accuracy"], *(-results["arms"][n][k] for k in advice.COSTS)]
            for n in names
        }

        def beats(b: list[float], a: list[float]) -> bool:
            return b != a and all(y >= x for x, y in zip(a, b, strict=True))

        expected = {a for a in names if not any(beats(goods[b], goods[a]) for b in names)}
        assert front(results) == expected


def test_an_arm_without_a_cost_is_not_placed_and_the_gap_is_named():
    results = table(ft={"train_seconds": None, "document_seconds": None})
    assert "ft" not in front(results)
    (missing,) = advised(results)["resources"].missing
    assert missing.what == "train_seconds of ft" and missing.command == f"{COMPARE} out=NEW"
    results = table(**{name: {"latency_ms": None} for name in table()["arms"]})
    (missing,) = advised(results)["resources"].missing
    assert missing == ("latency_ms.p50 of any arm", f"{COMPARE} latency=20 out=NEW")


# --- verifiability and performance ---------------------------------------------------------------


def test_arms_that_read_nothing_cite_nothing():
    answer = advised(table(ft_rag={"reading": "concat"}, frozen_rag={"k": 0}))["verifiability"]
    text = text_of(answer)
    assert "Closed books cite nothing: ft, base, frozen_rag." in text  # no chunk was worth reading
    assert "joint 97.0 % (K = 3, the first chunk 30.0 %); ft_rag 93.0 %" in text
    assert "ft_rag cannot say which of its chunks counted" in text


def test_the_best_arm_is_named_with_its_lead_and_how_sure_that_is():
    text = text_of(advised(table())["performance"])
    assert text.startswith("joint answers most questions right, 88.0 %, 17.0 points more than ")
    assert "frozen_rag (71.0 %)" in text and "joint 53.0 %" in text
    assert "joint -26.0 points against base" in text
    other = text_of(advised(json.loads(summarized(ft_rag=95)))["performance"])
    assert other.startswith(
        "ft_rag answers most questions right, 95.0 %, 7.0 points more than joint"
    )


def test_who_is_level_with_the_best_is_said_at_the_level_that_was_asked_for_only():
    results = json.loads(summarized(frozen_rag=87, ft_rag=88))
    plain, asked = (text_of(advised(results, a)["performance"]) for a in (None, 0.05))
    assert "no more than joint (88.0 %)" in plain or "no more than ft_rag (88.0 %)" in plain
    assert "not told apart" not in plain and "frozen_rag (p = 1)" in asked
    i, j = (results["pairwise"]["arms"].index(n) for n in ("frozen_rag", "ft"))
    assert results["pairwise"]["holm_p"][i][j] < 0.05 and "ft (p" not in asked
    assert "no tested arm is level" in text_of(advised(table(), 0.05)["performance"])


# --- what is missing, and the command line -------------------------------------------------------


def test_what_the_table_cannot_answer_is_said_with_the_command_that_would():
    results = summarize("made up", [make_arm("base", exactly(2, 10))], seed=0, environment={})
    found = advised(results)
    told = {name: [missing.what for missing in answer.missing] for name, answer in found.items()}
    assert told["stability"] == ["an arm that retrieves", "an arm that only fine-tunes"]
    assert found["stability"].missing[0].command == f"{COMPARE} arms=[base,frozen_rag] out=NEW"
    assert "an arm that retrieves" in told["verifiability"]
    assert "a second arm" in told["performance"] and not found["updates"].sentences
    assert "control_accuracy of base" in told["performance"]
    only_ft = advised(table(joint={"k": 0}, frozen_rag={"k": 0}, ft_rag={"k": 0}))
    assert not only_ft["stability"].sentences and only_ft["stability"].missing


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["advise", *map(str, words)])
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(table()))
    return tmp_path


def test_the_command_prints_the_answers_of_a_directory_and_of_its_file(
    directory: Path, capsys: pytest.CaptureFixture[str]
):
    status, out, err = run(capsys, directory)
    assert (status, err) == (0, "") and out.startswith("made up: 100 questions, 6 arms")
    titles = [line[:2] for line in out.splitlines() if line[:1].isdigit()]
    assert titles == [f"{number}." for number in range(1, 6)]
    for answer in advice.advise(table(), COMPARE):
        assert " ".join(answer.sentences) in " ".join(out.split())
        assert f"From {', '.join(answer.arms)}: {', '.join(answer.keys)}." in " ".join(out.split())
    assert run(capsys, directory / "results.json") == (0, out, "")
    status, out, _ = run(capsys, directory, "--json", "--alpha", "0.05")
    told = json.loads(out)
    assert (status, told["format"], told["n"]) == (0, "rag2.advice/1", 100)
    rows = [
        answer.row() for answer in advice.advise(table(), "rag2 eval compare -c CONFIG.yaml", 0.05)
    ]
    assert told["answers"] == json.loads(json.dumps(rows))


def test_the_command_to_measure_names_the_settings_that_lie_beside_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    results = summarize("made up", [make_arm("base", exactly(2, 10))], seed=0, environment={})
    (tmp_path / "results.json").write_text(json.dumps(results))
    told = json.loads(run(capsys, tmp_path, "--json")[1])["answers"][0]["missing"][0]["command"]
    assert told.startswith("rag2 eval compare -c CONFIG.yaml arms=[")
    (tmp_path / "config.yaml").write_text("generators: {}\n")
    told = json.loads(run(capsys, tmp_path, "--json")[1])["answers"][0]["missing"][0]["command"]
    assert told.startswith(f"rag2 eval compare -c {tmp_path / 'config.yaml'} arms=[")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no results.json in it"),
        ("not json", "is not JSON"),
        ('{"format": "rag2.results/0"}', "has format 'rag2.results/0'; this version reads"),
        ('{"format": "rag2.results/1"}', "is incomplete: no arms"),
        ("[]", "has format 'None'"),
        (json.dumps(table() | {"arms": {}}), "is incomplete: no arms"),
        (json.dumps(table() | {"arms": {"base": {"k": 0}}}), "arm base has no accuracy"),
        (json.dumps(table() | {"arms": {"majority": {"accuracy": 1}}}), "only controls"),
    ],
)
def test_a_file_that_holds_no_results_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    status, out, err = run(capsys, tmp_path)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
    assert message in err


def test_a_path_or_level_that_cannot_be_is_one_line(
    directory: Path, capsys: pytest.CaptureFixture[str]
):
    for words, message in (
        ([directory / "none"], "there is no such file or directory"),
        ([directory, "--alpha", "2"], "--alpha 2.0: a p value between 0 and 1"),
        ([], "missing argument 'RESULTS'"),
    ):
        status, _, err = run(capsys, *words)
        assert status == 2 and message in err and err.count("\n") == 1
