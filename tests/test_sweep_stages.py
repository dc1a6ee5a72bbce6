"""Sweeps over a world: stages are shared by the cells that agree in them, and by nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rag2 import config, pipeline, plan, stages
from rag2.registry import UserError
from rag2.sweep.run import Sweep
from rag2.worlds.almanac import Almanac
from small_sweeps import in_this_process, mark, snapshot, table

NETWORK = "{hidden: 32, layers: 2, heads: 2, intermediate: 48}"
YAML = {
    "pretrain": f"steps: 2\nbatch_size: 4\nnetwork: {NETWORK}\n",
    "retriever": f"steps: 2\nbatch_size: 8\nvalidate_every: 2\nencoder: {NETWORK}\n",
    "finetune": "steps: 2\nbatch_size: 4\n",
    "joint": "steps: 2\nbatch_size: 4\nrefresh: {every: 2}\n",
    "logged": "question_share: 0.1\n",
}
SHARES = "stage.joint.question_share=0.1,1"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, almanac: Almanac) -> dict[str, Any]:
    """A folder of small stages and the config of a comparison, in an empty current directory."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    for name, text in YAML.items():
        Path("recipes", f"{name}.yaml").write_text(text)
    settings = [f"world: {almanac.model_dump_json()}", "recipes: recipes", "vocabulary: 400"]
    settings += ["ks: [0, 1]", "limit: 8", "arms: [base, joint]"]
    text = "\n".join(["# rag2 eval compare -c compare.yaml", *settings])
    Path("compare.yaml").write_text(text + "\n")
    joint = "\n".join(["# rag2 train joint -c joint.yaml", *settings[:3], YAML["joint"]])
    Path("joint.yaml").write_text(joint)
    mc = "\n".join(["# rag2 eval mc -c mc.yaml", *settings[:3], "split: test"])
    Path("mc.yaml").write_text(mc + "\n")
    return json.loads(almanac.model_dump_json())


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch):
    """The cells and the stages that are run, in this process."""
    names: list[str] = []
    threads = torch.get_num_threads()
    monkeypatch.setattr(stages, "run", in_this_process(names))
    yield names
    torch.set_num_threads(threads)


def inputs(world: dict[str, Any], *words: str) -> pipeline.Inputs:
    given = [f"world={json.dumps(world)}", "recipes=recipes", "vocabulary=400", *words]
    return config.load(pipeline.Inputs, None, given)


def keys(world: dict[str, Any], *words: str) -> dict[str, str]:
    return pipeline.keys(inputs(world, *words), ["data", *plan.STAGES])


def test_cells_share_every_stage_that_their_settings_leave_alone(world, ran):
    words = ["lr_retriever=1e-3,2e-3", "out=s"]
    assert Sweep.of("joint.yaml", words).run() == {}
    cells = ["lr_retriever=0.001", "lr_retriever=0.002"]
    assert ran == [cells[0], "base", "retriever", cells[1]]
    rows = table(Path("s"))
    assert [row["lr_retriever"] for row in rows] == ["0.001", "0.002"]
    assert rows[0]["loss"] != rows[1]["loss"] and {row["step"] for row in rows} == {"1"}
    made = {path.name.rpartition("-")[0] for path in Path("s/stages").iterdir()}
    assert made == {"data", "base", "retriever"} and mark(Path("s"), cells[0])["done"]
    before = snapshot(Path("s"))
    Sweep.of("joint.yaml", words).run()
    assert snapshot(Path("s")) == before and len(ran) == 4

    # Another recipe on the same stages trains nothing; stages that differ are made beside them.
    assert Sweep.of("mc.yaml", ["stage.base.steps=2,3", "out=s"]).run() == {}
    assert ran[4:] == ["stage.base.steps=2", "stage.base.steps=3", "base"]

    # Another folder finds them in that home, and writes nothing there.
    home = next(Path("s/cells").glob("stage.base.steps=2*")) / "home"
    before = snapshot(Path("s"))
    assert Sweep.of("mc.yaml", [f"home={home}", "budget=600", "out=t"]).run() == {}
    assert ran[7:] == ["one cell"] and snapshot(Path("s")) == before
    assert not Path("t/stages").exists()


