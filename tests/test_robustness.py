"""Robustness: when an arm keeps silent, whether it follows an edited corpus, what is reported."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from made import exactly, make_questions
from rag2 import config
from rag2.evaluation import arms, confidence, counterfactual, robustness
from rag2.evaluation import robustness_numbers as numbers
from rag2.evaluation.arms import Item, Reader
from rag2.evaluation.confidence import Threshold
from rag2.evaluation.counterfactual import Edit, edited_found, replaced, stated
from rag2.evaluation.perplexity import Perplexity
from rag2.evaluation.questions import load_questions, question_of, split, to_row
from rag2.evaluation.robustness import Answers, Measured
from rag2.evaluation.select import Choice
from rag2.generator.prompt import Prompt
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.retrieval import Dense, Gold, gold_chunks
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk, Question
from rag2.worlds.almanac import Almanac


class Literal(Reader):
    """A reader without a generator: it believes the last passage that states a choice; where none
    does it remembers, which is right."""

    def __init__(self, by_id: dict[int, Chunk]) -> None:
        nothing: Any = None
        super().__init__(nothing, Prompt(), by_id)

    def read(self, items: Sequence[Item]) -> None:
        """As Reader.read."""
        for question, ids in items:
            text = self.by_id[ids[0]].text if ids else ""
            told = [i for i, choice in enumerate(question.choices) if stated(choice, text)]
            pick = told[-1] if told else question.answer
            self.known[question.id, ids] = [-0.1 if i == pick else -9.0 for i in range(4)]


@pytest.fixture(scope="module")
def asked(home: Path) -> list[Question]:
    return split(load_questions(home / "data" / "questions.jsonl"), "test")


@pytest.fixture(scope="module")
def corpus(home: Path) -> list[Chunk]:
    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        return kb.chunks()


@pytest.fixture(scope="module")
def edits(
    home: Path,
    asked: list[Question],
    corpus: list[Chunk],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Edit]:
    """An edit for nearly every test question of the small world."""
    gold = gold_chunks(asked, corpus)
    folder = tmp_path_factory.mktemp("edited")
    found, left_out = counterfactual.edit(home / "data" / "kb.sqlite", folder, asked, gold)
    assert len(found) + sum(left_out.values()) == len(asked)
    assert len(found) > 0.9 * len(asked), left_out
    return found


# --- confidence ----------------------------------------------------------------------------------


def test_the_threshold_answers_as_many_as_it_may(rng: np.random.Generator):
    for target in (0.3, 0.6, 0.9):
        for _ in range(50):
            sure_Q = rng.integers(0, 6, 20) / 6  # many ties
            right_Q = rng.random(20) < sure_Q
            kept = [sure_Q >= value for value in np.unique(sure_Q)]
            shares = [(right_Q[rows].mean(), rows.mean()) for rows in kept]
            good = [share for share in shares if share[0] >= target]
            best = max(good, key=lambda s: s[1]) if good else max(shares)
            found = confidence.choose_threshold(sure_Q, right_Q, target)
            assert found.reached == bool(good)
            assert (found.precision, found.coverage) == pytest.approx(best)
            rows = sure_Q >= found.value
            assert (right_Q[rows].mean(), rows.mean()) == pytest.approx(best)


def test_auroc_is_the_share_of_pairs_in_the_right_order(rng: np.random.Generator):
    upper, lower = rng.integers(0, 9, 30) / 8, rng.integers(0, 8, 20) / 8
    wins = (upper[:, None] > lower).mean() + (upper[:, None] == lower).mean() / 2
    assert confidence.auroc(upper, lower) == pytest.approx(wins)
    low, high = confidence.auroc_interval(upper, lower) or (1, 0)
    assert low < wins < high
    assert confidence.auroc(upper, lower[:0]) is None


def test_an_arm_as_sure_as_it_is_right_has_no_calibration_error():
    sure_Q = np.repeat([0.25, 0.75], 40)
    right_Q = np.concatenate([exactly(10, 40), exactly(30, 40)])
    assert confidence.calibration_error(sure_Q, right_Q) == pytest.approx(0)
    assert confidence.calibration_error(np.ones(80), right_Q) == pytest.approx(0.5)


def test_ten_bins_see_that_one_is_too_sure_at_one_end_and_not_sure_enough_at_the_other():
    sure_Q = np.repeat([0.65, 0.95], 40)  # of two bins there would be one, with a mean of no error
    right_Q = np.concatenate([exactly(38, 40), exactly(26, 40)])
    assert confidence.calibration_error(sure_Q, right_Q) == pytest.approx(0.3)


def said(sure: Sequence[float], right: Sequence[bool]) -> Answers:
    nothing: Any = None
    flags_Q = np.array(right)
    return Answers(
        make_questions(len(right)), nothing, flags_Q.astype(int), flags_Q, np.array(sure)
    )


def test_what_an_arm_is_sure_of_is_told_by_whether_it_is_right_and_by_where_it_was_asked():
    threshold = Threshold(0.5, 0.9, True, 1.0, 1.0)
    sets = {
        "test": said([0.9, 0.8, 0.7, 0.2, 0.1], [True, True, False, False, True]),
        "absent": said([0.95, 0.6, 0.3, 0.15], [True, False, False, False]),
    }
    flags = robustness.flags_of(sets, threshold)
    assert flags["answered"].tolist() == [True, True, True, False, False]
    assert flags["confident_wrong"].tolist() == [False, False, True, False, False]
    assert flags["abstained"].tolist() == [False, False, True, True]
    # The first answer is right by chance: whoever asks learns nothing wrong.
    assert flags["absent_confident_wrong"].tolist() == [False, True, False, False]

    flags |= {name: flags["test"] for name in ("wrote_choice", "wrote_value", "wrote_right")}
    choice = Choice(0, 1.0, float("nan"))
    made = [
        Measured(name, arms.Arm(name), choice, threshold, sets, flags, {})
        for name in ("base", "ft")
    ]
    tokens_Q = np.full(3, 10.0)
    surprise = {
        name: {"unrelated": Perplexity(np.full(3, nats), tokens_Q, tokens_Q)}
        for name, nats in (("base", 20.0), ("ft", 25.0))
    }
    rows = numbers.summarize("task", made, surprise, seed=0)["arms"]
    told = rows["ft"]["abstention"]
    # Of 5 x 4 pairs the answerable question is the surer one in 3 + 3 + 3 + 1 + 0.
    assert told["auroc_answerable"]["value"] == pytest.approx(10 / 20)
    # Of 3 x 2 pairs the right answer is the surer one in 2 + 2 + 0.
    assert told["auroc_right"]["value"] == pytest.approx(4 / 6)
    assert told["selective_accuracy"]["rate"] == pytest.approx(2 / 3)
    assert rows["ft"]["perplexity"]["unrelated"]["to_base"]["difference"] == pytest.approx(0.5)


# --- the almanac's own questions -----------------------------------------------------------------


def test_no_document_mentions_whom_absent_questions_ask_about(almanac: Almanac):
    rows = [question_of(row, "world") for row in almanac.absent()]
    text = "\n".join(f"{row['title']}\n{row['text']}" for row in almanac.documents())
    tests = [row["metadata"] for row in almanac.questions() if row["split"] == "test"]
    assert len(rows) == len(tests)
    assert {q.metadata["relation"] for q in rows} == {row["relation"] for row in tests}
    assert {q.metadata["wording"] for q in rows} == {"seen", "unseen"}
    towns = {entity.name for entity in almanac.world.entities if entity.kind.name == "town"}
    for question in rows:
        assert question.metadata["entity"] not in text and not question.evidence
        assert question.metadata["entity"] in question.question
        if question.metadata["relation"] in ("home", "site"):
            assert set(question.choices) <= towns


def test_rewordings_of_a_fact_share_their_choices_and_differ_in_words(almanac: Almanac):
    rows = [question_of(row, "world") for row in almanac.rewordings()]
    groups = robustness.facts(rows)
    assert len(groups) == 16 * 8
    for group in groups:
        some = [rows[i] for i in group]
        assert len({q.question for q in some}) == len(some) == 4
        assert len({(q.choices, q.answer, q.evidence) for q in some}) == 1


def test_texts_beside_the_world_mention_none_of_its_names(almanac: Almanac):
    names = set(almanac.world.parts)
    for rows in (almanac.unrelated(60), almanac.held_out(30)):
        words = {word for row in rows for word in f"{row['title']} {row['text']}".split()}
        assert len(words) > 100 and not words & names


# --- edits ---------------------------------------------------------------------------------------


def test_an_edit_changes_the_fact_and_nothing_else(edits: list[Edit], corpus: list[Chunk]):
    by_id = {chunk.id: chunk for chunk in corpus}
    fresh = [chunk.id for edit in edits for chunk in edit.chunks.values()]
    assert len(set(fresh)) == len(fresh) and not by_id.keys() & set(fresh)
    for edit in edits:
        old, new = edit.question.gold, edit.question.choices[edit.target]
        assert edit.target != edit.question.answer
        for id, chunk in edit.chunks.items():
            assert stated(old, by_id[id].text) and not stated(new, by_id[id].text)
            assert stated(new, chunk.text) and not stated(old, chunk.text)
            back, _ = replaced(chunk.text, new, old)
            assert back.casefold() == by_id[id].text.casefold()
            assert (chunk.document, chunk.title) == (by_id[id].document, by_id[id].title)


def test_the_knowledge_base_itself_stays_as_it_was(home: Path, edits: list[Edit], corpus):
    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        assert kb.chunks() == corpus and kb.version == 1


@pytest.mark.parametrize("value", ["zinc", "red granite"])
def test_replacing_keeps_capitals_and_numbers_and_knows_where_everything_went(value: str):
    text = "Zinc? It is 12.5 zinc, and zinc-like; zincs are none."
    made, moved = replaced(text, "zinc", "red granite")
    assert made == "Red granite? It is 12.5 red granite, and red granite-like; zincs are none."
    for word in ("12.5", "and", "-like", "zincs"):
        assert moved(text.index(word)) == made.index(word)
    assert moved(len(text)) == len(made)
    assert not stated("12", text) and not stated("5", text) and stated("12.5", text)


def test_who_reads_follows_and_who_remembers_is_stuck(edits: list[Edit], corpus: list[Chunk]):
    by_id = {chunk.id: chunk for chunk in corpus}
    edited = {chunk.id: chunk for edit in edits for chunk in edit.chunks.values()}
    plain = [  # pages without an aside, which may state a third choice
        edit
        for edit in edits
        if all(
            sum(stated(choice, chunk.text) for choice in edit.question.choices) == 1
            for chunk in edit.chunks.values()
        )
    ]
    assert len(plain) > 0.8 * len(edits)
    edits, questions = plain, [edit.question for edit in plain]
    found = arms.retrieve(questions, Gold(gold_chunks(questions, corpus)), 1)
    reader = Literal(by_id | edited)
    after, touched_Q = edited_found(edits, found, None)
    assert touched_Q.all()
    picks_Q = robustness.read(questions, after, reader, Choice(1, 1.0, 1.0)).picks_Q
    assert picks_Q.tolist() == [edit.target for edit in edits]
    none = arms.retrieve(questions, None, 1)
    after, touched_Q = edited_found(edits, none, None)
    stuck = robustness.read(questions, after, reader, Choice(0, 1.0, 1.0))
    assert stuck.right_Q.all() and not touched_Q.any()


def test_only_the_edited_chunk_of_what_was_found_changes_and_its_score_is_that_of_a_search(
    home: Path, edits: list[Edit], corpus: list[Chunk]
):
    dense = Dense.over(DualEncoder.load(home / "retriever"), corpus)
    questions = [edit.question for edit in edits][:20]
    found = arms.retrieve(questions, dense, len(corpus))
    after, touched_Q = edited_found(edits[:20], found, dense)
    assert touched_Q.all()
    for edit, row in zip(edits, range(20), strict=False):
        place = np.isin(found.ids_QK[row], list(edit.chunks))
        assert place.sum() == len(edit.chunks)
        assert (after.ids_QK[row][~place] == found.ids_QK[row][~place]).all()
        assert (after.scores_QK[row][~place] == found.scores_QK[row][~place]).all()
        new = [edit.chunks[i] for i in found.ids_QK[row][place].tolist()]
        assert after.ids_QK[row][place].tolist() == [chunk.id for chunk in new]
        again = Dense.over(dense.encoder, new)
        scores_QK, ids_QK = again.search([edit.question], len(new))
        expected = dict(zip(ids_QK[0].tolist(), scores_QK[0].tolist(), strict=True))
        rows = zip(after.ids_QK[row][place].tolist(), after.scores_QK[row][place], strict=True)
        assert dict(rows) == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_edited_says_why(corpus: list[Chunk], home: Path):
    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        documents = {document.id: document for document in kb.documents()}
    chunk = corpus[0]
    word, other = chunk.text.split()[1:3]
    ask = Question("q", "?", (word, "unheard"), 0)
    rows = [
        (ask, {"q": [chunk.id]}, None),
        (ask, {}, counterfactual.NO_EVIDENCE),
        (replace(ask, choices=("unsaid", "unheard")), {"q": [chunk.id]}, counterfactual.NOT_STATED),
        (replace(ask, choices=(word, other)), {"q": [chunk.id]}, counterfactual.NO_OTHER),
        (replace(ask, choices=(chunk.title, "x")), {"q": [chunk.id]}, counterfactual.IN_TITLE),
    ]
    for question, gold, reason in rows:
        planned, left_out = counterfactual.plan([question], gold, corpus, documents)
        assert (len(planned), left_out) == ((0, {reason: 1}) if reason else (1, {}))


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(
    recipe: Callable[[str], ModuleType],
    home: Path,
    asked: list[Question],
    almanac: Almanac,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., dict[str, Any]]:
    """`eval robustness` on own files: base and frozen RAG, a dozen questions of each kind."""
    module, own = recipe("eval/robustness.py"), tmp_path_factory.mktemp("own")
    questions = load_questions(home / "data" / "questions.jsonl")
    some = [*split(questions, "validation")[:12], *asked[:12]]
    write(own / "questions.jsonl", map(to_row, some))
    write(own / "absent.jsonl", list(almanac.absent())[:12])
    write(own / "rewordings.jsonl", list(almanac.rewordings())[:12])
    (own / "unrelated.txt").write_text("Call me Ishmael. Some years ago I went to sea.\n")

    def run(out: str, *changes: str) -> dict[str, Any]:
        settings = [f"{key}={own / key}.jsonl" for key in ("questions", "absent", "rewordings")]
        settings += [f"kb={home / 'data' / 'kb.sqlite'}", f"generators.base={home / 'generator'}"]
        settings += [f"retrievers.warm={home / 'retriever'}", "ks=[1,2]", "max_new_tokens=2"]
        settings += [f"unrelated={own / 'unrelated.txt'}", "arms=[base,frozen_rag]"]
        threads = torch.get_num_threads()
        cfg = config.load(module.RobustnessConfig, None, [*settings, f"out={own / out}", *changes])
        module.main(cfg)
        torch.set_num_threads(threads)
        return json.loads((own / out / "robustness.json").read_text())

    return run


def write(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def results(run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run("a")


def test_every_number_has_its_n_and_its_interval(results: dict[str, Any]):
    assert results["format"] == "rag2.robustness/1"
    assert results["n"] == {
        "validation": 12, "test": 12, "control": 0, "absent": 12, "rewordings": 12
    }  # fmt: skip
    base, rag = results["arms"]["base"], results["arms"]["frozen_rag"]
    for arm in (base, rag):
        silent, wrong = (arm["abstention"][f"absent_{x}"] for x in ("abstained", "confident_wrong"))
        assert silent["n"] == wrong["n"] == 12 and silent["count"] + wrong["count"] <= 12
        assert arm["consistency"]["same_choice"]["n"] == 3  # facts, of four wordings each
        assert arm["perplexity"]["unrelated"]["words"] == 10
        kinds = [arm["faithfulness"][kind] for kind in ("followed", "stuck", "other")]
        assert sum(kind["count"] for kind in kinds) == arm["accuracy"]["count"]
        for row in (arm["accuracy"], silent, wrong, *kinds):
            assert row["ci95"][0] <= row["rate"] <= row["ci95"][1]
    assert rag["perplexity"] == base["perplexity"], "the generator is the same"
    assert base["faithfulness"]["stuck"]["rate"] == 1 and rag["k"] in (1, 2)
    difference = rag["accuracy"]["to_base"]["difference"]
    assert difference == pytest.approx(rag["accuracy"]["rate"] - base["accuracy"]["rate"], abs=1e-5)
    assert set(results["left_out"]) >= {"control accuracy", "perplexity on paraphrases text"}


def test_a_second_run_gives_the_same_file(run: Callable[..., dict[str, Any]], results):
    assert run("b") == results


def test_k_and_temperature_may_come_from_a_comparison(
    run: Callable[..., dict[str, Any]], tmp_path: Path
):
    row = {"k": 2, "temperature": 8.0, "reading": "concat"}
    none = dict.fromkeys(("task", "n", "seed", "paired", "k_selection", "environment"))
    made = {"format": "rag2.results/1", **none, "arms": {"frozen_rag": row}}
    (tmp_path / "results.json").write_text(json.dumps(made))
    arm = run("d", f"results={tmp_path}", "arms=[frozen_rag]", "limit=4")["arms"]["frozen_rag"]
    assert {key: arm[key] for key in row} == row
    with pytest.raises(UserError, match="has no K and temperature of arm 'base'"):
        run("e", f"results={tmp_path}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("arms=[frozen_rga]", "unknown arm 'frozen_rga'.*Did you mean 'frozen_rag'"),
        ("arms=[router]", "router has two members, base and frozen_rag: ask for these"),
        ("arms=[ft]", r"arm ft lacks its generator: set generators=\{ft: PATH\}"),
        ("target_precision=0", "target_precision"),
        ("unrelated=nowhere.txt", "'nowhere.txt' does not exist"),
        ("absent=QUESTIONS", "question id .* of absent is used in validation already"),
        ("rewordings=QUESTIONS", "has no metadata.fact"),
    ],
)
def test_a_mistake_is_one_line(
    run: Callable[..., dict[str, Any]], home: Path, change: str, message: str
):
    given = change.replace("QUESTIONS", str(home / "data" / "questions.jsonl"))
    with pytest.raises(UserError, match=message) as caught:
        run("c", given)
    assert "\n" not in str(caught.value)
