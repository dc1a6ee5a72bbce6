"""Comparisons of own systems on own questions: which arms run, both readings, every measure."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from rag2 import config
from rag2.evaluation import arms, score
from rag2.evaluation.arms import Found, Reader
from rag2.evaluation.questions import load_questions, split, to_row
from rag2.evaluation.select import Choice
from rag2.generator.exact import exact_choices, exact_logprobs
from rag2.generator.load import Generator
from rag2.generator.logprob import pair_logprobs
from rag2.generator.pairs import encode_pairs
from rag2.generator.prompt import Prompt
from rag2.registry import UserError
from rag2.types import Chunk, Question
from small_world import roughen

Compare = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def own(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generators whose answers differ, and 24 test questions, half of them of a subject."""
    folder = tmp_path_factory.mktemp("own")
    for number, name in enumerate(("base", "ft")):
        generator = Generator.load(home / "generator")
        torch.manual_seed(number)
        roughen(generator.model, 0.05)
        generator.save(folder / name)
    questions = load_questions(home / "data" / "questions.jsonl")
    parts = {name: split(questions, name)[:24] for name in ("train", "validation", "test")}
    with (folder / "questions.jsonl").open("w") as file:
        for part in parts.values():
            for number, question in enumerate(part):
                subject = ("law", "history")[number % 2]
                file.write(json.dumps(to_row(replace(question, metadata={"subject": subject}))))
                file.write("\n")
    return folder


@pytest.fixture(scope="module")
def compare(recipe: Callable[[str], ModuleType], own: Path, home: Path) -> Compare:
    """`eval compare` on the own systems; returns results.json as written."""
    module = recipe("eval/compare.py")

    def run(out: Path, *changes: str) -> dict[str, Any]:
        settings = [f"kb={home / 'data' / 'kb.sqlite'}", f"questions={own / 'questions.jsonl'}"]
        settings += [f"generators.{name}={own / name}" for name in ("base", "ft")]
        settings += [f"retrievers.warm={home / 'retriever'}", "ks=[0,1,2,3]", f"out={out}"]
        threads = torch.get_num_threads()
        module.main(config.load(module.CompareConfig, None, [*settings, *changes]))
        torch.set_num_threads(threads)
        return json.loads((out / "results.json").read_text())

    return run


@pytest.fixture(scope="module")
def results(compare: Compare, own: Path) -> dict[str, Any]:
    """Everything at once."""
    return compare(
        own / "out", "readings=[marginal,concat]", "metrics=[mutual_info,debiased]",
        "prompt.format=letters", "shots.count=1", "prompt.description=About {subject}.",
        "prompt.budget=480",
    )  # fmt: skip


def test_the_arms_whose_parts_are_given_run_and_no_others(results: dict[str, Any]):
    rag = {"frozen_rag", "bm25_rag", "hybrid_rag", "ft_rag", "random_rag", "gold_rag"}
    rag |= {"ensemble", "router"}
    assert set(results["arms"]) == {"base", "ft", "majority"} | rag
    assert results["task"] == "questions (letters, 1 shots)" and results["n"] == 24
    assert results["arms"]["ft"]["train_seconds"] is None  # nobody knows what it took
    assert "majority" in results["pairwise"]["arms"]
    # Nobody knows either what arms were trained on that were brought along.
    assert len(results["paired"]) == 7 and {row["equal"] for row in results["paired"]} == {None}


def test_every_k_and_reading_is_listed_and_the_best_on_validation_is_the_arm(
    results: dict[str, Any],
):
    for name in ("frozen_rag", "bm25_rag", "ft_rag"):
        arm = results["arms"][name]
        assert set(arm["readings"]) == set(arm["by_k"]) == {"marginal", "concat"}
        assert [row["k"] for row in arm["by_k"]["marginal"]] == [0, 1, 2, 3]
        assert [row["k"] for row in arm["by_k"]["concat"]] == [2, 3]
        rows = [(r["validation_accuracy"], r) for found in arm["by_k"].values() for r in found]
        best = max(value for value, _ in rows)
        assert results["k_selection"]["accuracy"][name] == best
        chosen = [r for value, r in rows if value == best and r["k"] == arm["k"]]
        assert arm["accuracy"] in {row["accuracy"] for row in chosen}
        assert arm["readings"][arm["reading"]]["accuracy"] == arm["accuracy"]


