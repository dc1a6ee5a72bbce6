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

from rag2 import artifact, config
from rag2.evaluation import intake, operations, shipping
from rag2.evaluation.arms import GENERATORS, Arm, Reader
from rag2.evaluation.outcome import ArmResult
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.kb.chunk import TokenChunker
from rag2.kb.lexical import BM25
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.retrieval import Dense, Fused, Gold, Lexical, Random, Retriever, gold_chunks
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training.log import train_memory, train_seconds, train_tokens
from rag2.types import Question

# the stage that trains a dense retriever
TRAINED_BY = {"warm": "retriever", "joint": "joint"}
HOLDS = {"hybrid": "warm"}  # a retriever that is made from a trained one


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

    def chunker(self) -> TokenChunker:
        """What cut the knowledge base; UserError where its tokenizer is gone."""
        with KnowledgeBase(self.parts.kb) as kb:
            chunker = kb.chunker(self.parts.kb.parent / "tokenizer")
        if chunker is None:
            raise UserError(f"{self.parts.kb}: the tokenizer that cut it is gone")
        return chunker

    def lacks(self, arm: Arm) -> str | None:
        """What the arm needs and nobody named, in words; None for an arm that can run."""
        if arm.generator not in self.parts.generators:
            return f"its generator: set generators={{{arm.generator}: PATH}}"
        if arm.retriever == "gold" and not any(self.gold.values()):
            return "evidence: no question names a gold_chunk or a document of the corpus"
        trained = trained_retriever(arm)
        given = trained in self.parts.retrievers or (trained == "warm" and self.parts.encoder)
        if trained and not given:
            return f"its retriever: set retrievers={{{trained}: PATH}}"
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

    def settle(self, name: str | None, retriever: Retriever) -> None:
        """Let `name` stand for this retriever from now on: what validation has chosen of it."""
        assert name in self._retrievers
        self._retrievers[name] = retriever

    def cost(self, *arms: Arm) -> dict[str, Any]:
        """What training adds to the base: seconds, tokens, weights that learned, the peak memory.

        The weights are those of the two halves of the arm (of a hybrid: of its members, each
        once); the time is that of every run behind them. None where a part does not come from a
        run of rag2, so that nobody knows, and for the tokens where a run did not count them.
        """
        halves = {half: run for arm in arms for half, run in self._halves(arm).items()}
        runs = list(halves.values())
        parts = {part for arm in arms for part in (arm.generator, arm.retriever)}
        if parts & {"joint", "sft"} and "warm" in self.parts.retrievers:
            runs.append(run_of(self.parts.retrievers["warm"]))  # both start from the warm start
        if "staged" in parts:
            runs += _log_behind(run_of(self.parts.generators["staged"]))
        if None in runs:
            keys = ("train_seconds", "train_tokens", "trained_parameters", "peak_memory_bytes")
            return dict.fromkeys(keys)
        known = sorted({run for run in runs if run})
        tokens = list(map(train_tokens, known))
        return {
            "train_seconds": sum(map(train_seconds, known)),
            "train_tokens": None if None in tokens else sum(filter(None, tokens)),
            "trained_parameters": sum(
                _trained(run)[half] for (half, _), run in halves.items() if run
            ),
            "peak_memory_bytes": max(filter(None, map(train_memory, known)), default=None),
        }

    def serving(self, arms: Sequence[Arm], result: ArmResult) -> dict[str, Any]:
        """What an arm costs where it serves: bytes, operations, seconds for a new document.

        Of a hybrid `arms` are its members; what they share counts once. An arm that validation lets
        read no chunk is its generator alone: nothing new gets into that but by training it again.
        """
        paths = self.parts.generators
        generators = dict.fromkeys(arm.generator for arm in arms)
        retrievers = {arm.retriever for arm in arms if result.k and arm.retriever}
        bytes_of = shipping.generator_bytes
        weights = [bytes_of(paths[name], paths.get("base", "")) for name in generators]
        if not retrievers:
            again = self.cost(*map(Arm, generators))["train_seconds"]
            if not any(_reads_documents(run_of(paths[name])) for name in generators):
                again = None
            return {"ship_bytes": _sum(*weights), "document_seconds": again or None}
        (name,) = retrievers
        retriever = self._retrievers[name]
        search = operations.of_search(retriever, result.questions)
        if search is not None and _asks_the_closed_book(result):
            search *= result.retrieved_share or 0.0
        return {
            "ship_bytes": _sum(*weights, shipping.retriever_bytes(retriever, self.chunks)),
            "inference_flops": _sum(result.inference_flops, search),
            "document_seconds": self._intake(name),
        }

    def _intake(self, name: str) -> float | None:
        """Seconds for a new document with this retriever, measured once."""
        if name not in self._seconds:
            self._seconds[name] = intake.document_seconds(self.parts.kb, self._retrievers[name])
        return self._seconds[name]

    def _halves(self, arm: Arm) -> dict[tuple[str, str], Path | None]:
        """(half, its name) -> the run that trained it, None where nobody knows."""
        halves: dict[tuple[str, str], Path | None] = {}
        if arm.generator != "base":
            path = self.parts.generators[arm.generator]
            halves["generator", arm.generator] = run_of(path)
        if trained := trained_retriever(arm):
            given = self.parts.encoder and trained == "warm"
            path = self.parts.retrievers.get(trained, "")
            halves["retriever", trained] = None if given else run_of(path)
        return halves

    @cached_property
    def _bm25(self) -> BM25:
        return BM25(self.chunks)

    def _make(self, name: str) -> Retriever:
        if name == "bm25":
            return Lexical(self._bm25)
        if name == "hybrid":
            dense, lexical = self.retriever(HOLDS[name]), self.retriever("bm25")
            assert dense and lexical
            return Fused(dense, lexical, len(self.chunks))
        if name == "random":
            return Random([chunk.id for chunk in self.chunks], self.seed)
        if name == "gold":
            return Gold(self.gold)
        if name == "warm" and self.parts.encoder:
            encoder = DualEncoder.build(self.parts.encoder)
        else:
            encoder = DualEncoder.load(_verified(self.parts.retrievers[name]))
        return Dense.over(encoder.to(self.device).eval(), self.chunks)


