"""The index that training searches while the weights move: search, refresh, poll."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rag2.index.generation import Generation
from rag2.modes import computing_on
from rag2.reindex.build import Part
from rag2.reindex.demand import Demand
from rag2.reindex.journal import Journal
from rag2.reindex.making import Making, Pending
from rag2.reindex.policy import (
    AdaptiveRefresh,
    AsyncRefresh,
    Background,
    EagerRefresh,
    SyncRefresh,
)
from rag2.reindex.process import Worker
from rag2.reindex.store import Store

WAIT, STOP, MADE = range(3)  # how it stands with a generation that training waits for


class Policy(Protocol):
    """When to re-encode the corpus."""

    def due(self, step: int, overlap: float | None = None) -> bool:
        """Whether a refresh starts after `step`, where this overlap was measured, if it was."""
        ...


class LiveIndex:
    """One published generation to search, at most one pending; the swap happens in `poll`."""

    def __init__(
        self,
        store: Store,
        policy: Policy,
        state: Mapping[str, Any] | None = None,
        check: Callable[[Generation], None] = lambda generation: None,
        stopping: Callable[[], bool] = lambda: False,
        largest: Callable[[int], int] = lambda value: value,
        gathered: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> None:
        """At the first generation, or where `state` of a checkpoint says.

        A refresh that was under way there is taken up again, from its snapshot. `check` sees every
        generation before it is searched, and may raise; `stopping` tells whether to wait no longer
        for one. `largest` and `gathered` put the values and rows of the processes of a training
        group together; only that whose store keeps starts workers.
        """
        self._store, self._policy = store, policy
        self._check, self._stopping = check, stopping
        self._largest, self._gathered = largest, gathered
        self._pending: Pending | None = None
        self._made: Generation | None = None
        self._making: Making | None = None
        self._journal = Journal(store.generations.parent / "swaps.jsonl", store.keep, bool(state))
        self.number = state["generation"] if state else 0
        self._swapped = state["swapped"] if state else -1
        self.generation = self._again() if state else self._first()
        store.publish(self.number)  # a run that goes on may have left a later one's name
        share = policy.share if isinstance(policy, SyncRefresh | Background) else 1.0
        self._demand = Demand(share, self.generation.ids_N, state.get("demand") if state else None)
        if state and state.get("pending"):
            self._pending = Pending(**state["pending"])
            if isinstance(policy, Background):
                self._making = self._worked_on(self._pending)
            else:  # it was made, and not swapped in
                self._made = store.load(self._pending.number, self._pending.fingerprint)
        if self._making and not self._making.done():
            self._making.launch()
        self._published = time.monotonic()
        self._stalled = 0.0

    def __enter__(self) -> "LiveIndex":
        return self

    def __exit__(self, *_: object) -> None:
        if self._making is not None:
            self._making.kill()

    def search(self, queries_BD: np.ndarray, k: int) -> np.ndarray:
        """Chunk ids_BK, best first, by the weights of `generation.step`; none for k = 0.

        What is found is counted: a partial refresh encodes it first.
        """
        if k == 0:
            return np.zeros((len(queries_BD), 0), dtype=np.int64)
        ids_BK = self.generation.index.search(queries_BD, k)[1]
        if not self._demand.whole:
            self._demand.count(self._gathered(torch.from_numpy(ids_BK)).cpu().numpy())
        return ids_BK

    def refresh(self, step: int, overlap: float | None = None) -> None:
        """Begin the next generation if the policy says that one is due after `step`.

        `overlap` is what staleness was measured to be there, for a policy that goes by it.
        Sync: it is there on return. In the background: the encoder's snapshot is durable on return.
        """
        began = time.monotonic()
        due = self._pending is None and self._policy.due(step, overlap)
        if isinstance(self._policy, AdaptiveRefresh):  # which has measured in each process
            due = bool(self._largest(due))
        if due:
            number = self.number + 1
            rows_M = None if self._demand.whole else self._demand.choose()
            if isinstance(self._policy, Background):
                fingerprint = self._store.snapshot(number, step + 1, rows_M)
                self._pending = Pending(number, step + 1, fingerprint)
                self._making = self._worked_on(self._pending)
                self._making.launch()
            elif isinstance(self._policy, SyncRefresh):
                part = None if rows_M is None else Part(self.generation, rows_M)
                with computing_on(self._policy.threads, self._policy.cpus):
                    self._made = self._store.build(number, step + 1, part)
                fingerprint = self._made.encoder_fingerprint
                self._pending = Pending(number, step + 1, fingerprint)
        self._stalled += time.monotonic() - began

    def poll(self, step: int) -> bool:
        """Swap in the pending generation if this is its step; True when the index changed.

        Training that is asked to stop while it waits here does so without the swap, which is for
        the run that goes on to make up for. Raises UserError when the worker failed more often than
        the policy allows.
        """
        if self._pending is None:
            return False
        began = time.monotonic()
        made = (self._made or self._collect()) if self._time_to_swap(step) else None
        if made is not None:
            self._check(made)
            self.generation = made
            self.number, self._swapped = self._pending.number, step
            self._store.publish(self.number)
            self._pending = self._made = self._making = None
            self._published = time.monotonic()
        self._stalled += time.monotonic() - began
        return made is not None

    def age(self, step: int) -> tuple[int, float]:
        """Optimizer steps since the generation's weights were taken, and seconds since its swap."""
        return step - self.generation.step, time.monotonic() - self._published

    def fresh(self, step: int) -> bool:
        """Whether `step` is the first to search this generation."""
        return step == self._swapped + 1

    def stalled(self) -> float:
        """Seconds that training has waited for the index since this was last asked."""
        seconds, self._stalled = self._stalled, 0.0
        return seconds

    @property
    def worker(self) -> Worker | None:
        """The process that makes the pending generation; None without one in this process."""
        return self._making.worker if self._making else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for `LiveIndex` to go on from here."""
        pending = asdict(self._pending) if self._pending else None
        state = {"generation": self.number, "swapped": self._swapped, "pending": pending}
        return state if self._demand.whole else state | {"demand": self._demand.state()}

    def prune(self, states: list[dict[str, Any]]) -> None:
        """Remove the generations and snapshots that neither these states nor this one need."""
        needed = [self._needed(), *map(needed_by, states)]
        self._store.prune(*(set().union(*parts) for parts in zip(*needed, strict=True)))

    def _needed(self) -> tuple[set[int], set[int]]:
        return needed_by(self.state())

    def _first(self) -> Generation:
        made = self._store.build(0, 0)
        self._check(made)
        return made

    def _again(self) -> Generation:
        """The generation of a checkpoint; it was looked at when it was new."""
        made = self._store.load(self.number)
        assert made.kb_hash == self._store.kb_hash, "Run refuses another knowledge base"
        return made

    def _worked_on(self, pending: Pending) -> Making:
        assert isinstance(self._policy, Background)
        return Making(self._store, self._policy, pending, self.number, self._stopping)

    def _time_to_swap(self, step: int) -> bool:
        assert self._pending is not None
        if self._making and isinstance(self._policy, AsyncRefresh | AdaptiveRefresh):
            if step + 1 < self._pending.step + self._policy.lag:
                self._making.done()  # one that failed is started again now
                return False
            return True
        if self._making and isinstance(self._policy, EagerRefresh):
            told = self._journal.steps.get(self._pending.number)
            ready = self._making.done() if told is None else step >= told
            if ready and told is None:
                self._journal.add(self._pending.number, step)
            return ready
        return True

    def _collect(self) -> Generation | None:
        """Wait for the worker and load what it committed; None if asked to stop before.

        The processes of a group tell each other again and again how it stands: one that waits in
        silence for longer than the group's timeout counts as dead.
        """
        assert self._making is not None
        while True:
            made = self._making.attempt() if self._store.keep else None
            told = self._largest(MADE if made else STOP if self._stopping() else WAIT)
            if told == MADE:
                return made or self._making.load()
            if told == STOP:
                return None


def needed_by(state: Mapping[str, Any]) -> tuple[set[int], set[int]]:
    """The generations and the snapshots that a state names."""
    pending = state.get("pending")
    number = {pending["number"]} if pending else set[int]()
    return {state["generation"]} | number, number
