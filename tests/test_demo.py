"""The comparison end to end: every arm on a tiny almanac; what the real demo must show (slow)."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from demos import RAG_ARMS, SOURCES, lines
from rag2 import artifact, config, stages
from rag2.evaluation.arms import ARMS, NAMES, ON_REQUEST
from rag2.evaluation.contrasts import EQUAL
from rag2.evaluation.hybrids import HYBRIDS
from rag2.evaluation.questions import load_questions
from rag2.evaluation.results import strip_times
from rag2.generator.load import Generator
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder

ROOT = Path(__file__).resolve().parents[1]
NETWORK = "{hidden: 32, layers: 2, heads: 2, intermediate: 48}"
YAML = {
    "pretrain": f"steps: 6\nbatch_size: 8\nnetwork: {NETWORK}\n",
    "retriever": f"steps: 4\nbatch_size: 16\nvalidate_every: 2\nencoder: {NETWORK}\n",
    "finetune": "steps: 3\nbatch_size: 4\n",
    "joint": "steps: 4\nbatch_size: 4\nrefresh: {every: 2}\n",
    "logged": "question_share: 0.05\nks: [0, 1, 2]\nconfidence: 0\n",
}


class Job:
    """A comparison with settings of its own: `job(out, ...)` runs it and returns results.json."""

    def __init__(self, main: Callable[[Any], dict], cls: type, folder: Path, world: str) -> None:
        self.main, self.cls, self.folder, self.world = main, cls, folder, world
        self.recipes = folder / "recipes"
        self.recipes.mkdir()
        for name, text in YAML.items():
            (self.recipes / f"{name}.yaml").write_text(text)

    def __call__(self, out: Path, home: Path, *changes: str) -> dict[str, Any]:
        settings = [f"world={self.world}", f"recipes={self.recipes}", "vocabulary=400"]
        settings += [f"home={home}", f"out={out}", "ks=[0,1,2]", "limit=40", *changes]
        self.main(config.load(self.cls, None, settings))
        return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def job(
    recipe: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory, almanac
) -> Iterator[Job]:
    compare = recipe("eval/compare.py")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", SOURCES)  # the stages are processes of their own
        folder = tmp_path_factory.mktemp("demo")
        yield Job(compare.main, compare.CompareConfig, folder, almanac.model_dump_json())
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def results(job: Job, recipe: Callable[[str], ModuleType]) -> dict[str, Any]:
    """The first run: nothing is there before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "run", in_this_process(recipe))
        torch.set_num_threads(1)  # as a stage's process has
        return job(job.folder / "out", job.folder / "home")


def in_this_process(
    recipe: Callable[[str], ModuleType],
) -> Callable[[Sequence[stages.Job], int, Callable[[str], None]], None]:
    """`stages.run` without processes: importing torch is what takes the time of a small stage."""

    def run(jobs: Sequence[stages.Job], at_once: int, done: Callable[[str], None]) -> None:
        for job in jobs:
            _, script, *words = job.command
            module = recipe(f"train/{Path(script).name}")
            cls = getattr(module, f"{Path(script).stem.title()}Config")
            assert words[0] == "-c"
            module.main(config.load(cls, words[1], words[2:]))
            done(job.name)

    return run


def manifest(stage: Path) -> dict[str, Any]:
    """What a stage's final/ tells of itself."""
    return json.loads((stage / "final" / "manifest.json").read_text())["meta"]


