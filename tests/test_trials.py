"""Fine-tuning methods beside each other: equal chances, chosen on validation, told as measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from made import exactly, make_arm
from rag2 import stages
from rag2.evaluation import methods
from rag2.evaluation.methods import Grid, Rate
from rag2.registry import UserError
from small_runs import Load
from small_sweeps import in_this_process

TWO = {"full": {"tuning": "full"}, "lora": {"tuning": {"name": "lora", "rank": 2}}}


def test_a_rate_is_chosen_by_validation_for_each_use_apart_and_ties_go_to_the_smaller():
    grid = Grid([Rate(1e-2, 0.5, 0.1), Rate(1e-4, 0.4, 0.6), Rate(1e-3, 0.5, 0.6)])
    assert grid.best("closed") == 1e-3 and grid.best("rag") == 1e-4
    assert grid.chosen == [1e-4, 1e-3]
    assert Grid([Rate(1e-3, 0.5, 0.6)]).chosen == [1e-3]
    assert (grid.at_end("closed"), grid.at_end("rag")) == (False, True)  # 1e-3, 1e-4
    assert not Grid([Rate(1e-3, 0.5, 0.6)]).at_end("rag")  # nothing was tried beside it


def test_a_method_alone_is_compared_with_the_base_and_one_with_retrieval_with_frozen_rag():
    right = {"base": 30, "frozen_rag": 70, "full": 45, "full_rag": 60}
    arms = {name: make_arm(name, exactly(count, 100)) for name, count in right.items()}
    block = methods.summary(arms, {"full": Grid([Rate(1e-3, 0.5, 0.6)])}, seed=0)
    closed, rag = block["rows"]
    assert (closed["arm"], closed["against"], rag["arm"], rag["against"]) == (
        *("full", "base"),
        *("full_rag", "frozen_rag"),
    )
    assert closed["difference"] == pytest.approx(0.15)
    assert rag["difference"] == pytest.approx(-0.1)
    # 15 and 10 questions, all one way: two-sided exact p, and Holm's for two looks.
    assert closed["mcnemar_p"] == pytest.approx(2 * 0.5**15)
    assert closed["holm_p"] == pytest.approx(2 * closed["mcnemar_p"])
    assert rag["holm_p"] == pytest.approx(rag["mcnemar_p"]) == pytest.approx(2 * 0.5**10)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch):
    """The runs of training, in this process."""
    names: list[str] = []
    threads = torch.get_num_threads()
    monkeypatch.setattr(stages, "run", in_this_process(names))
    yield names
    torch.set_num_threads(threads)


@pytest.fixture
def given(home: Path, tmp_path: Path) -> dict[str, Any]:
    """A comparison of two methods on the small world, nothing left to be made."""
    data, asked = home / "data", []
    rows = [json.loads(line) for line in (data / "questions.jsonl").read_text().splitlines()]
    for part, count in (("train", 4), ("validation", 12), ("test", 16)):
        asked += [row for row in rows if row["split"] == part][:count]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    control = tmp_path / "control.jsonl"
    lines = (data / "control.jsonl").read_text().splitlines(keepends=True)
    control.write_text("".join(lines[:4]))
    return {
        **{"kb": str(data / "kb.sqlite"), "questions": str(questions), "control": str(control)},
        **{name: str(home / name) for name in ("generator", "retriever")},
        "unrelated": str(data / "documents.jsonl"),
        "texts": 3,
        "out": str(tmp_path / "out"),
        "methods": TWO,
        "settings": {"steps": 2, "batch_size": 2, "objective": {"block": 32}},
        "lrs": [1e-3, 1e-2],
        "ks": [0, 1],
    }


def compare(recipe: Load, given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    module = recipe("eval/methods.py")
    return module.main(module.MethodsConfig(**given | changes))


def test_every_method_is_trained_at_every_rate_once_and_at_the_chosen_ones_on_other_seeds(
    recipe: Load, given: dict[str, Any], ran: list[str]
):
    results = compare(recipe, given, seeds=[0, 1])
    on_first = [f"{name}@{lr:g}" for name in TWO for lr in given["lrs"]]
    chosen = {(row["arm"].removesuffix("_rag"), row["lr"]) for row in results["methods"]["rows"]}
    assert ran[:4] == on_first and sorted(ran[4:]) == sorted(f"{n}@{lr:g}" for n, lr in chosen)
    for name, rates in results["methods"]["rates"].items():
        rows = {row["arm"]: row["lr"] for row in results["methods"]["rows"]}
        for kind, arm in (("closed", name), ("rag", f"{name}_rag")):
            best = max(rate[kind] for rate in rates)
            assert rows[arm] == min(rate["lr"] for rate in rates if rate[kind] == best)
    for row in results["methods"]["rows"]:
        name = row["arm"].removesuffix("_rag")
        assert results["arms"][row["arm"]]["generator"] == f"{name}@{row['lr']:g}"
    assert results["methods"]["shared_questions"]
    assert list(results["arms"]) == [
        *("base", "frozen_rag", "full", "full_rag", "lora", "lora_rag"),
    ]
    assert results["n"] == 32 and set(results["seeds"]) == {"0", "1"}
    nats = {name: arm["unrelated_nats"] for name, arm in results["arms"].items()}
    assert nats["base"] == nats["frozen_rag"] != nats["full"]
    lora = results["arms"]["lora"]
    assert 0 < lora["trained_parameters"] < results["arms"]["full"]["trained_parameters"]
    table = (Path(given["out"]) / "methods.md").read_text()
    assert all(f"| {name} |" in table for name in results["arms"])

    before, again = len(ran), compare(recipe, given, seeds=[0, 1])
    assert len(ran) == before  # nothing is trained twice
    accuracy = {name: arm["accuracy"] for name, arm in again["arms"].items()}
    assert accuracy == {name: arm["accuracy"] for name, arm in results["arms"].items()}


def test_a_rate_at_which_training_fails_is_told_and_not_chosen(
    recipe: Load,
    given: dict[str, Any],
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    inside = stages.run

    def run(jobs, at_once, done, failed):
        for job in jobs:
            if job.name == "full@1e+30":
                failed(job.name, stages.Failed(job, "the loss is not finite"))
            else:
                inside([job], at_once, done, failed)

    monkeypatch.setattr(stages, "run", run)
    only = {"full": {"tuning": "full"}}
    results = compare(recipe, given, methods=only, lrs=[1e-3, 1e30])
    assert [rate["lr"] for rate in results["methods"]["rates"]["full"]] == [1e-3]
    assert "full@1e+30" in caplog.text and "not finite" in caplog.text
    with pytest.raises(UserError, match="training failed for all of them at every rate"):
        compare(recipe, given, methods=only, lrs=[1e30], out=given["out"] + "2")


def test_a_method_that_cannot_be_trained_is_left_out_and_told(
    recipe: Load, given: dict[str, Any], ran: list[str]
):
    bad = {"tuning": {"name": "lora", "target_modules": ["nowhere"]}}
    only = {"full": {"tuning": "full"}, "bad": bad}
    results = compare(recipe, given, methods=only, lrs=[1e-3])
    assert list(results["arms"]) == ["base", "frozen_rag", "full", "full_rag"]
    assert results["left_out"] == {"bad": "no rate trained it"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {"full": {"tuning": "fll"}}}, "methods.full: .*'fll'.*full"),
        ({"methods": {"base": {"tuning": "full"}}}, "'base' cannot be a row"),
        ({"methods": {"x": {"lr": 1.0}}}, "x.lr is the same for all methods"),
        ({"settings": {"seed": 9}}, "settings.seed is the same for all methods"),
        ({"methods": {"x": {"kb": "other"}}}, "x.kb is the same for all methods"),
        ({"ks": [0, -1]}, "greater than or equal to 0"),
        ({"ks": [0, 99_999]}, r"ks=\[0, 99999\]: the corpus has \d+ chunks"),
        ({"lrs": [1e-3, 1e-3]}, "holds a value twice"),
        (
            {"settings": {"paraphrases_per_document": 2}},
            "methods.full learns from paraphrases: set paraphrases=FILE",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_trained(
    recipe: Load, given: dict[str, Any], ran: list[str], changes: dict[str, Any], said: str
):
    with pytest.raises(ValueError, match=said):
        compare(recipe, given, **changes)
    assert not ran


def test_what_validation_chooses_does_not_look_at_the_test_questions(
    recipe: Load, given: dict[str, Any], ran: list[str], tmp_path: Path
):
    given |= {"methods": {"full": {"tuning": "full"}}, "lrs": [1e-2]}
    results = compare(recipe, given)
    rows = [json.loads(line) for line in Path(given["questions"]).read_text().splitlines()]
    for row in rows:
        if row["split"] == "test":
            row["answer"] = (row["answer"] + 1) % len(row["choices"])
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    second = given["out"] + "2"
    other = compare(recipe, given, questions=str(changed), out=second)
    assert other["methods"]["rates"] == results["methods"]["rates"]
    assert other["k_selection"]["chosen"] == results["k_selection"]["chosen"]
    right = [(Path(out) / "samples_base.jsonl").read_text() for out in (given["out"], second)]
    assert right[0] != right[1]  # else nothing was changed
