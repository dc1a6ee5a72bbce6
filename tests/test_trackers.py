"""Trackers get the figures of log.jsonl, step by step, and change nothing in the run."""

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rag2.registry import UserError
from rag2.training import distributed
from small_runs import Killed, Load, killed_at, log, settings, start, weights

Told = list[tuple[int, dict[str, float]]]


def needed(module: str) -> ModuleType:
    """The module; without it a test is skipped, but fails in continuous integration."""
    return importlib.import_module(module) if os.environ.get("CI") else pytest.importorskip(module)


needed("tensorboard")


def lines(out: Path) -> Told:
    """The numbers of log.jsonl by step."""
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [
        (row.pop("step"), {k: v for k, v in row.items() if not isinstance(v, str)}) for row in rows
    ]


def tensorboard_of(out: Path) -> Told:
    """What TensorBoard shows of a run."""
    accumulator = needed("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    told: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in told.setdefault(event.step, {}), (tag, event.step)
            told[event.step][tag] = event.value
    return sorted(told.items())


@pytest.fixture(scope="module")
def trackio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The storage of trackio, in a folder of ours."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trackio")
        patch.setenv("TRACKIO_DIR", str(folder))  # read once, when trackio is imported
        assert folder == needed("trackio").TRACKIO_DIR
        yield needed("trackio.sqlite_storage").SQLiteStorage


def trackio_of(storage: Any, out: Path) -> Told:
    """What trackio holds of a run, in the order in which it was told."""
    rows = storage.get_logs("rag2", str(out))
    return [(row.pop("step"), {k: row[k] for k in row if k != "timestamp"}) for row in rows]


def near(told: Told) -> Any:
    """Equal up to the float32 that TensorBoard keeps."""
    return [(step, pytest.approx(figures, rel=1e-6)) for step, figures in told]


def test_the_trackers_get_every_number_of_the_log_and_the_run_stays_the_same(
    recipe: Load, home: Path, tmp_path: Path, trackio: Any
):
    plain, tracked = tmp_path / "plain", tmp_path / "tracked"
    start(recipe, "finetune", home, plain)
    start(recipe, "finetune", home, tracked, log_with=["tensorboard", "trackio"])
    assert weights(tracked) == weights(plain) and log(tracked) == log(plain)
    told = lines(tracked)
    assert [step for step, _ in told] == list(range(9))
    assert {"loss", "grad_norm", "seconds", "peak_memory_bytes"} <= told[0][1].keys()
    assert tensorboard_of(tracked) == near(told)
    assert trackio_of(trackio, tracked) == told
    assert not (plain / "tensorboard").exists() and trackio_of(trackio, plain) == []


def test_what_is_no_number_stays_in_the_log(recipe: Load, home: Path, tmp_path: Path, trackio: Any):
    start(recipe, "joint", home, tmp_path / "joint", log_with=["trackio"], steps=1)
    assert len(log(tmp_path / "joint")[0]["retrieved_digest"]) == 64
    assert trackio_of(trackio, tmp_path / "joint") == lines(tmp_path / "joint")


def test_the_trackers_get_the_settings(recipe: Load, home: Path, tmp_path: Path, trackio: Any):
    names = ["tensorboard", "trackio"]
    start(recipe, "finetune", home, tmp_path / "a", log_with=names, steps=1)
    held = trackio.get_run_config("rag2", str(tmp_path / "a"))
    assert (held["tuning.rank"], held["lr"], held["betas"]) == (4, 0.01, "[0.9, 0.98]")
    (file,) = (tmp_path / "a" / "tensorboard").glob("*/hparams.yml")
    assert "tuning.rank: 4\n" in file.read_text()


def test_a_run_that_goes_on_tells_the_steps_after_its_checkpoint_again(
    recipe: Load, home: Path, tmp_path: Path, trackio: Any
):
    out, names = tmp_path / "finetune", ["tensorboard", "trackio"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=7)
        start(recipe, "finetune", home, out, log_with=names)
    assert [step for step, _ in tensorboard_of(out)] == list(range(7))
    start(recipe, "finetune", home, out, log_with=names, resume=True)
    told = lines(out)
    assert [step for step, _ in told] == list(range(9))
    assert tensorboard_of(out) == near(told)  # those from before the kill are hidden
    again = trackio_of(trackio, out)  # in the same run
    assert [step for step, _ in again] == [*range(7), *range(4, 9)]
    assert dict(again) == dict(told)


def test_trackers_may_change_when_a_run_goes_on(recipe: Load, home: Path, tmp_path: Path):
    out = tmp_path / "finetune"
    start(recipe, "finetune", home, out, steps=4, log_with=["tensorboard"])
    start(recipe, "finetune", home, out, resume=True)
    assert [step for step, _ in tensorboard_of(out)] == list(range(4)) and len(log(out)) == 9


def test_only_the_first_process_tracks(
    recipe: Load, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    start(recipe, "finetune", home, tmp_path / "b", log_with=["tensorboard"])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["pretrain", "retriever", "finetune", "joint"])
def test_an_unknown_tracker_is_answered_with_the_nearest(recipe: Load, home: Path, kind: str):
    module = recipe(f"train/{kind}.py")
    with pytest.raises(ValueError, match=r"unknown tracker 'tensorbord'.*Did you mean 'tensorboar"):
        getattr(module, f"{kind.title()}Config")(**settings(kind, home), log_with=["tensorbord"])


def test_a_tracker_that_cannot_be_had_ends_the_run_before_it_begins(
    recipe: Load, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from accelerate import tracking

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_available_trackers", [])
        with pytest.raises(UserError, match="log_with: wandb is not installed: pip install wandb"):
            start(recipe, "finetune", home, out, log_with=["wandb"])
    assert not out.exists()

    def refuse(self: Any) -> None:
        raise ConnectionError("no server\nat all")

    monkeypatch.setattr(tracking.TrackioTracker, "start", refuse)
    with pytest.raises(UserError) as caught:
        start(recipe, "finetune", home, out, log_with=["trackio"])
    assert str(caught.value) == "log_with: trackio did not start: ConnectionError: no server"
    start(recipe, "finetune", home, out, steps=1)  # nothing of it is in the way
