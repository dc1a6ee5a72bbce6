"""The harness that kills runs finds nothing in the code as it is, and every planted mistake."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HARNESS = Path(__file__).parent / "chaos.py"
FAULTS = (
    "swap when ready",
    "random state forgotten",
    "refresh under way forgotten",
    "finds forgotten",
    "pointer before files",
)
pytestmark = pytest.mark.slow


def chaos(seed: int, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and what was found."""
    command = [sys.executable, str(HARNESS), "--seed", str(seed), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_killed_runs_go_on_to_what_they_would_have_been(seed: int):
    status, found = chaos(seed, "--kills", "12")
    assert status == 0 and found["differences"] == 0, found
    assert found["kills"] >= 12 and found["runs"] > 0 and found["loaded"] > 0


def test_a_killed_run_with_a_real_worker_process_goes_on_too(seed: int):
    status, found = chaos(seed, "--kills", "4", "--processes")
    assert status == 0 and found["kills"] >= 4, found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_mistake_is_found(seed: int, fault: str):
    status, found = chaos(seed, "--kills", "200", "--fault", fault)
    assert status == 1 and found["differences"] > 0, found
