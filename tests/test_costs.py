"""What arms cost: operations of a prompt by two counts, weights and seconds of training by run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rag2.artifact import committing
from rag2.evaluation.arms import arm, members
from rag2.evaluation.workload import Cost
from rag2.generator.load import build_llama
from rag2.generator.prompt import Prompt
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.systems import Parts, Systems
from rag2.training.log import RunLog
from small_models import small_tokenizer
from small_world import SHAPE

# --- operations ----------------------------------------------------------------------------------


def test_operations_of_two_prompts_that_share_a_beginning_counted_by_hand():
    cost = Cost(body=1000, head=100, width=10)
    pairs = [([1, 2, 3], [4, 5]), ([1, 2], [7])]
    # Inputs 1 2 3 4 and 1 2: tokens after 0, 1, 2, 3 and after 0, 1 others.
    attention = 4 * 10 * ((1 + 2 + 3 + 4) + (1 + 2))
    assert cost.in_full(pairs) == 6 * 2 * 1000 + attention + 6 * 2 * 100
    # Once: 1 2 3 4, with logits after 3, after 4 and after 2.
    assert cost.shared(pairs) == 4 * 2 * 1000 + 4 * 10 * (1 + 2 + 3 + 4) + 3 * 2 * 100


def test_operations_agree_with_those_that_torch_counts(seed):
    model: Any = build_llama(small_tokenizer(), **SHAPE, max_positions=32).model
    model.set_attn_implementation("eager")
    head = model.get_output_embeddings().weight.numel()
    layers = model.model.layers
    body = sum(p.numel() for p in layers.parameters() if p.ndim == 2)  # norms multiply no matrix
    cost = Cost(body, head, SHAPE["layers"] * SHAPE["hidden"])
    past, counted = None, 0
    for token in range(5):  # one by one: no token looks at a later one
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            past = model(torch.tensor([[token]]), past_key_values=past).past_key_values
        counted += flops.get_total_flops()
    assert cost.flops(range(5), 5) == counted


# --- training ------------------------------------------------------------------------------------

# name of the run -> weights of the retriever, of the generator, seconds of each of two steps
RUNS = {"warm": (1, 0, 100.0), "ft": (0, 10, 200.0), "sft": (0, 20, 400.0), "joint": (5, 50, 800.0)}
RUNS |= {"staged": (0, 30, 1600.0), "logged": (0, 0, 3200.0)}


def run(folder: Path, name: str) -> Path:
    """What a training run leaves: its log, and which weights learned."""
    retriever, generator, seconds = RUNS[name]
    log = RunLog(folder / name)
    for step in range(2):
        log.write(step=step, seconds=seconds)
    log.close()
    meta = {"trained": {"retriever": retriever, "generator": generator}}
    with committing(folder / name / "final", kind="system", meta=meta) as staging:
        (staging / "weights").write_text("")
    return folder / name / "final"


@pytest.fixture
def systems(tmp_path: Path) -> Systems:
    """Parts of four runs, and a base that none of them made."""
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True):
        pass
    final = {name: run(tmp_path, name) for name in RUNS}
    generators = {name: str(final[name] / "generator") for name in ("ft", "sft", "joint", "staged")}
    log = tmp_path / "logged" / "final" / "questions.jsonl"
    (tmp_path / "staged" / "config.yaml").write_text(f"questions: {log}\n")
    parts = Parts(
        tmp_path / "kb.sqlite",
        {"base": str(tmp_path / "base"), **generators},
        {name: str(final[name] / "retriever") for name in ("warm", "joint")},
    )
    return Systems(parts, 0, Prompt(), [], {}, "float32", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "weights", "seconds"),
    [
        ("base", 0, 0),
        ("bm25_rag", 0, 0),
        ("ft", 10, 400),
        ("frozen_rag", 1, 200),
        ("hybrid_rag", 1, 200),
        ("ft_rag", 10 + 1, 400 + 200),
        ("staged", 30 + 1, 3200 + 6400 + 200),  # the log that it learned from took time, too
        ("ensemble", 10 + 1, 400 + 200),  # its two members
        ("router", 1, 200),
        ("sft_rag", 20 + 1, 800 + 200),
        ("joint", 50 + 5, 1600 + 200),  # both halves are of one run, which took its time once
        ("warm_joint", 50 + 1, 1600 + 200),  # of a joint run only the half that the arm has
        ("joint_sft", 20 + 5, 800 + 1600 + 200),
    ],
)
def test_an_arm_costs_the_weights_of_its_own_halves_and_every_run_behind_them_once(
    systems: Systems, name: str, weights: int, seconds: int
):
    cost = systems.cost(*members(name).values())
    assert (cost["trained_parameters"], cost["train_seconds"]) == (weights, seconds)


def test_a_run_that_does_not_say_what_it_trained_is_named_in_one_line(
    systems: Systems, tmp_path: Path
):
    with committing(tmp_path / "old" / "final", kind="system", meta={}) as staging:
        (staging / "weights").write_text("")
    generators = {**systems.parts.generators, "ft": str(tmp_path / "old" / "final" / "generator")}
    systems.parts = replace(systems.parts, generators=generators)
    with pytest.raises(UserError, match="old was made by an earlier version of rag2"):
        systems.cost(arm("ft"))
