"""What holds the parts of joint training together: who is told what, in which order."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rag2 import artifact
from rag2.evaluation.questions import load_questions
from rag2.registry import UserError
from rag2.reindex import store as stores
from rag2.reindex.collapse import Guard, Health
from rag2.reindex.live import LiveIndex
from rag2.reindex.policy import SyncRefresh
from rag2.reindex.staleness import Staleness
from rag2.retriever.encoder import DualEncoder
from rag2.training import distributed
from rag2.training.interrupt import Stop
from rag2.training.telemetry import Telemetry
from rag2.training.watch import Watch
from rag2.types import Chunk
from refreshes import Inline
from small_runs import Killed, Load, killed_at, log, start, weights

pytestmark = pytest.mark.usefixtures("seed")


def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every generation but the first counts as collapsed."""

    def complaints(self: Guard, first: Health, now: Health) -> list[str]:
        return [] if now == first else ["planted"]

    monkeypatch.setattr(Guard, "complaints", complaints)


def test_adaptive_refresh_is_told_the_overlap_that_a_run_measures(
    recipe: Load, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stores, "Worker", Inline)
    changes = {"lr_retriever": 0.1, "staleness": {"every": 2}, "checkpoint_every": 100}
    refresh = {"name": "adaptive", "min_overlap": 1.0, "lag": 1}
    start(recipe, "joint", home, tmp_path / "a", refresh=refresh, **changes)
    rows = log(tmp_path / "a")
    stale = next(row["step"] for row in rows if row.get("overlap", 1.0) < 1.0)
    assert [row["generation"] for row in rows[stale : stale + 3]] == [0, 0, 1]


