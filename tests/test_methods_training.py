"""Tuning methods inside the recipes: joint steps, resumed runs, batches in parts and processes."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from exact_norms import exact_norms
from group_runs import together
from joint_gradients import Batch, differing, gradients
from rag2.generator.load import Generator
from rag2.rag import RagModel
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder
from rag2.training.step import OnePass, TwoPass
from small_runs import Load, log, settings, start, weights
from tunings import ADAPTERS, method

EXACT: dict[str, Any] = {
    "dtype": "float64",
    "steps": 20,
    "batch_size": 8,
    "lr": 1e-3,
    "tuning": {"name": "full"},
    "schedule": {"warmup": 2, "decay": "constant"},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_pass_and_two_passes_leave_the_same_gradients(rag: RagModel, batch: Batch, name: str):
    rag.retriever.map_towers(method("lora").apply)
    rag.generator = Generator(rag.generator, rag.tokenizer).tuned(method(name)).model
    with torch.no_grad():
        for parameter in rag.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    one, two = (gradients(rag, step, batch) for step in (OnePass(), TwoPass(micro_batch=5)))
    assert not differing(one, two)
    felt = {n for n, p in rag.named_parameters() if p.requires_grad}
    assert all(one[n].any() == (n in felt) for n in one)


@pytest.mark.parametrize(
    "tuning",
    [
        {"name": "p_tuning", "tokens": 3, "width": 5},
        pytest.param({"name": "prefix", "tokens": 3, "projection": 5}, marks=pytest.mark.slow),
        {"name": "qlora", "rank": 2, "dropout": 0.2},
        pytest.param({"name": "houlsby", "width": 4}, marks=pytest.mark.slow),
    ],
    ids=lambda tuning: tuning["name"],
)
def test_a_run_goes_on_from_its_checkpoint_with_all_that_trains(
    recipe: Load, home: Path, tmp_path: Path, tuning: dict[str, Any]
):
    short: dict[str, Any] = {"tuning": tuning, "checkpoint_every": 2, "batch_size": 2}
    start(recipe, "finetune", home, tmp_path / "whole", **short, steps=4)
    start(recipe, "finetune", home, tmp_path / "parts", **short, steps=2)
    start(recipe, "finetune", home, tmp_path / "parts", **short, steps=4, resume=True)
    assert log(tmp_path / "whole")[2:] == log(tmp_path / "parts")[2:]
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    kept = load_file(tmp_path / "parts/checkpoints/step-000004/generator.safetensors")
    manifest = json.loads((tmp_path / "parts/final/manifest.json").read_text())
    assert sum(t.numel() for t in kept.values()) == manifest["meta"]["trained"]["generator"]
    if tuning["name"] in ("p_tuning", "prefix"):  # the network too, which final/ does not hold
        assert any("prompt_encoder" in name and "2.weight" in name for name in kept)


def test_lora_on_the_retriever_leaves_a_plain_encoder(recipe: Load, home: Path, tmp_path: Path):
    finished: dict[str, Any] = {}
    module = recipe("train/joint.py")
    honest: Callable[..., None] = module.Run.finish

    def keep(run: Any, **parts: Any) -> None:
        finished.update(parts)
        honest(run, **parts)

    changes: dict[str, Any] = {"refresh": "none", "steps": 2, "candidates": {"dense": 2}}
    lora = {"name": "lora", "rank": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Run, "finish", keep)
        start(
            recipe, "joint", home, tmp_path / "run", tuning="ia3", retriever_tuning=lora, **changes
        )
    memory, begun = finished["retriever"], DualEncoder.load(home / "retriever")
    assert not isinstance(memory.question_tower, PreTrainedModel)
    saved = DualEncoder.load(tmp_path / "run/final/retriever")
    assert isinstance(saved.question_tower, PreTrainedModel)
    assert saved.state_dict().keys() == begun.state_dict().keys()
    assert saved.fingerprint() == memory.fingerprint() != begun.fingerprint()
    texts = ["Who keeps the lantern?", "the old mill"]
    memory.eval()
    torch.testing.assert_close(
        saved.eval().encode_questions(texts), memory.encode_questions(texts), rtol=0, atol=1e-5
    )
    held = load_file(tmp_path / "run/checkpoints/step-000002/retriever.safetensors")
    assert all("lora_" in name or name == "log_scale" for name in held)


def test_a_method_that_cannot_be_cut_in_pieces_is_refused_before_anything_is_read(
    recipe: Load, home: Path, monkeypatch: pytest.MonkeyPatch
):
    module = recipe("train/joint.py")
    cfg = module.JointConfig(**settings("joint", home) | {"shard": True, "tuning": "prompt"})
    monkeypatch.setattr(module.distributed, "world", lambda: 2)
    with pytest.raises(UserError, match="shard=true is for tuning full, lora and rslora, not prom"):
        module.refuse(cfg)


# -- a batch in parts ----------------------------------------------------------------------------


def alone(recipe: Load, home: Path, out: Path, objective: str, **changes: Any) -> Path:
    """A run of one process in double precision."""
    with pytest.MonkeyPatch.context() as patch:
        exact_norms(patch)
        start(
            recipe, "finetune", home, out, **EXACT | {"objective": OBJECTIVES[objective]} | changes
        )
    return out


def difference(a: Path, b: Path) -> float:
    """The largest between two runs' losses and gradient norms."""
    rows = list(zip(log(a), log(b), strict=True))
    return max(abs(x[key] - y[key]) for x, y in rows for key in ("loss", "grad_norm"))


