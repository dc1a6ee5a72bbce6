"""Any arm as a model of lm-evaluation-harness: after `import rag2.lmeval` its name is "rag2".

Letters: K retrieved chunks, C continuations of one context.

Passages are retrieved by one field of the document, never by its options, and stand before the
evaluated question, behind description and worked examples: at the last empty line above the
question's text, or in front of everything where the context holds no such place. An empty context,
as mutual information has it, stays empty.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from pydantic import PositiveFloat, PositiveInt, ValidationError
from transformers import StoppingCriteriaList

from rag2.config import Config
from rag2.evaluation.score import Scores, marginal
from rag2.explain import mistake
from rag2.generator.choices import encode_choices
from rag2.generator.load import Generator
from rag2.generator.logprob import Answer, choice_answers, pair_logprobs
from rag2.generator.pairs import positions
from rag2.generator.prompt import GAP
from rag2.kb.lexical import BM25
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError, nearest
from rag2.retrieval import Dense, Lexical, Retriever
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk, Question


class Settings(Config):
    """The `model_args` of model "rag2"."""

    generator: str
    """folder or hub id of a causal language model"""
    retriever: str | None = None
    """folder of a dual encoder, or bm25; null: closed book"""
    kb: str | None = None
    """knowledge base file, for a retriever"""
    k: PositiveInt = 5
    """chunks of each question"""
    reading: Literal["marginal", "concat"] = "marginal"
    """marginal: each chunk alone, their probabilities mixed; concat: all in one prompt"""
    temperature: PositiveFloat = 1.0
    """of p(chunk | question), for marginal"""
    query: str = "question"
    """field of a document that is searched with"""
    sidecar: str | None = None
    """JSONL file that tells what each document was answered from"""
    dtype: str = "float32"
    device: str = "cpu"


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """The chunks of one document, best first, with their scores."""

    query: str
    chunks: list[Chunk]
    scores_K: np.ndarray


class Rag(LM):
    """A generator, and a retriever that puts passages into its prompts.

    `is_greedy` is False for a mixture of several chunks, which has no greedy continuation.
    """

    def __init__(self, batch_size: Any = None, max_batch_size: Any = None, **settings: Any) -> None:
        """Raises UserError for wrong settings; batch sizes mean nothing here and are ignored."""
        super().__init__()
        try:
            self.cfg = Settings.model_validate(settings)
        except ValidationError as error:
            raise UserError(mistake(Settings, error)) from None
        if self.cfg.device.startswith("cuda") and not torch.cuda.is_available():
            # The command line of lm-evaluation-harness asks for a GPU unless told otherwise.
            logger.warning("device=%s: there is no GPU, taking the CPU", self.cfg.device)
            self.cfg = self.cfg.model_copy(update={"device": "cpu"})
        self.generator = Generator.load(self.cfg.generator, self.cfg.dtype, self.cfg.device)
        self.chunks: dict[int, Chunk] = {}
        self.retriever = self._retriever()
        self.found: dict[str, Found] = {}
        if self.cfg.sidecar:
            Path(self.cfg.sidecar).parent.mkdir(parents=True, exist_ok=True)
            Path(self.cfg.sidecar).write_text("", encoding="utf-8")

    @property
    def max_length(self) -> int:
        """Positions of the generator."""
        return positions(self.generator.model) or 2048

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, marginal over the chunks where there are some."""
        grouped: dict[tuple[str, str], list[int]] = {}
        self._search(requests)
        for i, request in enumerate(requests):
            context = request.args[0]
            key = self._query(request) if self.retriever and context else ""
            grouped.setdefault((context, key), []).append(i)
        contexts, continuations, told = [], [], []
        for (context, query), members in grouped.items():
            endings = [requests[i].args[1] for i in members]
            prompts, dropped = self._prompts(context, query, endings)
            told.append((len(prompts), dropped))
            contexts += prompts
            continuations += [endings] * len(prompts)
        model, tokenizer = self.generator.model, self.generator.tokenizer
        encoded = encode_choices(model, tokenizer, contexts, continuations)
        answers = iter(encoded.arrange(choice_answers(model, encoded.requests)))
        result: list[Answer] = [(0.0, False)] * len(requests)
        for ((_, query), members), (count, dropped) in zip(grouped.items(), told, strict=True):
            rows = [next(answers) for _ in range(count)]
            for i, answer in zip(members, self._mixed(query, rows), strict=True):
                result[i] = answer
            self._tell(requests[members[0]], query, dropped)
        for request, answer in zip(requests, result, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return result

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in nats, closed book, in disjoint windows of the model's length."""
        tokenizer = self.generator.tokenizer
        begin = tokenizer.bos_token_id
        begin = tokenizer.eos_token_id if begin is None else begin
        pairs, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                tokenizer.encode(request.args[0]), begin, self.max_length, context_len=1
            )
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owners.append(number)
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, pair_logprobs(self.generator.model, pairs))
        return sums.tolist()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation up to a stop string; passages stand in one prompt, best last."""
        self._search(requests)
        texts = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample"):
                raise UserError(f"task {request.task_name!r}: rag2 decodes greedily, not do_sample")
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            room = int(options.get("max_gen_toks", 256))
            query = self._query(request) if self.retriever and context else ""
            context, dropped = self._concatenated(context, query, self.max_length - room)
            ids = self._encode(context)
            if len(ids) + room > self.max_length:
                raise UserError(
                    f"task {request.task_name!r}: {len(ids)} tokens of context and "
                    f"max_gen_toks={room} exceed the generator's {self.max_length} positions"
                )
            text = self._greedy(ids, room, until)
            texts.append(_before(text, until))
            self._tell(request, query, dropped)
        return texts

    def _encode(self, context: str) -> list[int]:
        """The context's tokens; a beginning of text that it spells out is not doubled."""
        tokenizer = self.generator.tokenizer
        begins = tokenizer.bos_token and context.startswith(tokenizer.bos_token)
        return tokenizer.encode(context, add_special_tokens=not begins)

    @torch.no_grad()
    def _greedy(self, ids: list[int], room: int, until: Sequence[str]) -> str:
        """At most `room` tokens; it stops when its text, without the context's, has a stop."""
        model, tokenizer = self.generator.model, self.generator.tokenizer

        def stopped(ids_1L: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
            text = tokenizer.decode(ids_1L[0, len(ids) :], skip_special_tokens=True)
            return torch.tensor([any(stop in text for stop in until)], device=ids_1L.device)

        ids_1L = torch.tensor([ids], device=self.generator.device)
        output_1L = model.generate(
            input_ids=ids_1L,
            attention_mask=torch.ones_like(ids_1L),
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([stopped]),
        )
        return tokenizer.decode(output_1L[0, len(ids) :], skip_special_tokens=True)

    # -- passages --------------------------------------------------------------------------------

    def _retriever(self) -> Retriever | None:
        cfg = self.cfg
        if cfg.retriever is None:
            if cfg.kb is not None:
                raise UserError("kb is given without a retriever: set retriever=PATH or bm25")
            return None
        if cfg.kb is None:
            raise UserError(f"retriever={cfg.retriever!r} has nothing to search: set kb=PATH")
        with KnowledgeBase(Path(cfg.kb)) as kb:
            chunks = kb.chunks()
        if cfg.k > len(chunks):
            raise UserError(f"k={cfg.k}: {cfg.kb} has only {len(chunks)} chunks")
        self.chunks = {chunk.id: chunk for chunk in chunks}
        if cfg.retriever == "bm25":
            return Lexical(BM25(chunks))
        return Dense.over(DualEncoder.load(cfg.retriever).to(cfg.device), chunks)

    def _query(self, request: Any) -> str:
        name, doc = self.cfg.query, request.doc
        if not isinstance(doc.get(name), str) or not doc[name].strip():
            raise UserError(
                f"task {request.task_name!r}: its documents have no text in the field {name!r} to "
                f"search with; fields: {', '.join(doc)}; set query=FIELD.{nearest(name, doc)}"
            )
        return doc[name]

    def _search(self, requests: Sequence[Any]) -> None:
        """Find the chunks of every query that is new."""
        if self.retriever is None:
            return
        queries = dict.fromkeys(self._query(r) for r in requests if r.args[0])
        new = [query for query in queries if query not in self.found]
        if not new:
            return
        scores_QK, ids_QK = self.retriever.search(
            [Question(str(i), query) for i, query in enumerate(new)], self.cfg.k
        )
        for query, scores_K, ids in zip(new, scores_QK, ids_QK.tolist(), strict=True):
            chunks = [self.chunks[i] for i in ids]
            self.found[query] = Found(query, chunks, scores_K.astype(np.float64))

    def _prompts(self, context: str, query: str, endings: Sequence[str]) -> tuple[list[str], int]:
        """The contexts to read, and how many chunks no prompt had room for."""
        if not query:
            return [context], 0
        longest = max(len(self.generator.tokenizer.encode(ending)) for ending in endings)
        room = self.max_length - longest
        if self.cfg.reading == "concat":
            prompt, dropped = self._concatenated(context, query, room)
            return [prompt], dropped
        prompts = []
        for chunk in self.found[query].chunks:
            prompt = self._with([chunk], context, query)
            prompts.append(prompt if self._fits(prompt, room) else context)
        return prompts, prompts.count(context)

    def _concatenated(self, context: str, query: str, room: int) -> tuple[str, int]:
        """As many passages as fit, best last; whole ones are dropped, worst first."""
        chunks = self.found[query].chunks if query else []
        for kept in range(len(chunks), 0, -1):
            prompt = self._with(chunks[:kept], context, query)
            if self._fits(prompt, room):
                return prompt, len(chunks) - kept
        return context, len(chunks)

    def _with(self, chunks: Sequence[Chunk], context: str, query: str) -> str:
        passages = [chunk.passage for chunk in chunks]
        return inserted(passages, context, query, self.generator.tokenizer.bos_token)

    def _fits(self, prompt: str, room: int) -> bool:
        return len(self.generator.tokenizer.encode(prompt)) <= room

    def _mixed(self, query: str, rows: list[list[Answer]]) -> list[Answer]:
        """One answer for each continuation from those behind each chunk."""
        if len(rows) == 1:
            return rows[0]
        logp_KC = np.array([[logp for logp, _ in row] for row in rows])
        none_C = np.zeros(logp_KC.shape[1])
        found = self.found[query]
        scores = Scores(
            logp_QKC=logp_KC[None],
            closed_QC=none_C[None],
            scores_QK=found.scores_K[None],
            ids_QK=np.array([[chunk.id for chunk in found.chunks]]),
        )
        logp_C = marginal(scores, len(rows), self.cfg.temperature)[0]
        return [(float(logp), False) for logp in logp_C]

    def _tell(self, request: Any, query: str, dropped: int) -> None:
        """One line of the sidecar for a context that was read with passages."""
        if not (self.cfg.sidecar and query):
            return
        found = self.found[query]
        row = {
            "task": request.task_name,
            "doc_id": request.doc_id,
            "query": query,
            "chunks": [chunk.id for chunk in found.chunks],
            "documents": [chunk.document for chunk in found.chunks],
            "scores": found.scores_K.tolist(),
            "dropped": dropped,
        }
        with Path(self.cfg.sidecar).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# Called, not a decorator, which would hide the class from type checkers.
register_model("rag2")(Rag)


def inserted(passages: Sequence[str], context: str, query: str, begin: str | None = None) -> str:
    """The context with the passages, the best one last, before its question.

    `begin` is the beginning of text, which stays in front where the context spells it out.
    """
    at = context.rfind(query.strip())
    start = len(begin) if begin and context.startswith(begin) else 0
    if at >= 0 and GAP in context[:at]:
        start = context.rfind(GAP, 0, at) + len(GAP)
    return context[:start] + GAP.join([*reversed(passages), context[start:]])


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


def main() -> None:
    """lm-evaluation-harness's own command line, with model "rag2" in it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
