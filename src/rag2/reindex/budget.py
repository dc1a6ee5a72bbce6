"""Measured rates -> seconds of a refresh, the age of the index, training lost, devices needed.

t seconds of a training step; W seconds from a snapshot to the generation made of it. A background
refresh that is launched every `every` steps and swapped `lag` steps later gives an index that is
`lag` steps old when first searched and `lag + every - 1` when last. Training does not wait for it
as long as W <= lag * t. One refresh is under way at a time: lag < every. So the youngest bound on
the age is 2 * lag, at every = lag + 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from rag2.registry import UserError


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds as a fixed part and a part for each unit of work."""

    fixed: float
    each: float

    def seconds(self, work: float) -> float:
        """For that much work."""
        return self.fixed + self.each * work


def fit(work: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line of least squared relative error with no negative part."""
    took_M = np.asarray(seconds, dtype=np.float64)
    rows_MP = np.stack([np.ones_like(took_M), np.asarray(work, dtype=np.float64)], axis=1)
    size_P = rows_MP.max(axis=0)  # units differ by many orders of magnitude
    parts_P = nnls(rows_MP / size_P / took_M[:, None], np.ones_like(took_M))[0] / size_P
    return Line(float(parts_P[0]), float(parts_P[1]))


@dataclass(frozen=True, slots=True)
class Refresh:
    """Seconds of one refresh; only the encoding is divided among devices."""

    encode: float
    """on one device"""
    read: float
    """verifying the texts that are to be encoded"""
    build: float
    commit: float
    """writing, hashing and syncing the generation"""
    swap: float
    """verifying and reading it, while training waits"""

    def worker(self, devices: int = 1) -> float:
        """W, seconds from the snapshot to the committed generation."""
        return self.encode / devices + self.alone

    @property
    def alone(self) -> float:
        """The part of W that more devices do not shorten."""
        return self.read + self.build + self.commit


def schedule(age: int) -> tuple[int, int]:
    """(every, lag) that leave a worker most time while no step searches an index older than `age`.

    `age` in steps; raises UserError below 2, which no background refresh can keep.
    """
    if age < 2:
        raise UserError(f"age={age}: an index made in the background is at least 2 steps old")
    lag = age // 2
    return age + 1 - lag, lag


def oldest(every: int, lag: int) -> int:
    """The age in steps at which an index is last searched; lag = 0 when training waits for it."""
    return lag + every - 1


def least_age(worker: float, step: float) -> int:
    """The smallest bound on the age, in steps, that a worker of W seconds keeps without a wait."""
    return 2 * max(1, math.ceil(worker / step))


def devices_for(refresh: Refresh, age: int, step: float) -> int | None:
    """The fewest devices that keep the index at most `age` steps old and training from waiting.

    n = encode / (lag * t - read - build - commit), rounded up; None if those three alone take
    longer.
    """
    left = schedule(age)[1] * step - refresh.alone
    return max(1, math.ceil(refresh.encode / left)) if left > 0 else None


def lost_waiting(refresh: Refresh, every: int, step: float, devices: int = 1) -> float:
    """Share of the time that training loses to a synchronous refresh every `every` steps."""
    stall = refresh.worker(devices) - refresh.read  # it has the texts in memory
    return stall / (every * step + stall)


def lost_behind(refresh: Refresh, every: int, lag: int, step: float, devices: int = 1) -> float:
    """The same when it goes on in the background: the wait for a late worker, and the swap."""
    stall = max(0.0, refresh.worker(devices) - lag * step) + refresh.swap
    return stall / (every * step + stall)