OBJECTIVES: dict[str, dict[str, Any]] = {
    "unsupervised": {"name": "unsupervised", "block": 16},
    "supervised": {"name": "supervised"},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_eight_times_one_sequence_is_one_time_eight(
    recipe: Load, home: Path, tmp_path: Path, objective: str
):
    whole = alone(recipe, home, tmp_path / "whole", objective)
    losses = [row["loss"] for row in log(whole)]
    assert max(losses) - min(losses) > 0.1  # or equal curves say nothing
    parts = alone(recipe, home, tmp_path / "parts", objective, accumulate=8)
    assert difference(whole, parts) <= 1e-8


def test_the_short_last_batch_of_an_epoch_counts_whole_in_parts_too(
    recipe: Load, home: Path, tmp_path: Path
):
    short: dict[str, Any] = {"epochs": 2, "question_share": 0.05}
    whole = alone(recipe, home, tmp_path / "whole", "supervised", **short)
    rows = log(whole)
    steps = [b["tokens"] - a["tokens"] for a, b in itertools.pairwise(rows)]
    assert min(steps) < max(steps) / 1.5  # the last batch has fewer rows
    parts = alone(recipe, home, tmp_path / "parts", "supervised", **short, accumulate=4)
    assert difference(whole, parts) <= 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "p_tuning", "houlsby", "ia3"])
def test_activations_that_are_computed_twice_change_nothing(
    recipe: Load, home: Path, tmp_path: Path, tuning: str
):
    once, twice = (
        alone(recipe, home, tmp_path / str(on), "supervised", tuning=tuning, steps=6, **changes)
        for on, changes in enumerate([{}, {"gradient_checkpointing": True}])
    )
    assert difference(once, twice) <= 1e-8


def test_parts_that_do_not_divide_the_batch_are_refused(recipe: Load, home: Path, tmp_path: Path):
    with pytest.raises(UserError, match="batch_size=8 does not divide into 3 equal parts"):
        alone(recipe, home, tmp_path / "out", "supervised", accumulate=3)


@pytest.mark.slow
def test_two_processes_fine_tune_as_one_does(recipe: Load, home: Path, tmp_path: Path):
    jobs, whole = [], {}
    for objective in OBJECTIVES:
        whole[objective] = alone(recipe, home, tmp_path / f"{objective}-one", objective)
        asked = settings("finetune", home) | EXACT | {"objective": OBJECTIVES[objective]}
        asked |= {"accumulate": 2}
        out = {"out": str(tmp_path / f"{objective}-two")}
        jobs.append({"recipe": "finetune", "settings": asked | out, "fault": None})
    planted = jobs[0]["settings"] | {"out": str(tmp_path / "planted"), "steps": 3}
    fault = "gradients not averaged"
    jobs.append({"recipe": "finetune", "settings": planted, "fault": fault})
    together(jobs, tmp_path)
    for objective, one in whole.items():
        assert difference(one, tmp_path / f"{objective}-two") <= 1e-8
        assert weights(tmp_path / f"{objective}-two")
    pairs = zip(log(whole["unsupervised"]), log(tmp_path / "planted"), strict=False)
    assert max(abs(x["grad_norm"] - y["grad_norm"]) for x, y in pairs) > 1e-3