def test_a_guard_that_cuts_lowers_the_retrievers_rate_alone_also_after_a_resume(
    recipe: Load, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    planted(monkeypatch)
    guard = {"action": "cut"}
    start(recipe, "joint", home, tmp_path / "whole", guard=guard)
    rows = log(tmp_path / "whole")
    ratios = [row["lr_retriever"] / row["lr_generator"] for row in rows]
    assert ratios == pytest.approx([3.0] * 3 + [0.3] * 3 + [0.03] * 3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=5)
        start(recipe, "joint", home, tmp_path / "cut", guard=guard)
    start(recipe, "joint", home, tmp_path / "cut", guard=guard, resume=True)
    assert log(tmp_path / "cut") == rows
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its open log
def test_a_guard_that_stops_leaves_the_healthy_generation_in_force(
    recipe: Load, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    planted(monkeypatch)
    with pytest.raises(UserError, match=r"index of step 3\): planted\. Begin again"):
        start(recipe, "joint", home, tmp_path / "a", guard={"action": "stop"})
    assert (tmp_path / "a" / "generations" / "current").read_text() == "000000\n"


def test_an_index_is_of_the_weights_of_the_step_that_it_names(
    recipe: Load, home: Path, tmp_path: Path
):
    out = tmp_path / "a"
    changes = {"refresh": {"name": "sync", "every": 1}, "checkpoint_every": 1, "steps": 3}
    start(recipe, "joint", home, out, **changes)
    for step in (2, 3):
        saved = out / "checkpoints" / f"step-{step:06d}"
        number = json.loads((saved / "state.json").read_text())["extra"]["generation"]
        meta = artifact.verify(out / "generations" / f"{number:06d}")["meta"]
        encoder = DualEncoder.load(home / "retriever")
        encoder.load_state_dict(load_file(saved / "retriever.safetensors"), strict=False)
        assert meta["step"] == number == step
        assert meta["encoder_fingerprint"] == encoder.fingerprint()


def test_the_first_update_has_the_rate_that_its_line_in_the_log_tells(
    recipe: Load, home: Path, tmp_path: Path
):
    changes = {"steps": 1, "schedule": {"warmup": 10}, "weight_decay": 0.0}
    start(recipe, "joint", home, tmp_path / "a", **changes)
    rate = log(tmp_path / "a")[0]["lr_retriever"]
    before = dict(DualEncoder.load(home / "retriever").named_parameters())
    after = dict(DualEncoder.load(tmp_path / "a" / "final" / "retriever").named_parameters())
    moved = max(float((after[name] - before[name]).detach().abs().max()) for name in before)
    assert moved == pytest.approx(rate, rel=0.01)  # the first step of Adam is its rate


def test_what_goes_by_validation_questions_says_so_where_there_are_none(
    recipe: Load, home: Path, tmp_path: Path
):
    source = home / "data" / "questions.jsonl"
    rows = [q.id for q in load_questions(source) if q.split == "train"]
    lines = [row for row in source.read_text().splitlines() if json.loads(row)["id"] in rows]
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")
    changes: Sequence[dict[str, Any]] = (
        {"refresh": {"name": "adaptive"}, "staleness": {"every": 2}},
        {"guard": {"action": "cut"}},
    )
    for change in changes:
        with pytest.raises(UserError, match="goes by validation questions .* there are none"):
            questions = str(tmp_path / "q.jsonl")
            start(recipe, "joint", home, tmp_path / "a", questions=questions, **change)
    assert not (tmp_path / "a").exists()


def test_a_finished_run_keeps_its_result_until_a_resumed_one_has_its_own(
    recipe: Load, home: Path, tmp_path: Path
):
    out = tmp_path / "a"
    start(recipe, "finetune", home, out, steps=3)  # before the first checkpoint
    before = weights(out)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=4)
        start(recipe, "finetune", home, out, steps=6, resume=True)
    assert weights(out) == before
    start(recipe, "finetune", home, out, steps=6, resume=True)
    assert weights(out) != before


def test_a_run_that_goes_on_may_be_more_patient_but_not_train_otherwise(
    recipe: Load, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stores, "Worker", Inline)
    refresh = {"name": "async", "every": 4, "lag": 3}
    out = tmp_path / "a"
    with monkeypatch.context() as patch:  # a larger machine
        patch.setattr(os, "cpu_count", lambda: 4096)
        start(recipe, "joint", home, out, refresh=refresh | {"cpus": [4000]})
    with pytest.raises(UserError, match="begun with refresh.lag=3, not 2; resume with the same"):
        start(recipe, "joint", home, out, refresh=refresh | {"lag": 2}, resume=True)
    with pytest.raises(UserError, match="is at step 9: steps=5 is behind it"):
        start(recipe, "joint", home, out, refresh=refresh, steps=5, resume=True)
    before = weights(out)
    changes = {"patience": 900.0, "cpus": [0]}
    start(recipe, "joint", home, out, refresh=refresh | changes, resume=True)
    assert weights(out) == before


def test_what_validation_finds_does_not_decide_what_is_encoded_next(
    home: Path, chunks: list[Chunk], encoder: DualEncoder, store: stores.Store
):
    watch = Watch(load_questions(home / "data" / "questions.jsonl"), chunks)
    telemetry = Telemetry(encoder, watch, Staleness(every=1), Guard(), {})
    live = LiveIndex(store, SyncRefresh(share=0.5), check=telemetry.watchdog.check)
    assert "recall" in telemetry.before(0, live) and "overlap" in telemetry.after(0, live)
    assert live.state()["demand"]["rows"] == []
    live.search(live.generation.index.vectors(np.array([3])), 2)
    assert len(live.state()["demand"]["rows"]) == 2


def test_an_index_of_a_retriever_that_does_not_learn_is_not_refreshed(
    recipe: Load, home: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=r"retriever does not learn .* set refresh\.name=none"):
        start(recipe, "joint", home, tmp_path / "a", train=["generator"])
    assert not (tmp_path / "a").exists()


def test_old_generations_go_with_the_next_swap_and_not_with_the_next_checkpoint(
    recipe: Load, home: Path, tmp_path: Path
):
    changes = {"refresh": {"name": "sync", "every": 1}, "checkpoint_every": 100}
    start(recipe, "joint", home, tmp_path / "a", **changes)
    left = sorted(path.name for path in (tmp_path / "a" / "generations").glob("0*"))
    assert left == ["000009"]


def test_a_second_sigterm_is_obeyed_at_once():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.heard and not heard
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_weight_that_no_process_felt_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "_where", lambda: "cpu")
    # The other process felt the second weight alone.
    others = iter([torch.tensor([1, 1, 0]), torch.zeros(2), torch.full((2,), 3.0)])

    def all_reduce(mine: torch.Tensor, op: Any = None) -> None:
        other = next(others).to(mine.dtype)
        mine.copy_(torch.maximum(mine, other) if mine.dtype == torch.uint8 else mine + other)

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    mine, theirs, nobodys = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    mine.grad = torch.ones(2)
    distributed.average_gradients([mine, theirs, nobodys])
    assert mine.grad.tolist() == [0.5, 0.5] and nobodys.grad is None
    assert theirs.grad is not None and theirs.grad.tolist() == [1.5, 1.5]