@pytest.mark.slow
def test_a_comparison_is_swept_over_the_settings_of_a_stage(world, ran):
    assert Sweep.of("compare.yaml", [SHARES, "out=s"]).run() == {}
    first, second = (f"stage.joint.question_share={share}" for share in ("0.1", "1"))
    assert ran == [first, "base", "retriever", "joint", second, "joint"]
    rows = table(Path("s"))
    assert [(row["stage.joint.question_share"], row["arm"]) for row in rows] == [
        ("0.1", "base"),
        ("0.1", "joint"),
        ("1", "base"),
        ("1", "joint"),
    ]
    base = [row["accuracy"] for row in rows if row["arm"] == "base"]
    assert base[0] == base[1]
    assert Sweep.of("compare.yaml", ["ks=[1],[2]", SHARES.replace(",1", ""), "out=s"]).run() == {}
    assert ran[6:] == ["ks=[1]", "ks=[2]"]  # evaluation settings train nothing


def test_the_key_of_a_stage_counts_what_decides_it_and_nothing_else(world):
    plain = keys(world)
    changed = {
        "stage.joint.lr_retriever=1": {"joint"},
        "stage.joint.refresh.every=3": {"joint"},
        "stage.ft_paraphrase.paraphrases_per_document=1": {"ft_paraphrase"},
        "stage.retriever.steps=3": {"retriever", "sft", "joint", "logged", "staged"},
        "stage.logged.confidence=0.9": {"logged", "staged"},
        "stage.base.steps=3": {*plan.STAGES} - {"retriever"},
        "vocabulary=401": {"data", *plan.STAGES},
        "world.seed=1": {"data", *plan.STAGES},
        "stage.joint.steps=2": set(),  # what its YAML says
        "stage.joint.refresh={every: 2}": set(),
        "jobs=1": set(),
        "home=elsewhere": set(),
    }
    for word, expected in changed.items():
        now = keys(world, word)
        assert {name for name in now if now[name] != plain[name]} == expected, word
    # What is left out stands for the default, not for null.
    assert keys(world, "stage.joint.schedule=null") != plain
    # The name decides what the keys beside it mean, so a block counts whole.
    words = ["stage.joint.refresh.name=sync", "stage.joint.refresh.every=2"]
    assert keys(world, *words) != keys(world, words[0])


def test_a_stage_key_that_forgets_its_settings_is_caught(world, ran, monkeypatch):
    monkeypatch.setattr(config, "overrides", lambda given, changes: [])
    with pytest.raises(UserError, match="two cells would compute the same"):
        Sweep.of("compare.yaml", [SHARES, "out=s"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stage.jiont.steps=1,2", "unknown stage 'jiont'.*Did you mean 'joint'"),
        ("stage.joint.stesp=1,2", "stage joint: unknown key 'stesp'.*Did you mean 'step'"),
        ("stage.joint.steps=1,two", "stage joint: wrong value for 'steps'"),
        ("stage.joint.kb=a,b", "joint.kb is set by the world's home"),
        ("stage.joint.vocabulary=1,2", "joint.vocabulary is set by the world's home"),
        ("home=a,b", "home cannot be swept"),
    ],
)
def test_a_mistake_in_a_stage_is_refused_before_anything_is_made(world, ran, word, message):
    with pytest.raises(UserError, match=message) as caught:
        Sweep.of("compare.yaml", [word, "out=s"])
    assert "\n" not in str(caught.value) and not ran and not Path("s").exists()


def test_a_stage_that_was_cut_off_in_one_cell_goes_on_in_another(world, ran, monkeypatch):
    homes = [Path("home0"), Path("home1")]
    for home in homes:
        pipeline.share(inputs(world), home, Path("shared"), ["data", "base"])
    first, second = (inputs(world, f"home={home}") for home in homes)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "run", interrupted)
        pipeline.ensure(first, {"base"})
    assert json.loads((homes[1] / "base" / "stage.json").read_text())["done"] is False
    # A run goes on only with the settings and the paths that it began with.
    assert pipeline.jobs(first, ["base"]) == pipeline.jobs(second, ["base"])
    for cfg in (second, second, first):
        pipeline.ensure(cfg, {"base"})
    assert ran == ["base"] and (homes[0] / "base" / "final").is_dir()


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt
