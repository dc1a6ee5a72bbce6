"""A joint run that is split, into parts or over processes, is the run of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exact_norms import exact_norms
from group_runs import together
from rag2.generator.load import Generator
from rag2.registry import UserError
from rag2.training import optim
from small_runs import Load, log, settings, start

# Rates at which the loss falls by a nat and more a step: a wrong gradient shows.
EXACT: dict[str, Any] = {
    "dtype": "float64",
    "batch_size": 4,
    "steps": 4,
    "candidates": {"dense": 2, "bm25": 1, "random": 1},
    "refresh": {"name": "sync", "every": 2},
    "lr_retriever": 1e-2,
    "lr_generator": 1e-2,
    "schedule": {"warmup": 2, "decay": "constant"},
    "checkpoint_every": 2,
}
# Small micro-batches, few of which are felt: the processes do not need equally many.
UNEVEN: dict[str, Any] = {"step": {"name": "two_pass", "skip_below": 0.2, "micro_batch": 2}}
SHARDED: dict[str, Any] = UNEVEN | {"shard": True}
LORA: dict[str, Any] = {
    "dtype": "bfloat16",
    "tuning": {"name": "lora", "rank": 4},
    "gradient_checkpointing": True,
}
# At a third of the rates: twenty steps at EXACT's make 1e-7 of the last digit.
LONG: dict[str, Any] = {
    "steps": 20,
    "batch_size": 8,
    "refresh": {"name": "sync", "every": 7},
    "lr_retriever": 3e-3,
    "lr_generator": 3e-3,
}


def job(home: Path, out: Path, changes: dict[str, Any], fault: str | None = None) -> dict[str, Any]:
    """A run of two processes."""
    asked = settings("joint", home) | EXACT | {"out": str(out)} | changes
    return {"settings": asked, "fault": fault}


def alone(recipe: Load, home: Path, out: Path, **changes: Any) -> Path:
    """The run in this process, in folder `out`."""
    with pytest.MonkeyPatch.context() as patch:
        exact_norms(patch)
        start(recipe, "joint", home, out, **EXACT | changes)
    return out


def loss_difference(a: Path, b: Path) -> float:
    """The largest difference between the losses of two runs, in nats; they read the same chunks."""
    rows = list(zip(log(a), log(b), strict=True))
    assert all(x["retrieved_digest"] == y["retrieved_digest"] for x, y in rows)
    assert all(abs(x["kept_prompts"] - y["kept_prompts"]) < 1e-6 for x, y in rows)
    return max(
        abs(x[key] - y[key]) for x, y in rows for key in ("loss", "effective_chunks", "grad_norm")
    )


def weight_difference(a: Path, b: Path) -> float:
    """The largest difference between the weights that two runs leave, which have the same names."""
    files = [sorted((run / "final").rglob("*.safetensors")) for run in (a, b)]
    assert [f.relative_to(a) for f in files[0]] == [f.relative_to(b) for f in files[1]]
    pairs = [(load_file(x), load_file(y)) for x, y in zip(*files, strict=True)]
    assert len(pairs) == 2 and all(x.keys() == y.keys() for x, y in pairs)
    return max(float((x[name] - y[name]).abs().max()) for x, y in pairs for name in x)


def moves(run: Path) -> bool:
    """Whether the loss changes so much that equal curves say something."""
    losses = [row["loss"] for row in log(run)]
    return max(losses) - min(losses) > 0.5


@pytest.fixture(scope="module")
def one(recipe: Load, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that takes each batch as a whole."""
    return alone(recipe, home, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [
        job(home, folder / "whole", {"accumulate": 2}),
        job(home, folder / "sharded", SHARDED),
    ]
    together(jobs, folder)
    return folder


@pytest.fixture(scope="module")
def more(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of other runs of two processes."""
    folder = tmp_path_factory.mktemp("more")
    jobs = [
        job(home, folder / "planted", {}, "gradients not averaged"),
        job(home, folder / "resumed", SHARDED | {"steps": 2}),
        job(home, folder / "resumed", SHARDED | {"resume": True}),
        job(home, folder / "forgetful", SHARDED | {"steps": 2}),
        job(home, folder / "forgetful", SHARDED | {"resume": True}, "optimizer forgotten"),
        job(home, folder / "adapted", LORA | {"shard": True}),
    ]
    together(jobs, folder)
    return folder


def test_a_batch_in_parts_leaves_what_the_whole_batch_leaves(
    recipe: Load, home: Path, tmp_path: Path, one: Path, monkeypatch: pytest.MonkeyPatch
):
    parts = alone(recipe, home, tmp_path / "parts", accumulate=4)
    assert moves(one)
    assert loss_difference(one, parts) <= 1e-8 and weight_difference(one, parts) <= 1e-8
    # A planted fault is seen: gradients that are added up, not averaged. AdamW and clipping forgive
    # a factor; the norm in the log does not.
    honest = optim.clip
    monkeypatch.setattr(
        optim, "clip", lambda weights, *a: [w.grad.mul_(4) for w in weights] and honest(weights, *a)
    )
    wrong = alone(recipe, home, tmp_path / "wrong", accumulate=4, steps=1)
    assert abs(log(wrong)[0]["grad_norm"] - log(one)[0]["grad_norm"]) > 1e-3


def test_a_batch_that_does_not_divide_into_the_parts_is_refused(
    recipe: Load, home: Path, tmp_path: Path
):
    with pytest.raises(UserError, match="batch_size=4 does not divide into 3 equal parts"):
        alone(recipe, home, tmp_path / "out", accumulate=3)


def test_one_process_has_nothing_to_shard_with(recipe: Load, home: Path, tmp_path: Path):
    with pytest.raises(UserError, match="shard=true is for several processes"):
        alone(recipe, home, tmp_path / "out", shard=True)


def test_two_processes_leave_what_one_leaves(one: Path, two: Path):
    assert loss_difference(one, two / "whole") <= 1e-8
    assert weight_difference(one, two / "whole") <= 1e-8


@pytest.mark.slow
def test_two_processes_that_do_not_average_their_gradients_are_noticed(one: Path, more: Path):
    losses = [[row["loss"] for row in log(run)] for run in (one, more / "planted")]
    assert abs(losses[0][0] - losses[1][0]) <= 1e-8  # nothing was learned yet
    assert abs(losses[0][-1] - losses[1][-1]) > 1e-3


def test_a_sharded_generator_learns_what_a_whole_one_learns(
    recipe: Load, home: Path, tmp_path: Path, two: Path
):
    whole = alone(recipe, home, tmp_path / "whole", **UNEVEN)
    kept = [row["kept_prompts"] for row in log(whole)]
    assert moves(whole) and 0 < sum(kept) / len(kept) < 1
    assert loss_difference(whole, two / "sharded") <= 1e-8
    assert weight_difference(whole, two / "sharded") <= 1e-8
    idle = [int((two / f"sharded.idle-{rank}").read_text()) for rank in (0, 1)]
    assert sum(idle) > 0  # else the run did not need to keep its processes in step
    Generator.load(two / "sharded" / "final" / "generator")


@pytest.mark.slow
def test_a_sharded_run_that_goes_on_leaves_what_an_uninterrupted_one_leaves(two: Path, more: Path):
    assert len(log(more / "resumed")) == 4
    assert loss_difference(two / "sharded", more / "resumed") <= 1e-12
    assert weight_difference(two / "sharded", more / "resumed") <= 1e-12
    assert weight_difference(two / "sharded", more / "forgetful") > 1e-3


@pytest.mark.slow
def test_four_processes_go_on_where_two_were(home: Path, tmp_path: Path, two: Path):
    together([job(home, tmp_path / "run", SHARDED | {"steps": 2})], tmp_path)
    together([job(home, tmp_path / "run", SHARDED | {"resume": True})], tmp_path, processes=4)
    assert loss_difference(two / "sharded", tmp_path / "run") <= 1e-8
    assert weight_difference(two / "sharded", tmp_path / "run") <= 1e-8


@pytest.mark.slow
def test_adapters_on_a_bfloat16_base_learn_in_float32_whole_and_sharded(
    recipe: Load, home: Path, tmp_path: Path, more: Path
):
    whole = alone(recipe, home, tmp_path / "whole", **LORA)
    for run in (whole, more / "adapted"):
        state = run / "checkpoints" / "step-000004"
        for file in ("optimizer", "generator", "retriever"):
            tensors = load_file(state / f"{file}.safetensors")
            kinds = {t.dtype for name, t in tensors.items() if name != "rng/torch"}
            assert kinds == {torch.float32}, (run.name, file)
        assert all("lora" in name for name in load_file(state / "generator.safetensors"))
    # The sharded ones multiply in bfloat16 too: equal but for its three digits.
    a, b = ([row["loss"] for row in log(run)] for run in (whole, more / "adapted"))
    assert max(abs(x - y) / x for x, y in zip(a, b, strict=True)) < 0.02


def test_scores_and_loss_over_a_bfloat16_base_are_float32(
    recipe: Load, home: Path, chunks: list[Any]
):
    module = recipe("train/joint.py")
    cfg = module.JointConfig(**settings("joint", home) | LORA)
    rag, _ = module.load(cfg, torch.device("cpu"))
    batch = (["Where?", "Who?"], ["one", "two"], [chunks[:2], chunks[1:3]])
    scores_BK, _ = rag.scores(batch[0], batch[2])
    result = cfg.step(rag, cfg.loss, *batch)
    figures = (scores_BK, result.loss_B, result.posterior_BK)
    assert {figure.dtype for figure in figures} == {torch.float32}
    assert {w.dtype for w in rag.generator.parameters() if not w.requires_grad} == {torch.bfloat16}


@pytest.mark.slow
def test_twenty_steps_in_parts_and_in_two_processes_are_those_of_one(
    recipe: Load, home: Path, tmp_path: Path
):
    one = alone(recipe, home, tmp_path / "one", **LONG)
    parts = alone(recipe, home, tmp_path / "parts", **LONG, accumulate=8)
    jobs = [
        job(home, tmp_path / "two", LONG),
        job(home, tmp_path / "sharded", LONG | {"shard": True}),
        job(home, tmp_path / "planted", LONG, "gradients not averaged"),
    ]
    together(jobs, tmp_path)
    for run in (parts, tmp_path / "two", tmp_path / "sharded"):
        found = loss_difference(one, run), weight_difference(one, run)
        print(run.name, found)  # noqa: T201 (pytest shows it when the test fails)
        assert max(found) <= 1e-8
    assert weight_difference(one, tmp_path / "planted") > 1e-3
