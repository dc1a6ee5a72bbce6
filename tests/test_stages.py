"""A stage ends with what started it, also when that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rag2 import artifact, stages

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