def samples(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The samples of each arm."""
    return {
        path.stem.removeprefix("samples_"): lines(path)
        for path in sorted(out.glob("samples_*.jsonl"))
    }


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below a folder but its lock."""
    files = (path for path in sorted(folder.rglob("[!.]*")) if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


# --- one run --------------------------------------------------------------------------------------


def test_a_comparison_holds_every_arm_with_the_documented_keys(results: dict[str, Any]):
    top = "format task n seed interval arms paired k_selection environment"
    assert set(results) == {*top.split(), "pairwise", "grid_2x2", "left_out"}
    assert (results["format"], results["task"], results["interval"]) == (
        "rag2.results/1",
        "almanac",
        "wilson",
    )
    named = "base ft ft_paraphrase sft frozen_rag bm25_rag hybrid_rag ft_rag sft_rag joint"
    named += " ensemble router"
    assert {*named.split(), "majority", "random_rag", "gold_rag"} <= set(results["arms"])
    assert set(results["arms"]) == {*NAMES, "majority"} - {*ON_REQUEST}
    keys = "accuracy stderr ci95 k acc_norm recall_at_k train_seconds eval_seconds"
    for name, arm in results["arms"].items():
        assert {*keys.split(), "trained_parameters", "retriever", "generator", "reading"} <= set(
            arm
        )
        low, high = arm["ci95"]
        assert 0 <= low <= arm["accuracy"] <= high <= 1 and low < high
        if name in ARMS:
            assert (arm["generator"], arm["retriever"]) == (
                ARMS[name].generator,
                ARMS[name].retriever,
            )
            assert (arm["recall_at_1"] is None) == (ARMS[name].retriever is None)
    for test in results["paired"]:
        assert {"a", "b", "difference", "ci95", "mcnemar_p"} <= set(test)
    alike = {(test["a"], test["b"]): test["equal"] for test in results["paired"] if test["equal"]}
    assert alike == EQUAL, "the world made every part"
    joint = {test["b"] for test in results["paired"] if test["a"] == "joint"}
    assert {"base", "ft", "sft", *RAG_ARMS} <= joint
    selection = results["k_selection"]
    assert selection["split"] == "validation"
    assert {*RAG_ARMS, "joint"} <= set(selection["chosen"])
    assert {*RAG_ARMS, "joint"} <= set(selection["oracle_test"])
    assert {"rag2", "torch", "device", "threads"} <= set(results["environment"])
    grid = results["grid_2x2"]
    assert grid["arms"] == [["sft_rag", "warm_joint"], ["joint_sft", "joint"]]


def test_the_numbers_are_those_of_the_questions_and_the_samples(job: Job, results: dict[str, Any]):
    questions = load_questions(job.folder / "home" / "data" / "questions.jsonl")
    test = [question for question in questions if question.split == "test"][:40]
    assert results["n"] == len(test) == 40
    found = samples(job.folder / "out")
    assert set(found) == set(results["arms"])
    for name, rows in found.items():
        arm = results["arms"][name]
        assert [row["doc"]["id"] for row in rows] == [question.id for question in test]
        assert np.mean([row["acc"] for row in rows]) == pytest.approx(arm["accuracy"], rel=1e-5)
        counts = {0, arm["k"]} if name in HYBRIDS else {arm["k"]}
        assert {len(row["retrieved"]) for row in rows} <= counts
        if name in HYBRIDS:
            read = np.mean([bool(row["retrieved"]) for row in rows])
            assert read == pytest.approx(arm["retrieved_share"], rel=1e-5)
        for row in rows:
            logp = [float(answer[0]) for answer in row["filtered_resps"]]
            assert row["acc"] == float(np.argmax(logp) == row["doc"]["answer"])
            assert row["prediction"] == np.argmax(logp)
    assert results["arms"]["gold_rag"]["recall_at_1"] == 1.0
    assert results["arms"]["random_rag"]["recall_at_1"] < 0.2
    assert results["arms"]["base"]["k"] == 0 and results["arms"]["base"]["train_seconds"] == 0
    assert results["arms"]["gold_rag"]["k"] == 1


def test_the_report_and_the_stages_are_written(job: Job, results: dict[str, Any]):
    report = (job.folder / "out" / "report.md").read_text()
    assert all(name in report for name in results["arms"])
    home = job.folder / "home"
    for stage in ("base", "retriever", "ft", "ft_paraphrase", "sft_closed", "sft", "joint"):
        names = {path.name for path in (home / stage).iterdir()}
        assert {"config.yaml", "log.jsonl", "final", "stage.json"} <= names, stage
    # Equal supervision: the generator alone learns, beside the retriever of the warm start.
    assert manifest(home / "sft")["trained"]["retriever"] == 0
    assert manifest(home / "sft")["trained"]["generator"] > 0
    warm, beside = (
        DualEncoder.load(home / stage / "final" / "retriever").fingerprint()
        for stage in ("retriever", "sft")
    )
    assert warm == beside
    trained = {name: arm["trained_parameters"] for name, arm in results["arms"].items()}
    assert trained["base"] == trained["bm25_rag"] == trained["majority"] == 0
    assert trained["joint"] == trained["ft"] + trained["frozen_rag"] == trained["ft_rag"] > 0


def test_arms_are_not_called_alike_where_a_part_was_brought_along(
    job: Job, results: dict[str, Any], tmp_path: Path
):
    home = job.folder / "home"
    words = ["arms=[frozen_rag,ft]", "ks=[1]", f"generators.ft={home}/ft/final/generator"]
    (test,) = job(tmp_path / "out", home, *words)["paired"]
    assert (test["a"], test["b"], test["equal"]) == ("frozen_rag", "ft", None)


def test_the_staged_arm_learns_what_frozen_rag_answered_and_makes_its_log_first(
    job: Job,
    results: dict[str, Any],
    recipe: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    home = tmp_path / "home"
    for stage in ("data", "base", "retriever"):
        shutil.copytree(job.folder / "home" / stage, home / stage)
    monkeypatch.setattr(stages, "run", in_this_process(recipe))
    arms = job(tmp_path / "out", home, "arms=[frozen_rag,staged]")["arms"]
    assert (arms["staged"]["generator"], arms["staged"]["retriever"]) == ("staged", "warm")
    log = home / "logged" / "final" / "questions.jsonl"
    assert config.read(home / "staged" / "config.yaml")["questions"] == str(log)
    assert lines(log) and not any("evidence" in row for row in lines(log))
    assert arms["staged"]["train_seconds"] > arms["frozen_rag"]["train_seconds"]


# --- again ----------------------------------------------------------------------------------------


def test_a_second_run_reuses_the_stages_and_gives_the_same_results(
    job: Job, results: dict[str, Any]
):
    home = job.folder / "home"
    before = snapshot(home)
    again = job(job.folder / "again", home, "jobs=1")
    assert snapshot(home) == before
    assert strip_times(again) == strip_times(results)
    assert samples(job.folder / "again") == samples(job.folder / "out")
    assert again != results, "no time was measured"


@pytest.mark.slow
def test_a_run_from_scratch_in_processes_of_its_own_gives_identical_results(
    job: Job, results: dict[str, Any], tmp_path: Path
):
    scratch = job(tmp_path / "out", tmp_path / "home")
    assert strip_times(scratch) == strip_times(results)
    assert samples(tmp_path / "out") == samples(job.folder / "out")


def test_the_samples_tell_two_runs_apart_that_differ_in_the_third_digit_of_the_weights(
    job: Job, results: dict[str, Any], tmp_path: Path
):
    for stage in ("data", "base"):
        shutil.copytree(job.folder / "home" / stage, tmp_path / "other" / stage)
    final = tmp_path / "other" / "base" / "final"
    changed = Generator.load(final / "generator")
    with torch.no_grad():
        changed.model.get_input_embeddings().weight.mul_(1.001)
    changed.save(final / "generator")
    with pytest.raises(UserError, match="the bytes of file 'generator/model.safetensors' have"):
        job(tmp_path / "odd", tmp_path / "other", "arms=[base]")
    meta = json.loads((final / artifact.MANIFEST).read_text())["meta"]
    shutil.rmtree(final)
    with artifact.committing(final, kind="system", meta=meta) as staging:
        changed.save(staging / "generator")
    job(tmp_path / "odd", tmp_path / "other", "arms=[base]")
    assert samples(tmp_path / "odd")["base"] != samples(job.folder / "out")["base"]


def test_k_and_temperature_never_look_at_the_test_answers(
    job: Job, results: dict[str, Any], tmp_path: Path
):
    home = tmp_path / "home"
    for stage in ("data", "base", "retriever"):
        shutil.copytree(job.folder / "home" / stage, home / stage)
    chosen = {}
    for part in ("none", "test", "validation"):
        path = home / "data" / "questions.jsonl"
        rows = lines(path)
        for row in rows:
            if row["split"] == part:
                row["answer"] = (row["answer"] + 1) % 4
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = job(tmp_path / part, home, "arms=[base,frozen_rag]")
        selection = found["k_selection"]
        chosen[part] = [selection[key] for key in ("chosen", "temperature", "accuracy")]
        accuracy = found["arms"]["base"]["accuracy"]
        assert (accuracy == results["arms"]["base"]["accuracy"]) == (part == "none")
    assert chosen["none"] == chosen["test"]
    assert chosen["none"] != chosen["validation"]  # what it must look at


def test_chunks_that_the_prompt_has_no_room_for_are_counted_and_reported(
    job: Job, results: dict[str, Any], tmp_path: Path
):
    assert not any(arm["dropped_chunks"] for arm in results["arms"].values())
    changes = ("arms=[base,gold_rag]", "prompt.budget=60")
    arms = job(tmp_path / "out", job.folder / "home", *changes)["arms"]
    assert arms["base"]["dropped_chunks"] == 0 < arms["gold_rag"]["dropped_chunks"] <= 40
    told = f"not read: gold_rag {arms['gold_rag']['dropped_chunks']}."
    assert told in (tmp_path / "out" / "report.md").read_text()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["recipe", "seed", "vocabulary"])
def test_a_home_made_with_other_settings_is_refused_in_one_line(
    job: Job, results: dict[str, Any], tmp_path: Path, change: str
):
    home, joint = job.folder / "home", job.recipes / "joint.yaml"
    before = snapshot(home)
    changes = {"seed": ["world.seed=1"], "vocabulary": ["vocabulary=401"], "recipe": []}[change]
    try:
        if change == "recipe":
            joint.write_text(YAML["joint"].replace("steps: 4", "steps: 5"))
        with pytest.raises(UserError, match="was made with other settings") as caught:
            job(tmp_path / "out", home, *changes)
    finally:
        joint.write_text(YAML["joint"])
    assert "\n" not in str(caught.value) and str(home) in str(caught.value)
    assert snapshot(home) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ks=[0,5000]", "K is larger than the corpus"),
        ("ks=[-1]", "a number of chunks is 0 or more"),
        ("arms=[frozen_rga]", "Did you mean 'frozen_rag'"),
        ("world=null", "world is not given"),
        ("recipes=nowhere", "nowhere/"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_trained(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, message: str
):
    monkeypatch.setattr(stages, "run", lambda *_: pytest.fail("a stage was run"))
    with pytest.raises(UserError, match=message):
        job(tmp_path / "out", tmp_path / "home", change)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.glob("home/*")} <= {"data", ".lock"}


def test_a_stage_that_fails_says_why_and_runs_once_it_is_mended(
    job: Job, results: dict[str, Any], tmp_path: Path
):
    base = job.recipes / "pretrain.yaml"
    try:
        base.write_text(YAML["pretrain"].replace("steps: 6", "steps: six"))
        with pytest.raises(UserError, match="^stage base failed: .*steps.*six") as caught:
            job(tmp_path / "out", tmp_path / "home", "arms=[base]")
    finally:
        base.write_text(YAML["pretrain"])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    mark = json.loads((tmp_path / "home" / "base" / "stage.json").read_text(encoding="utf-8"))
    assert mark["done"] is False
    mended = job(tmp_path / "out", tmp_path / "home", "arms=[base]")["arms"]["base"]
    # A process of its own makes what this process made.
    assert strip_times(mended) == strip_times(results["arms"]["base"])
    assert samples(tmp_path / "out")["base"] == samples(job.folder / "out")["base"]