def test_samples_tell_the_prompt_with_examples_and_every_measure_agrees_with_its_mean(
    results: dict[str, Any], own: Path
):
    for name in ("base", "frozen_rag"):
        path = own / "out" / f"samples_{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        first = rows[0]["arguments"]["gen_args_1"]
        assert first["arg_0"].startswith("About law.") and first["arg_1"] == " B"
        assert first["arg_0"].count("Answer:") == 2
        arm = results["arms"][name]
        keys = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "debiased_accuracy")
        assert rows[0]["metrics"] == list(keys)
        for key, reported in zip(keys, ("accuracy", *keys[1:]), strict=True):
            assert np.mean([row[key] for row in rows]) == pytest.approx(arm[reported], rel=1e-5)
        assert arm["acc_norm"] == arm["accuracy"]  # letters are all one character long
    subjects = results["arms"]["base"]["groups"]["subject"]
    assert {label: found["n"] for label, found in subjects.items()} == {"history": 12, "law": 12}
    test = results["paired"][0]["groups"]["subject"]
    assert all(row["holm_p"] >= row["mcnemar_p"] for row in test.values())


def test_the_tokens_of_an_arm_are_those_of_the_prompts_it_answers_from(
    results: dict[str, Any], own: Path
):
    tokenizer = Generator.load(own / "base").tokenizer
    read = 0  # the context of a question once, and each of its choices
    for line in (own / "out" / "samples_base.jsonl").read_text().splitlines():
        asked = [tuple(row.values()) for row in json.loads(line)["arguments"].values()]
        pairs = encode_pairs(tokenizer, asked)
        read += len(pairs[0][0]) + sum(len(choice) for _, choice in pairs)
    tokens = {name: arm["eval_tokens"] for name, arm in results["arms"].items()}
    assert tokens["base"] == tokens["ft"] == read < tokens["gold_rag"]
    assert tokens["frozen_rag"] > read or results["arms"]["frozen_rag"]["k"] == 0
    assert tokens["majority"] is None


def test_the_exact_path_gives_the_bits_of_a_whole_forward_for_every_choice(
    recipe: Callable[[str], ModuleType], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    generator = Generator.load(own / "base")
    asked = split(load_questions(own / "questions.jsonl"), "test")[:5]
    slow, fast = (Reader(generator, Prompt(), {}, exact=exact) for exact in (True, False))
    for reader in (slow, fast):
        reader.read([(question, ()) for question in asked])
    for question in asked:
        context = f"Question: {question.question}\nAnswer:"
        texts = [(context, f" {choice}") for choice in question.choices]
        expected = exact_logprobs(generator.model, encode_pairs(generator.tokenizer, texts))
        assert slow.known[question.id, ()] == expected
        assert fast.known[question.id, ()] == pytest.approx(expected, abs=1e-4)

    module, read = recipe("eval/mc.py"), []
    monkeypatch.setattr(arms, "exact_choices", lambda *a: read.append(a) or exact_choices(*a))
    given = [f"generator={own / 'base'}", f"questions={own / 'questions.jsonl'}", "split=test"]
    found = []
    for number, exact in enumerate(("true", "false")):
        out = tmp_path / str(number)
        module.main(config.load(module.McConfig, None, [*given, f"exact={exact}", f"out={out}"]))
        found.append(json.loads((out / "results.json").read_text())["arms"]["base"])
    assert len(read) == 1 and found[0]["accuracy"] == found[1]["accuracy"]


def test_both_readings_equal_a_computation_by_hand_one_full_sequence_a_pair(
    home: Path, own: Path, chunks: list[Chunk]
):
    generator = Generator.load(own / "base")
    asked = split(load_questions(home / "data" / "questions.jsonl"), "test")[:3]
    ids_QK = np.array([[chunks[3 * i + j].id for j in range(3)] for i in range(3)])
    scores_QK = np.array([[2.0, 1.0, 0.5]] * 3)
    by_id = {chunk.id: chunk for chunk in chunks}
    reader = Reader(generator, Prompt(), by_id)
    found = arms.evaluate(asked, Found(scores_QK, ids_QK), reader, concat=[2, 3])

    def by_hand(question: Question, picked: list[int]) -> np.ndarray:
        passages = [by_id[i].passage for i in reversed(picked)]  # the best one stands last
        context = "\n\n".join([*passages, f"Question: {question.question}\nAnswer:"])
        texts = [(context, f" {choice}") for choice in question.choices]
        return np.array(pair_logprobs(generator.model, encode_pairs(generator.tokenizer, texts)))

    for row, question in enumerate(asked):
        picked = ids_QK[row].tolist()
        for k in (2, 3):
            concat_QC = score.read(found, "concat", k)
            np.testing.assert_allclose(concat_QC[row], by_hand(question, picked[:k]), atol=1e-4)
            prior_K = log_softmax(scores_QK[row, :k] / 2.0)
            alone_KC = np.stack([by_hand(question, [chunk]) for chunk in picked[:k]])
            mixed = np.asarray(logsumexp(prior_K[:, None] + alone_KC, axis=0))
            marginal_QC = score.read(found, "marginal", k, 2.0)
            np.testing.assert_allclose(marginal_QC[row], mixed, atol=1e-4)
            assert np.abs(concat_QC[row] - marginal_QC[row]).max() > 1e-3


class Lettered(Reader):
    """Prefers the letter A by far, and knows the answer a little: the planted bias."""

    def _encode(self, contexts, continuations, names):
        self.texts = list(zip(contexts, continuations, strict=True))
        return super()._encode(contexts, continuations, names)

    def _score(self, encoded):
        scored = []
        for context, letters in self.texts:
            lines = context.split("\n")
            right = [f"{letter.strip()}. right" in lines for letter in letters]
            bias = [1.0 * (letter == " A") for letter in letters]
            scored.append([b + 0.5 * r - 3.0 for b, r in zip(bias, right, strict=True)])
        return scored


def test_a_preference_for_a_letter_cancels_when_the_choices_take_turns(generator: Generator):
    questions = []
    for number in range(9):
        choices = [f"wrong {i}" for i in range(3 + number % 2)]
        choices[number % 3] = "right"
        questions.append(Question(f"q{number}", "Which?", tuple(choices), number % 3))
    reader = Lettered(generator, Prompt(format="letters"), {})
    found = arms.retrieve(questions, None, 0)
    closed = arms.evaluate(questions, found, reader).closed_QC
    answers_Q = score.answers(questions)
    assert np.mean(score.predict(closed) == answers_Q) == pytest.approx(1 / 3)
    picks_Q = arms.debiased(questions, found, reader, Choice(0, 1.0, 0.0))
    np.testing.assert_array_equal(picks_Q, answers_Q)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["arms=[joint]"], "arm joint lacks its generator: set generators={joint: PATH}"),
        (["generators.bse=x"], "generators: unknown name 'bse'.* Did you mean 'base'"),
        (["retrievers.wram=x"], "retrievers: unknown name 'wram'.* Did you mean 'warm'"),
        (["shots.count=99"], "shots=99: question .* has only 12 worked examples of subject"),
        (["kb=null"], "world is not given: set world=NAME, or kb=, questions= and generators="),
        (["readings=[both]"], "readings"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_scored(
    compare: Compare, tmp_path: Path, changes: list[str], message: str
):
    with pytest.raises(UserError, match=message):
        compare(tmp_path / "out", *changes)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_never_writes_over_another_one(compare: Compare, own: Path, tmp_path: Path):
    out = tmp_path / "out"
    compare(out, "arms=[base,majority]", "limit=5")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"holds what was made with limit=5, not 4: choose another"):
        compare(out, "arms=[base,majority]", "limit=4")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    saved = config.read(out / "config.yaml")
    assert saved["generators"]["base"] == str(own / "base") and saved["limit"] == 5
    compare(out, "arms=[base,majority]", "limit=5")  # the same again is no other one
    (out / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"holds results.json and no config.yaml"):
        compare(out, "arms=[base,majority]", "limit=5")


