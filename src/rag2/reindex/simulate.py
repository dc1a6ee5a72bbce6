"""A refresh policy, seconds of a step and of a worker -> the age of the index and training lost.

The order of events in a step is that of train/joint.py: search, train, `refresh`, `poll`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rag2.reindex.policy import AsyncRefresh, EagerRefresh, SyncRefresh


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulated run saw: ages[s] is the age in steps of the index that step s searched."""

    ages: list[int]
    first: int
    """the step that first searched a refreshed index; the number of steps where none did"""
    trained: float
    """seconds of training steps"""
    stalled: float
    """seconds that training waited for the index"""

    @property
    def settled(self) -> list[int]:
        """Ages since the first swap; all of them where there was none."""
        return self.ages[self.first :] or self.ages

    @property
    def lost(self) -> float:
        """Share of the time that training waited."""
        return self.stalled / (self.trained + self.stalled)


def simulate(
    policy: SyncRefresh | AsyncRefresh | EagerRefresh,
    step_seconds: Sequence[float],
    worker_seconds: float,
) -> Outcome:
    """As many steps as there are seconds of them; each refresh takes `worker_seconds`.

    The worker is taken to slow no step down: it has a device or a core of its own.
    """
    clock = stalled = 0.0
    taken, first = 0, len(step_seconds)  # the step of the searched weights, the first refreshed one
    pending: tuple[int, float] | None = None  # the step of its weights, when it is made
    ages: list[int] = []
    for step, seconds in enumerate(step_seconds):
        ages.append(step - taken)
        clock += seconds
        if pending is None and policy.due(step):
            pending = step + 1, clock + worker_seconds
        if pending is not None and swaps(policy, step + 1 - pending[0], pending[1] <= clock):
            wait = max(0.0, pending[1] - clock)
            clock, stalled = clock + wait, stalled + wait
            taken, pending, first = pending[0], None, min(first, step + 1)
    return Outcome(ages, first, clock - stalled, stalled)


def swaps(policy: SyncRefresh | AsyncRefresh | EagerRefresh, since: int, made: bool) -> bool:
    """Whether training turns to the pending generation `since` steps after its snapshot."""
    match policy:
        case AsyncRefresh():
            return since >= policy.lag
        case EagerRefresh():
            return made
        case _:
            return True


def step_times(mean: float, spread: float, steps: int, seed: int) -> list[float]:
    """Log-normal seconds of steps with this mean; `spread` is their standard deviation over it."""
    sigma = np.sqrt(np.log1p(spread**2))
    drawn = np.random.default_rng(seed).lognormal(-(sigma**2) / 2, sigma, steps)
    return (mean * drawn).tolist()
