"""Writers of a knowledge base that are killed, and writers that write at once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parent


def ran(*words: str, tool: str = "kb_kills.py") -> dict[str, Any]:
    """What the tool found, in a process that may fork."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(TOOLS / tool), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_no_kill_loses_what_was_told_or_leaves_what_was_not_written(seed: int):
    found = ran("--kills", "15", "--seed", str(seed))
    assert not found["wrong"] and found["kills"] == 15 and found["acknowledged"] > 0, found


@pytest.mark.slow
def test_three_hundred_kills_lose_nothing(seed: int):
    found = ran("--kills", "300", "--seed", str(seed))
    assert not found["wrong"] and found["kills"] == 300 and found["acknowledged"] > 1000, found


@pytest.mark.parametrize("fault", ["told before the commit", "no transaction"])
def test_a_planted_mistake_is_found(seed: int, fault: str):
    found = ran("--kills", "150", "--seed", str(seed), "--fault", fault)
    assert found["wrong"], found


MISTAKES = ["generation as it was", "told before the compaction"]


def test_no_kill_of_a_live_index_changes_an_answer_and_a_planted_mistake_is_found(seed: int):
    words = ["--kills", "5", "--seed", str(seed), "--planted", MISTAKES[0]]
    found = ran(*words, tool="live_kills.py")
    assert not found["wrong"] and found["kills"] == 5 and found["acknowledged"] > 0, found
    assert found["planted"][MISTAKES[0]], found


@pytest.mark.slow
def test_a_hundred_kills_of_a_live_index_change_no_answer(seed: int):
    words = ["--kills", "100", "--seed", str(seed), "--planted", *MISTAKES]
    found = ran(*words, tool="live_kills.py")
    assert all(found["planted"].values()), found
    assert not found["wrong"] and found["within a publication"] > 5, found
    assert found["compactions told"] > 10, found


def test_writers_at_once_lose_nothing():
    found = ran("--writers", "4", "--commits", "25")
    assert not found["wrong"] and found["versions"] == 100 and found["lost"] == 0, found


@pytest.mark.slow
def test_eight_writers_of_two_hundred_commits_lose_nothing():
    found = ran("--writers", "8", "--commits", "200")
    assert not found["wrong"] and found["versions"] == 1600 and found["lost"] == 0, found
