"""A generation that a worker makes: looked after, begun again where it fails, loaded when whole."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from rag2.index.generation import Generation
from rag2.registry import UserError
from rag2.reindex.policy import Background
from rag2.reindex.process import Worker, WorkerFailed
from rag2.reindex.store import Store

logger = logging.getLogger(__name__)

LOOK = 1.0  # seconds that one attempt waits for the worker


@dataclass(frozen=True, slots=True)
class Pending:
    """A generation in the making: of the weights of `step`, which have this fingerprint."""

    number: int
    step: int
    fingerprint: str


class Making:
    """What training sees of a pending generation; of a group's processes one has the worker."""

    def __init__(
        self,
        store: Store,
        policy: Background,
        pending: Pending,
        current: int,
        stopping: Callable[[], bool],
    ) -> None:
        """`current` is the generation whose chunks it takes; see `LiveIndex` for `stopping`."""
        self._store, self._policy, self._pending = store, policy, pending
        self._current, self._stopping = current, stopping
        self.worker: Worker | None = None
        """the process; None in the others of a group, and where it was done before a resume"""
        self._failures = 0

    def launch(self) -> None:
        """Start the worker, where the store keeps."""
        if self._store.keep:
            pending = self._pending
            self.worker = self._store.launch(
                pending.number, self._current, pending.step, self._policy
            )

    def done(self) -> bool:
        """Whether the worker is; one that failed is started again at once."""
        if self.worker is None:
            return self._store.complete(self._pending.number)
        try:
            return self.worker.finished()
        except WorkerFailed as failure:
            self._try_again(failure)
            return False

    def attempt(self) -> Generation | None:
        """What the worker made, if it is done within a second; else, or if it failed, None.

        Raises UserError when it failed more often than the policy allows.
        """
        try:
            if self.worker is not None and not self.worker.wait(LOOK):
                return None
            return self.load()
        except (WorkerFailed, UserError) as failure:
            self._try_again(failure)
            return None

    def load(self) -> Generation:
        """What the worker committed, read back: whole, of all chunks, of this encoder."""
        made = self._store.load(self._pending.number, self._pending.fingerprint)
        if len(made) != len(self._store.chunks):
            raise UserError(f"it has {len(made)} of {len(self._store.chunks)} chunks")
        return made

    def kill(self) -> None:
        """End the worker, if there is one."""
        if self.worker is not None:
            self.worker.kill()

    def _try_again(self, failure: Exception) -> None:
        if self._stopping():  # it may have been told to stop, too
            return
        self._failures += 1
        what = f"re-index worker of generation {self._pending.number}: {failure}"
        if self._failures > self._policy.retries:
            raise UserError(
                f"{what}; it was started {self._failures} times. Mend the cause and go on with "
                "resume=true"
            )
        logger.warning("%s; it is started again", what)
        self.launch()
