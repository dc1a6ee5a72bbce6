"""Stages: in what order they run, and that none outlives what started it."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rag2 import artifact, stages
from rag2.registry import UserError

STEPS = 40
# Notes its process at every step, goes on after the steps that are noted, and commits at the end.
STAGE = f"""
import os, sys, time
from pathlib import Path
from rag2.artifact import committing

out, pause = Path(sys.argv[1]), float(sys.argv[2])
notes = out / "notes"
for _ in range(notes.read_text().count("\\n") if notes.exists() else 0, {STEPS}):
    with notes.open("a") as file:
        file.write(f"{{os.getpid()}}\\n")
    time.sleep(pause)
with committing(out / "final", kind="x") as staging:
    (staging / "weights").write_text("w")
"""
STARTER = """
import sys
from pathlib import Path
from rag2 import stages

job = stages.Job("fake", Path(sys.argv[1]), sys.argv[2:], frozenset(), 1)
stages.run([job], 1, print)
"""


def is_running(process: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_until(condition) -> bool:
    deadline = time.monotonic() + 60
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process with its parent")
def test_a_stage_ends_when_its_starter_is_killed_and_goes_on_in_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    out = tmp_path / "fake"
    notes = out / "notes"
    command = [sys.executable, "-c", STAGE, str(out)]
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(out), *command, "0.1"])
    try:
        assert wait_until(lambda: notes.exists() and notes.read_text().count("\n") >= 2)
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    stage = int(notes.read_text().split()[0])
    assert stage != starter.pid and wait_until(lambda: not is_running(stage))
    noted = notes.read_text().split()
    assert 2 <= len(noted) < STEPS and set(noted) == {str(stage)}
    assert not (out / "final").exists()

    done = []
    job = stages.Job("fake", out, [*command, "0"], frozenset(), 1)
    stages.run([job], 1, done.append)
    again = notes.read_text().split()
    assert done == ["fake"] and again[: len(noted)] == noted and len(again) == STEPS
    artifact.verify(out / "final")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process with its parent")
def test_a_stage_whose_starter_ended_before_it_began_does_not_begin(tmp_path: Path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-c", "open('begun', 'w')"]
    leashed = [*stages._leashed(command)]
    assert leashed[-4] == str(os.getpid())
    leashed[-4] = str(gone.pid)
    status = subprocess.run(leashed, cwd=tmp_path, capture_output=True).returncode
    assert status != 0 and not (tmp_path / "begun").exists()


def test_a_stage_outlives_neither_the_failure_of_another_nor_an_interrupt(tmp_path: Path):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    failing = [sys.executable, "-c", "import time; time.sleep(0.5); raise SystemExit('error: no')"]
    jobs = [
        stages.Job(name, tmp_path / name, command, frozenset(needs), 1)
        for name, command, needs in (("a", sleeper, ()), ("b", failing, ()), ("c", sleeper, ("b",)))
    ]
    started: list[subprocess.Popen] = []
    honest = subprocess.Popen

    def popen(*words: Any, **named: Any) -> subprocess.Popen:
        started.append(honest(*words, **named))
        return started[-1]

    finished: list[str] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="b failed: no"):
        patch.setattr(subprocess, "Popen", popen)
        stages.run(jobs, 2, finished.append)
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    assert finished == []


def test_a_failure_that_is_asked_for_is_told_and_the_others_go_on(tmp_path: Path):
    jobs = [
        stages.Job(name, tmp_path / name, [sys.executable, "-c", code], frozenset(), 1)
        for name, code in (("bad", "raise SystemExit('error: a reason')"), ("good", "pass"))
    ]
    done, failed = [], {}
    stages.run(jobs, 1, done.append, lambda name, error: failed.update({name: error.reason}))
    assert done == ["good"] and failed == {"bad": "a reason"}


def test_where_nobody_sees_the_bars_a_stage_that_is_done_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    job = stages.Job("base", tmp_path / "base", [sys.executable, "-c", ""], frozenset(), 1)
    told: list[str] = []
    stages.run([job], 1, lambda name: told.append(f"{name}: {capsys.readouterr().err}"))
    assert told == ["base: base done\n"]


def test_stages_run_after_those_they_need_and_no_more_at_once_than_asked(tmp_path: Path):
    code = "import sys, time; print(time.time()); time.sleep(0.1); print(time.time())"
    needs = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}
    jobs = [
        stages.Job(name, tmp_path / name, [sys.executable, "-c", code], frozenset(before), 1)
        for name, before in needs.items()
    ]
    finished: list[str] = []
    stages.run(jobs, 2, finished.append)
    assert sorted(finished) == ["a", "b", "c", "d"]
    spans = _spans(tmp_path)
    assert all(spans[name][0] >= spans[before][1] for name in needs for before in needs[name])
    finished.clear()
    stages.run(jobs, 1, finished.append)
    assert finished in (["a", "b", "c", "d"], ["a", "c", "b", "d"])
    in_turn = sorted(_spans(tmp_path).values())
    assert all(later[0] >= earlier[1] for earlier, later in itertools.pairwise(in_turn))


def _spans(home: Path) -> dict[str, list[float]]:
    """Begin and end of each stage, as it printed them."""
    return {
        log.parent.name: [float(line) for line in log.read_text().split()]
        for log in home.glob("*/stage.log")
    }
