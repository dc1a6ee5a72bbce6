"""When the corpus is re-encoded, by whom, and when training sees the result."""

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from rag2.config import Config


def _there(cores: list[int]) -> list[int]:
    last = (os.cpu_count() or 1) - 1
    if not cores or not all(0 <= core <= last for core in cores):
        raise ValueError(f"this machine has the cores 0 to {last}")
    return cores


Cores = Annotated[list[int], AfterValidator(_there)]


class NoRefresh(Config):
    """Keep the first index: its candidates are those of the encoder that training began with."""

    name: Literal["none"] = "none"

    def due(self, step: int, overlap: float | None = None) -> bool:
        """Never."""
        return False


class Partial(Config):
    """How much of the corpus a refresh encodes."""

    share: float = Field(default=1.0, gt=0, le=1)
    """of the chunks that are encoded anew: those that training found most often since their last
    turn, and for a quarter of it the next ones round the corpus; the others stay as they are"""


class SyncRefresh(Partial):
    """Stop and re-encode the corpus every `every` steps (as Atlas does, Izacard et al. 2022)."""

    name: Literal["sync"] = "sync"
    every: int = Field(default=100, ge=1)
    """training steps between two"""
    threads: PositiveInt | None = None
    """of re-encoding, where training has fewer; null: those of training"""
    cpus: Cores | None = None
    """the cores for re-encoding; null: those of training"""

    def due(self, step: int, overlap: float | None = None) -> bool:
        """True after every `every`-th step."""
        return (step + 1) % self.every == 0


class Background(Partial):
    """A worker process re-encodes a snapshot of the encoder while training goes on."""

    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    """of the worker: cpu, cuda:N"""
    threads: PositiveInt = 1
    """of the worker"""
    cpus: Cores | None = None
    """the cores that the worker may use; null: those of training"""
    nice: int = Field(default=5, ge=0, le=19)
    """how far the worker stands back where cores are shared"""
    duty: float = Field(default=1.0, gt=0, le=1)
    """share of the time that the worker computes: below 1 it leaves a shared device free between"""
    patience: float = Field(default=300.0, gt=0)
    """seconds without a sign of life after which the worker counts as dead"""
    retries: int = Field(default=2, ge=0)
    """how often a failed worker is started again before training stops"""


class Periodic(Background):
    """A launch after a fixed number of steps."""

    every: int = Field(default=100, ge=1)
    """training steps between two launches"""

    def due(self, step: int, overlap: float | None = None) -> bool:
        """True after every `every`-th step."""
        return (step + 1) % self.every == 0


class AsyncRefresh(Periodic):
    """Re-encode in the background (Guu et al. 2020) and swap exactly `lag` steps after the launch.

    Training waits there for a worker that is late, so that which index a step searches depends on
    the settings alone, never on the clock: a run that was killed goes on exactly.
    """

    name: Literal["async"] = "async"
    lag: int = Field(default=50, ge=1)
    """training steps from the snapshot to the swap; the worker has them to finish in"""

    @model_validator(mode="after")
    def _one_at_a_time(self) -> "AsyncRefresh":
        if self.lag >= self.every:
            raise ValueError(f"lag={self.lag} must be below every={self.every}: one at a time")
        return self


class EagerRefresh(Periodic):
    """Re-encode in the background and swap as soon as the worker is done.

    The clock decides at which step that is; swaps.jsonl of the run tells it, and a run that goes on
    from a checkpoint swaps at the steps it tells, as far as it goes.
    """

    name: Literal["eager"] = "eager"


class AdaptiveRefresh(Background):
    """Re-encode in the background when the index has become stale, not after so many steps.

    A launch follows a measurement (see `Staleness`) whose overlap is below `min_overlap`; the swap
    is `lag` steps later, as with `async`.
    """

    name: Literal["adaptive"] = "adaptive"
    min_overlap: float = Field(default=0.9, ge=0, le=1)
    """share of the best chunks by stored embeddings that are among the best by new ones"""
    lag: int = Field(default=25, ge=1)
    """training steps from the snapshot to the swap"""

    def due(self, step: int, overlap: float | None = None) -> bool:
        """Whether the overlap measured after `step`, if it was, is too small."""
        return overlap is not None and overlap < self.min_overlap
