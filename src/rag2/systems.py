"""A home's trained parts, loaded once each and shared by the arms that use them."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from rag2 import artifact
from rag2.evaluation.arms import Arm, Reader
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.index.flat import Flat
from rag2.index.generation import Generation
from rag2.kb.lexical import BM25
from rag2.kb.store import KnowledgeBase
from rag2.retrieval import Dense, Gold, Lexical, Random, Retriever, gold_chunks
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder
from rag2.training.log import train_seconds
from rag2.types import Question

# the stage that trains a dense retriever
TRAINED_BY = {"warm": "retriever", "joint": "joint"}


class Systems:
    """Readers and retrievers by name, over the knowledge base of `home`."""

    def __init__(
        self, home: Path, seed: int, prompt: Prompt, questions: Sequence[Question]
    ) -> None:
        self.home, self.seed, self.prompt = home, seed, prompt
        with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
            self.chunks = kb.chunks()
        self.by_id = {chunk.id: chunk for chunk in self.chunks}
        self.gold = gold_chunks(questions, self.chunks)
        self._readers: dict[str, Reader] = {}
        self._retrievers: dict[str, Retriever] = {}

    def reader(self, name: str) -> Reader:
        """The generator of a stage, with what it has read so far."""
        if name not in self._readers:
            generator = Generator.load(self._verified(name) / "generator")
            self._readers[name] = Reader(generator, self.prompt, self.by_id)
        return self._readers[name]

    def retriever(self, name: str | None) -> Retriever | None:
        """The retriever of a name; None for the closed book."""
        if name is None:
            return None
        if name not in self._retrievers:
            self._retrievers[name] = self._make(name)
        return self._retrievers[name]

    def cost(self, arm: Arm) -> tuple[float, int]:
        """Seconds of training and number of trained weights that the arm adds to the base."""
        stages = {arm.generator, TRAINED_BY.get(arm.retriever or "")} - {None, "base"}
        if "joint" in stages or "sft" in stages:
            stages.add("retriever")  # both start from the warm start
        seconds, trained = 0.0, 0
        for stage in sorted(filter(None, stages)):
            seconds += train_seconds(self.home / stage)
        for stage in {arm.generator, TRAINED_BY.get(arm.retriever or "")} - {None, "base"}:
            manifest = json.loads(
                (self.home / str(stage) / "final" / artifact.MANIFEST).read_text(encoding="utf-8")
            )
            trained += manifest["meta"]["trained_parameters"]
        return seconds, trained

    @cached_property
    def _bm25(self) -> BM25:
        return BM25(self.chunks)

    def _verified(self, stage: str) -> Path:
        """What a stage committed, its bytes as they were; raises UserError for any other."""
        artifact.verify(self.home / stage / "final", kind="system")
        return self.home / stage / "final"

    def _make(self, name: str) -> Retriever:
        if name == "bm25":
            return Lexical(self._bm25)
        if name == "random":
            return Random([chunk.id for chunk in self.chunks], self.seed)
        if name == "gold":
            return Gold(self.gold)
        encoder = DualEncoder.load(self._verified(TRAINED_BY[name]) / "retriever")
        embeddings_ND = embed_corpus(encoder, [chunk.passage for chunk in self.chunks])
        index = Flat().build(embeddings_ND, np.array([chunk.id for chunk in self.chunks]))
        fingerprint = encoder.fingerprint()
        return Dense(encoder, Generation.of(index, self.chunks, encoder_fingerprint=fingerprint))
