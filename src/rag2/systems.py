"""Trained parts by name, loaded once each and shared by the arms that use them."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rag2 import artifact
from rag2.evaluation import intake, operations, shipping
from rag2.evaluation.arms import GENERATORS, Arm, Reader
from rag2.evaluation.outcome import ArmResult
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.kb.lexical import BM25
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.retrieval import Dense, Gold, Lexical, Random, Retriever, gold_chunks
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training.log import train_memory, train_seconds, train_tokens
from rag2.types import Question

# the stage that trains a dense retriever
TRAINED_BY = {"warm": "retriever", "joint": "joint"}


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the knowledge base lies, and each generator and trained retriever by its name."""

    kb: Path
    generators: Mapping[str, str]
    retrievers: Mapping[str, str]
    encoder: EncoderConfig | None = None
    """a pretrained encoder as the warm retriever, instead of that of `retrievers`"""

    @classmethod
    def of_home(cls, home: Path) -> "Parts":
        """The parts that the stages of a home make."""
        return cls(
            home / "data" / "kb.sqlite",
            {name: str(home / name / "final" / "generator") for name in GENERATORS},
            {n: str(home / stage / "final" / "retriever") for n, stage in TRAINED_BY.items()},
        )


class Systems:
    """Readers and retrievers by name, over one knowledge base."""

    def __init__(
        self,
        parts: Parts,
        seed: int,
        prompt: Prompt,
        questions: Sequence[Question],
        headers: Mapping[str, str],
        dtype: str,
        device: torch.device,
    ) -> None:
        """`headers` are the beginnings of the questions' prompts, by question id."""
        self.parts, self.seed, self.prompt = parts, seed, prompt
        self.headers, self.dtype, self.device = headers, dtype, device
        with KnowledgeBase(parts.kb) as kb:
            self.chunks = kb.chunks()
        self.by_id = {chunk.id: chunk for chunk in self.chunks}
        self.gold = gold_chunks(questions, self.chunks)
        self._retrievers: dict[str, Retriever] = {}
        self._seconds: dict[str, float | None] = {}
        self._loading = threading.Lock()

    def lacks(self, arm: Arm) -> str | None:
        """What the arm needs and nobody named, in words; None for an arm that can run."""
        if arm.generator not in self.parts.generators:
            return f"its generator: set generators={{{arm.generator}: PATH}}"
        if arm.retriever == "gold" and not any(self.gold.values()):
            return "evidence: no question names a gold_chunk or a document of the corpus"
        given = arm.retriever in self.parts.retrievers or (
            arm.retriever == "warm" and self.parts.encoder
        )
        if arm.retriever in TRAINED_BY and not given:
            return f"its retriever: set retrievers={{{arm.retriever}: PATH}}"
        return None

    @contextmanager
    def reader(self, name: str) -> Iterator[Reader]:
        """The generator of a name; it is loaded here and let go of at the end."""
        with self._loading:  # transformers' loading is not meant for several threads
            path = _verified(self.parts.generators[name])
            generator = Generator.load(path, self.dtype, self.device)
        yield Reader(generator, self.prompt, self.by_id, headers=dict(self.headers))

    def retriever(self, name: str | None) -> Retriever | None:
        """The retriever of a name; None for the closed book."""
        if name is None:
            return None
        if name not in self._retrievers:
            self._retrievers[name] = self._make(name)
        return self._retrievers[name]

    def cost(self, arm: Arm) -> dict[str, Any]:
        """What training adds to the base: seconds, tokens, weights that learned, the peak memory.

        The weights are those of the arm's own two halves; the time is that of every run behind
        them. None where a part does not come from a run of rag2, so that nobody knows, and for
        the tokens where a run did not count them.
        """
        halves: dict[str, Path | None] = {}
        if arm.generator != "base":
            halves["generator"] = run_of(self.parts.generators[arm.generator])
        if arm.retriever in TRAINED_BY:
            given = self.parts.encoder and arm.retriever == "warm"
            path = self.parts.retrievers.get(str(arm.retriever), "")
            halves["retriever"] = None if given else run_of(path)
        runs = list(halves.values())
        if {arm.generator, arm.retriever} & {"joint", "sft"} and "warm" in self.parts.retrievers:
            runs.append(run_of(self.parts.retrievers["warm"]))  # both start from the warm start
        if None in runs:
            keys = ("train_seconds", "train_tokens", "trained_parameters", "peak_memory_bytes")
            return dict.fromkeys(keys)
        known = sorted({run for run in runs if run})
        tokens = list(map(train_tokens, known))
        return {
            "train_seconds": sum(map(train_seconds, known)),
            "train_tokens": None if None in tokens else sum(filter(None, tokens)),
            "trained_parameters": sum(_trained(run)[half] for half, run in halves.items() if run),
            "peak_memory_bytes": max(filter(None, map(train_memory, known)), default=None),
        }

    def serving(self, arm: Arm, result: ArmResult) -> dict[str, Any]:
        """What the arm costs where it serves: bytes, operations, seconds for a new document.

        An arm that validation lets read no chunk is its generator alone: nothing new gets into that
        but by training it again.
        """
        names = self.parts.generators
        weights = shipping.generator_bytes(names[arm.generator], names.get("base", ""))
        if not (result.k and arm.retriever):
            again = self.cost(Arm(arm.generator))["train_seconds"]
            return {"ship_bytes": weights, "document_seconds": again or None}
        retriever = self._retrievers[arm.retriever]
        search = operations.of_search(retriever, result.questions)
        return {
            "ship_bytes": _sum(weights, shipping.retriever_bytes(retriever, self.chunks)),
            "inference_flops": _sum(result.inference_flops, search),
            "document_seconds": self._intake(arm.retriever),
        }

    def _intake(self, name: str) -> float | None:
        """Seconds for a new document with this retriever, measured once."""
        if name not in self._seconds:
            self._seconds[name] = intake.document_seconds(self.parts.kb, self._retrievers[name])
        return self._seconds[name]

    @cached_property
    def _bm25(self) -> BM25:
        return BM25(self.chunks)

    def _make(self, name: str) -> Retriever:
        if name == "bm25":
            return Lexical(self._bm25)
        if name == "random":
            return Random([chunk.id for chunk in self.chunks], self.seed)
        if name == "gold":
            return Gold(self.gold)
        if name == "warm" and self.parts.encoder:
            encoder = DualEncoder.build(self.parts.encoder)
        else:
            encoder = DualEncoder.load(_verified(self.parts.retrievers[name]))
        return Dense.over(encoder.to(self.device).eval(), self.chunks)


def run_of(path: str) -> Path | None:
    """The run directory that committed a generator or retriever; None for one from elsewhere."""
    final = Path(path).parent
    return final.parent if (final / artifact.MANIFEST).is_file() else None


def _verified(path: str) -> str:
    """A part that a run committed, its bytes as they were; raises UserError for any other."""
    if run_of(path):
        artifact.verify(Path(path).parent, kind="system")
    return path


def _sum(*parts: float | None) -> float | None:
    """The sum, or None where a part is not known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _trained(run: Path) -> dict[str, int]:
    """How many weights of each half learned in a run; UserError for one that does not say so."""
    manifest = json.loads((run / "final" / artifact.MANIFEST).read_text(encoding="utf-8"))
    if "trained" not in manifest["meta"]:
        raise UserError(f"{run} was made by an earlier version of rag2: train it again")
    return manifest["meta"]["trained"]
