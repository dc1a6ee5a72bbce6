"""What surrounds a training loop: checkpoints, the log, the optimizer."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rag2 import artifact, config
from rag2.registry import UserError
from rag2.training import checkpoint, optim
from rag2.training.log import RunLog, train_memory, train_seconds
from rag2.training.run import Run
from small_world import forget

pytestmark = pytest.mark.usefixtures("seed")


# --- checkpoints ----------------------------------------------------------------------------------


DATA = ("a row", "another")


def fresh() -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    module[2].weight = module[0].weight  # tied
    groups = {"a": (optim.trainable([module]), 0.1)}
    return {"net": module}, optim.adamw(groups, 0.01, (0.9, 0.98))


def trained(parts: tuple[dict[str, nn.Module], torch.optim.Optimizer], steps: int) -> torch.Tensor:
    modules, optimizer = parts
    for _ in range(steps):
        optimizer.zero_grad()
        modules["net"](torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in modules["net"].parameters()])


def test_a_restored_run_goes_on_as_if_nothing_had_happened(tmp_path: Path):
    parts = fresh()
    trained(parts, 3)
    checkpoint.save(tmp_path, 3, *parts, extra={"top": 0.1 + 0.2})
    expected = trained(parts, 3)
    torch.rand(7)
    other = fresh()
    state = checkpoint.load(tmp_path, *other)
    assert state is not None and (state["step"], state["extra"]) == (3, {"top": 0.1 + 0.2})
    assert torch.equal(trained(other, 3), expected)


@pytest.mark.parametrize("forgotten", ["optimizer", "random state", "weights"])
def test_a_checkpoint_that_forgets_something_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
):
    parts = fresh()
    trained(parts, 3)
    checkpoint.save(tmp_path, 3, *parts, extra={})
    expected = trained(parts, 3)
    torch.rand(7)
    forget(monkeypatch, forgotten)
    other = fresh()
    checkpoint.load(tmp_path, *other)
    assert not torch.equal(trained(other, 3), expected)


def test_the_last_two_checkpoints_are_kept_and_the_pointer_names_the_last(tmp_path: Path):
    parts = fresh()
    assert checkpoint.load(tmp_path, *parts) is None
    for step in (2, 4, 6):
        checkpoint.save(tmp_path, step, *parts, extra={"generation": step // 2})
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-000004", "step-000006"]
    assert (folder / "latest").read_text().strip() == "step-000006"
    assert [extra["generation"] for extra in checkpoint.retained(tmp_path)] == [2, 3]


def test_the_newest_checkpoints_are_those_of_the_largest_steps(tmp_path: Path):
    parts = fresh()
    for step in (999_998, 999_999, 1_000_000):
        checkpoint.save(tmp_path, step, *parts, extra={"at": step})
    assert [extra["at"] for extra in checkpoint.retained(tmp_path)] == [999_999, 1_000_000]
    state = checkpoint.load(tmp_path, *fresh())
    assert state is not None and state["step"] == 1_000_000


def test_what_a_kill_left_ahead_of_the_run_goes_before_the_next_checkpoint(tmp_path: Path):
    folder = tmp_path / "checkpoints"

    def kill(directory: Path, text: str) -> None:
        raise KeyboardInterrupt

    for step, killed in ((4, False), (8, False), (12, True), (10, True), (9, False)):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            if killed:  # between the rename and the pointer
                patch.setattr(checkpoint.artifact, "replace", kill)
            checkpoint.save(tmp_path, step, *fresh(), extra={"at": step})
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000008", "step-000009"]
    state = checkpoint.load(tmp_path, *fresh())
    assert state is not None and state["step"] == 9


def test_a_checkpoint_that_is_half_removed_names_nothing_that_must_stay(tmp_path: Path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, *fresh(), extra={"at": step})
    old = tmp_path / "checkpoints" / "step-000002"
    (old / "state.json").unlink()
    assert checkpoint.retained(tmp_path) == [{"at": 3}]
    artifact.remove(old)
    artifact.remove(old)  # what is gone may be removed again
    assert not old.exists()


def test_each_process_goes_on_with_random_numbers_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    states = [torch.Generator().manual_seed(n).get_state() for n in (1, 2)]
    parts = fresh()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.distributed, "each", lambda mine: torch.stack(states))
        checkpoint.save(tmp_path, 3, *parts, extra={})
    for rank, state in ((0, states[0]), (1, states[1]), (2, states[0])):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.distributed, "rank", lambda rank=rank: rank)
            checkpoint.load(tmp_path, *fresh())
        assert torch.equal(torch.get_rng_state(), state)


def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_line(tmp_path: Path):
    modules, optimizer = fresh()
    trained((modules, optimizer), 1)
    path = checkpoint.save(tmp_path, 1, modules, optimizer, extra={})
    larger: dict[str, nn.Module] = {"net": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))}
    with pytest.raises(UserError, match="does not fit this configuration"):
        checkpoint.load(tmp_path, larger, optimizer)
    with (path / "net.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(UserError, match="net.safetensors"):
        checkpoint.load(tmp_path, modules, optimizer)


# --- the run and its log --------------------------------------------------------------------------


class Settings(config.Config):
    out: str = "runs/x"
    lr: float = 0.1
    steps: int = 10
    resume: bool = False
    log_with: list[str] = []


def test_the_log_is_cut_back_to_the_step_and_its_floats_round_trip(tmp_path: Path):
    values = [0.1 + 0.2, 1e-17, 3.0, float(np.float32(0.1))]
    log = RunLog(tmp_path)
    for step, value in enumerate(values):
        log.write(step=step, loss=value, seconds=0.5)
    log.close()
    assert train_seconds(tmp_path) == 2.0
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    RunLog(tmp_path, start=3).close()
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and [r["loss"] for r in rows] == values[:3]
    RunLog(tmp_path).close()
    assert log.path.read_text() == ""


def test_the_peak_memory_of_a_run_is_its_own_and_not_that_of_what_started_it(tmp_path: Path):
    command = (
        "import sys, numpy as np; from pathlib import Path; from rag2.training.log import RunLog\n"
        "ballast = np.ones(int(sys.argv[2]), dtype=np.uint8); del ballast\n"
        "log = RunLog(Path(sys.argv[1])); log.write(step=0); log.write(step=1)"
    )
    ballast = np.ones(2**30, dtype=np.uint8)  # this process is large, those it starts are not
    measured = []
    for number, size in enumerate((1, 400 * 2**20)):
        out = tmp_path / str(number)
        subprocess.run([sys.executable, "-c", command, str(out), str(size)], check=True)
        measured.append(train_memory(out))
    small, large = measured
    assert len(ballast) > small > 2**26 and large - small == pytest.approx(400 * 2**20, rel=0.2)
    assert train_memory(tmp_path / "none") is None


def test_a_run_continues_with_the_same_settings_but_for_the_number_of_steps(tmp_path: Path):
    out = str(tmp_path / "a")
    run = Run(Settings(out=out), *fresh(), DATA)
    run.checkpoint(4, top=0.5)
    run.log.close()
    again = Run(Settings(out=out, steps=20, resume=True), *fresh(), DATA)
    assert (again.start, again.extra) == (4, {"top": 0.5})
    again.log.close()
    with pytest.raises(UserError, match="begun with lr=0.1, not 0.2") as caught:
        Run(Settings(out=out, lr=0.2, resume=True), *fresh(), DATA)
    assert "\n" not in str(caught.value)
    assert config.load(Settings, f"{out}/config.yaml").lr == 0.1  # the refusal changed nothing


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path):
    settings = Settings(out=str(tmp_path / "a"), resume=True)
    run = Run(settings, *fresh(), DATA)
    run.checkpoint(4)
    run.log.close()
    for other in (DATA[:1], [*DATA, "more"], DATA[::-1], [DATA[0], "other"], []):
        with pytest.raises(UserError, match="that it learns from have changed since it began"):
            Run(settings, *fresh(), other)
    Run(settings, *fresh(), list(DATA)).log.close()


def test_a_run_does_not_go_on_from_other_frozen_weights(tmp_path: Path):
    def parts(seed: int) -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4))
        module[0].requires_grad_(False)
        groups = {"a": (optim.trainable([module]), 0.1)}
        return {"net": module}, optim.adamw(groups, 0.01, (0.9, 0.98))

    settings = Settings(out=str(tmp_path / "a"), resume=True)
    run = Run(settings, *parts(1), DATA)
    run.checkpoint(4)
    run.log.close()
    with pytest.raises(UserError, match="weights that it builds on and leaves as they are have"):
        Run(settings, *parts(2), DATA)
    Run(settings, *parts(1), DATA).log.close()


def test_without_a_checkpoint_resume_starts_at_zero(tmp_path: Path):
    run = Run(Settings(out=str(tmp_path / "a"), resume=True), *fresh(), DATA)
    assert (run.start, run.extra) == (0, {})
    run.log.close()


def test_what_another_run_left_is_refused_and_kept(tmp_path: Path):
    out = tmp_path / "a"
    run = Run(Settings(out=str(out)), *fresh(), DATA)
    run.log.write(step=0)
    run.checkpoint(1)
    run.log.close()
    kept = sorted(out.rglob("*"))
    with pytest.raises(UserError, match="holds checkpoints of another run; resume=true"):
        Run(Settings(out=str(out)), *fresh(), DATA)
    assert sorted(out.rglob("*")) == kept
    assert (out / "log.jsonl").read_text().startswith('{"step": 0, ')
    mine = tmp_path / "mine"
    (mine / "final").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(UserError, match="holds final of another run"):
            Run(Settings(out=str(mine), resume=resume), *fresh(), DATA)
    assert (mine / "final").exists()


def test_two_runs_do_not_share_a_directory(tmp_path: Path):
    settings = Settings(out=str(tmp_path / "a"), resume=True)
    run = Run(settings, *fresh(), DATA)
    with pytest.raises(UserError, match="another process is training there"):
        Run(settings, *fresh(), DATA)
    run.log.close()
    Run(settings, *fresh(), DATA).log.close()


# --- optimizer ------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_decays_to_its_floor():
    for decay in ("cosine", "linear"):
        schedule = optim.Schedule(decay=decay, warmup=4, floor=0.1)
        factors = [schedule.factor(step, 20) for step in range(21)]
        assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert factors[4:] == sorted(factors[4:], reverse=True)
        assert factors[20] == pytest.approx(0.1) and factors[12] == pytest.approx(0.55)
    assert optim.Schedule(decay="constant", warmup=0).factor(19, 20) == 1.0
    wrongs: tuple[dict[str, Any], ...] = ({"warmup": -1}, {"floor": -0.1}, {"floor": 1.1})
    for wrong in wrongs:
        with pytest.raises(ValueError, match="equal to"):
            optim.Schedule(**wrong)


def test_matrices_decay_and_vectors_do_not_and_every_weight_is_in_one_group():
    modules, optimizer = fresh()
    groups = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert {p.ndim for p in groups[0.01]} == {2} and {p.ndim for p in groups[0.0]} == {1}
    grouped = [p for part in groups.values() for p in part]
    assert {*map(id, grouped)} == {*map(id, modules["net"].parameters())}
    assert len(grouped) == 3  # the tied one once
    assert optim.set_lr(optimizer, 0.5) == {"a": 0.05}
    assert optim.set_lr(optimizer, 1.0) == {"a": 0.1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_the_last_update_broke_are_never_committed(tmp_path: Path, value: float):
    module = nn.Linear(2, 2)
    optimizer = optim.adamw({"net": (module.parameters(), 0.1)}, 0.0, (0.9, 0.99))
    run = Run(Settings(out=str(tmp_path)), {"net": module}, optimizer, DATA)
    with torch.no_grad():
        module.bias[1] = value
    with pytest.raises(optim.NonFiniteError, match=r"net\.bias is not finite after 7 steps"):
        run.checkpoint(7)
    with pytest.raises(optim.NonFiniteError, match=r"net\.bias is not finite at the end"):
        run.finish()
    run.log.close()
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "final").exists()


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_update(broken: str):
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), float("nan") if broken == "gradient" else 1.0)
    with pytest.raises(optim.NonFiniteError, match="step 7"):
        optim.clip([weight], float("inf") if broken == "loss" else 1.0, 1.0, 7)
    weight.grad = torch.full((3,), 10.0)
    assert optim.clip([weight], 1.0, 1.0, 7) == pytest.approx(10 * 3**0.5)
    assert float(weight.grad.norm()) == pytest.approx(1.0, rel=1e-4)