def trained_retriever(arm: Arm) -> str | None:
    """The trained retriever that an arm searches with, alone or beside another; None without."""
    name = HOLDS.get(str(arm.retriever), arm.retriever)
    return name if name in TRAINED_BY else None


def run_of(path: str) -> Path | None:
    """The run directory that committed a generator or retriever; None for one from elsewhere."""
    final = Path(path).parent
    return final.parent if (final / artifact.MANIFEST).is_file() else None


def _log_behind(run: Path | None) -> list[Path]:
    """The run that made the log of questions a generator was trained on; none of one from use."""
    if run is None or not (run / "config.yaml").is_file():
        return []
    log = run_of(str(config.read(run / "config.yaml").get("questions") or ""))
    return [log] if log else []


def _verified(path: str) -> str:
    """A part that a run committed, its bytes as they were; raises UserError for any other."""
    if run_of(path):
        artifact.verify(Path(path).parent, kind="system")
    return path


def _sum(*parts: float | None) -> float | None:
    """The sum, or None where a part is not known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _asks_the_closed_book(result: ArmResult) -> bool:
    """Whether it searches only where the closed book is not sure; else the search comes first."""
    parameters = dict(result.choice.parameters) if result.choice else {}
    return parameters.get("signal") == "closed_margin_at_most"


def _reads_documents(run: Path | None) -> bool:
    """Whether what is in a document can get into the weights by the run again."""
    if run is None or not (run / "config.yaml").is_file():
        return run is not None
    objective = config.read(run / "config.yaml").get("objective")
    return not isinstance(objective, dict) or objective.get("name") != "supervised"


def _trained(run: Path) -> dict[str, int]:
    """How many weights of each half learned in a run; UserError for one that does not say so."""
    manifest = json.loads((run / "final" / artifact.MANIFEST).read_text(encoding="utf-8"))
    if "trained" not in manifest["meta"]:
        raise UserError(f"{run} was made by an earlier version of rag2: train it again")
    return manifest["meta"]["trained"]
