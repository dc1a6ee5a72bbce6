"""Whatever a power loss leaves of a run loads, and the harness that says so finds mistakes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FAULTS = ("folders not synced", "files not synced", "pointer before files", "pointer in place")


@pytest.fixture(scope="module")
def powerloss() -> ModuleType:
    """tests/powerloss.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "powerloss", Path(__file__).parent / "powerloss.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_state_loads_and_has_all_that_was_told(powerloss: ModuleType, seed: int):
    found = powerloss.explore(2500, seed)
    assert found["wrong"] == 0, found
    assert found["states"] > 1500 and found["different"] > 400, found


@pytest.mark.slow
def test_every_one_of_a_hundred_thousand_states_loads(powerloss: ModuleType, seed: int):
    found = powerloss.explore(250_000, seed)
    assert found["wrong"] == 0 and found["states"] >= 100_000, found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_mistake_is_found(powerloss: ModuleType, seed: int, fault: str):
    found = powerloss.explore(600, seed, fault)
    assert found["wrong"] > 0, found
