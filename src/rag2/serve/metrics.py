"""What a server counts, in Prometheus's format; one registry for each server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rag2.answering.ask import Answer
from rag2.serve.engine import Engine
from rag2.serve.relay import Relay
from rag2.serve.work import Work

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """No text of a question, an answer or a document is in any of them."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "rag2_requests", "Responses by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "rag2_request_seconds", "From a request to the end of its response.", ["path"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.retrieve = Histogram(
            "rag2_retrieve_seconds", "Search, for all that were searched together.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.first = Histogram(
            "rag2_first_token_seconds", "From a request to its first token.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.generate = Histogram(
            "rag2_generate_seconds", "From the first token to the last.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.tokens = Counter("rag2_tokens", "Tokens by kind.", ["kind"], registry=registry)
        self.waiting = Gauge("rag2_queue_waiting", "Requests in the queue.", registry=registry)
        self.live = Gauge("rag2_answers_live", "Answers being written.", registry=registry)
        self.generation = Gauge(
            "rag2_generation", "Version of the knowledge base in the index.", registry=registry
        )
        self.version = Gauge(
            "rag2_knowledge_base_version", "Version that is searched.", registry=registry
        )
        self.swaps = Counter("rag2_swaps", "Generations swapped in.", registry=registry)

    def answered(self, work: Work, answer: Answer, total: float) -> None:
        """Count an answer that took `total` seconds."""
        first = total if work.first is None else work.first
        self.retrieve.observe(work.searched)
        self.first.observe(first)
        self.generate.observe(total - first)
        self.tokens.labels("prompt").inc(answer.prompt_tokens)
        self.tokens.labels("answer").inc(len(answer.tokens))

    def text(self, engine: Engine | Relay | None) -> bytes:
        """All of them as of now."""
        if engine is not None:
            self.waiting.set(engine.waiting)
            self.live.set(engine.live)
            place = engine.rag.place(engine.rag.live.view())
            self.generation.set(place.generation)
            self.version.set(place.version)
        return generate_latest(self.registry)