def test_a_place_that_cannot_be_written_to_is_found_before_the_work(
    compare: Compare, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(arms, "evaluate", lambda *_: pytest.fail("it was scored"))
    with pytest.raises(UserError, match=r"out='/proc/foo' cannot be written to"):
        compare(Path("/proc/foo"), "arms=[base]")


def asking(path: Path, own: Path) -> list[Question]:
    """Write the own questions, first those of test, whose answer is the first choice; it is the
    second one for the others."""
    questions = load_questions(own / "questions.jsonl")
    made = []
    for question in sorted(questions, key=lambda question: question.split != "test"):
        first, second = question.gold, next(c for c in question.choices if c != question.gold)
        choices = (first, second) if question.split == "test" else (second, first)
        answer = choices.index(question.gold)
        made.append(replace(question, choices=choices, answer=answer, metadata={}))
    path.write_text("".join(json.dumps(to_row(question)) + "\n" for question in made))
    return made


def prompts(out: Path) -> list[str]:
    """What each question was asked with, without passages."""
    lines = (out / "samples_base.jsonl").read_text().splitlines()
    return [json.loads(line)["arguments"]["gen_args_0"]["arg_0"] for line in lines]


def test_the_constant_answer_and_the_worked_examples_come_from_training_questions(
    compare: Compare, own: Path, tmp_path: Path
):
    asked = asking(tmp_path / "q.jsonl", own)
    out = tmp_path / "out"
    given = [f"questions={tmp_path / 'q.jsonl'}", "arms=[base,majority]", "limit=5"]
    found = compare(out, *given, "shots.count=2")
    assert found["arms"]["majority"]["accuracy"] == 0, "the most frequent answer of test itself"
    header = Prompt().header("", split(asked, "train")[:2])
    assert [text.startswith(header) for text in prompts(out)] == [True] * 5


def test_the_questions_of_test_are_asked_unless_another_split_is_named(
    recipe: Callable[[str], ModuleType], own: Path, tmp_path: Path
):
    asked, module = asking(tmp_path / "q.jsonl", own), recipe("eval/mc.py")
    given = [f"generator={own / 'base'}", f"questions={tmp_path / 'q.jsonl'}", "shots=2"]
    for name, change in (("test", []), ("validation", ["split=validation"])):
        out = tmp_path / name
        module.main(config.load(module.McConfig, None, [*given, *change, f"out={out}"]))
        header = Prompt().header("", split(asked, "train")[:2])  # whatever else the file holds
        assert prompts(out) == [
            f"{header}Question: {question.question.strip()}\nAnswer:"
            for question in split(asked, name)
        ]


def test_without_validation_questions_only_arms_without_a_choice_run(
    compare: Compare, own: Path, tmp_path: Path
):
    lines = (own / "questions.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"split": "validation"' not in line]
    (tmp_path / "q.jsonl").write_text("\n".join(kept) + "\n")
    changes = [f"questions={tmp_path / 'q.jsonl'}"]
    with pytest.raises(UserError, match="frozen_rag lacks validation questions"):
        compare(tmp_path / "out", *changes, "arms=[base,frozen_rag]")
    found = compare(tmp_path / "out", *changes)["arms"]
    assert set(found) == {"base", "ft", "gold_rag", "majority"}
