"""What the log of joint training tells of the retriever, beside the loss."""

from collections.abc import Mapping
from typing import Any

from rag2.reindex.collapse import Guard, Watchdog
from rag2.reindex.live import LiveIndex
from rag2.reindex.staleness import Probe, Staleness
from rag2.retriever.encoder import DualEncoder
from rag2.training.watch import Watch


class Telemetry:
    """Recall, health and staleness, measured on validation questions that name evidence."""

    def __init__(
        self,
        encoder: DualEncoder,
        watch: Watch,
        staleness: Staleness,
        guard: Guard,
        extra: Mapping[str, Any],
    ) -> None:
        """`extra` is what a checkpoint holds of it."""
        asked = [question.question for question in watch.questions]
        self.encoder, self.watch = encoder, watch
        self.probe = Probe(staleness, asked)
        self.watchdog = Watchdog(guard, encoder, asked, extra)
        self.moves = any(weight.requires_grad for weight in encoder.parameters())

    def before(self, step: int, index: LiveIndex) -> dict[str, float]:
        """Of a generation at its first step: recall@5, and what a collapse would show in."""
        if not (index.fresh(step) and self.watch.questions):
            return {}
        # Not index.search: what validation finds must not decide what is encoded for training.
        search = index.generation.index.search
        recall = self.watch.recall_at_5(self.encoder, lambda queries, k: search(queries, k)[1])
        return {"recall": recall, **self.watchdog.figures()}

    def after(self, step: int, index: LiveIndex) -> dict[str, float]:
        """Of a generation in use, now and then: drift and overlap."""
        if not (self.moves and self.probe.due(step)):
            return {}
        return self.probe.measure(self.encoder, index.generation)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return self.watchdog.state()
