"""A system whose generator runs elsewhere: retrieval, documents and citations stay here."""

import asyncio
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import numpy as np

from rag2.answering.ask import Answer, Ask, Citation, Hit, Scored
from rag2.answering.background import Background
from rag2.answering.draft import Prompts, room
from rag2.answering.exported import Exported
from rag2.answering.lexicon import Lexicon
from rag2.answering.library import Library, Parts, check_choices, names_of, parts_of
from rag2.answering.plan import Plan
from rag2.answering.rag import Rag
from rag2.answering.scoring import from_table
from rag2.answering.settings import Reading
from rag2.answering.thorough import best, scored
from rag2.answering.upstream import PROBE, Upstream, Wanted
from rag2.answering.wire import Choice
from rag2.answering.writing import Writing
from rag2.evaluation.score import Scores
from rag2.generator.mixture import log_prior
from rag2.generator.pairs import encode_contexts
from rag2.registry import UserError

SPARE = 3  # tokens beside prompt and answer: the answer's end, and what a server adds to an echo
CONCAT = "ask for reading=concat, or serve with --reading concat"


class Remote(Library):
    """Answers as `Rag` does, by a generator behind an OpenAI-compatible address.

    Read in one prompt, an answer is written and told piece by piece. Read apart, it is the best of
    the candidates that each chunk alone leads to (`rag2.answering.thorough`).
    """

    def __init__(
        self, parts: Parts, upstream: Upstream, lexicon: Lexicon, background: Background
    ) -> None:
        """`upstream` was found on the loop of `background`; all are closed by who made them."""
        super().__init__(*parts)
        self.upstream, self.lexicon, self.background = upstream, lexicon, background
        self.readings = ("marginal", "concat") if upstream.scores else ("concat",)
        limits = [limit for limit in (lexicon.positions, upstream.limit) if limit is not None]
        self._positions = min(limits) - SPARE if limits else None

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        url: str,
        model: str = "",
        key: str = "",
        state: str | Path | None = None,
        device: str = "cpu",
    ) -> Self:
        """The system that `rag2 export` wrote, but for its generator's weights.

        `model` is its name at the server, for one that serves several; `device` the retriever's.
        Raises UserError as `Rag.from_pretrained` does, and for a server that is not there or
        serves another model, as far as the tokens tell.
        """
        exported = Exported.open(directory)
        lexicon = Lexicon.read(exported)
        with ExitStack() as opened:
            background = opened.enter_context(Background())
            upstream = Upstream(url, model, key)
            opened.callback(lambda: background.call(upstream.close()))
            (probe,) = encode_contexts(lexicon.tokenizer, [PROBE])
            background.call(upstream.find(len(probe)))
            parts = parts_of(exported, state, device, opened)
            remote = cls(parts, upstream, lexicon, background)
            remote._closing = opened.pop_all()
        return remote

    # ----- answers -------------------------------------------------------------------------------

    def answer(self, question: str, **ask: Any) -> Answer:
        """Write an answer; keywords are the fields of `Ask`.

        Raises UserError for a wrong one, and Unavailable where the server fails.
        """
        return self.answers([Ask.of(question, **ask)])[0]

    def answers(self, asks: Sequence[Ask]) -> list[Answer]:
        """Write answers at the same time."""
        plans = [self.plan(ask) for ask in asks]

        async def together() -> list[Answer]:
            return await asyncio.gather(*(self.written(plan, lambda _: None) for plan in plans))

        return self.background.call(together())

    def stream(self, question: str, **ask: Any) -> Iterator[str | Answer]:
        """Pieces of the text as they are certain, then the answer itself."""
        plan, told = self.plan(Ask.of(question, **ask)), SimpleQueue[str | None]()
        writing = self.background.start(self.written(plan, told.put))
        writing.add_done_callback(lambda _: told.put(None))
        try:
            while (piece := told.get()) is not None:
                yield piece
            yield writing.result()
        finally:
            writing.cancel()

    def plan(self, ask: Ask) -> Plan:
        """Search and make the prompts. Raises UserError for what this system cannot do."""
        reading = self._reading(ask)
        ((found, view),) = self.searched([ask])
        chunks, limit = [hit.chunk for hit in found], self._positions
        wanted = ask.max_new_tokens or self.settings.max_new_tokens
        tokenizer = self.lexicon.tokenizer
        prompts = Prompts.of(ask, chunks, self.settings, tokenizer, wanted, limit)
        most = room(limit, prompts, ask, self.settings)
        apart = reading == "marginal" and len(prompts.texts) > 1
        scores_S = np.array([found[at].score for at in prompts.read], dtype=np.float64)
        stops = (*self.settings.stop, *ask.stop)
        return Plan(
            ask=ask,
            found=found,
            place=self.place(view),
            prompts=prompts,
            wanted=Wanted(most, stops, ask.temperature, ask.top_p, ask.seed),
            stops=stops,
            log_prior_S=log_prior(scores_S, self.settings.temperature) if apart else None,
        )

    async def written(self, plan: Plan, tell: Callable[[str], object]) -> Answer:
        """Write it, on the background's loop, telling pieces as they are certain."""
        prompts = plan.prompts
        if plan.log_prior_S is not None:
            texts, prior_S = prompts.texts, plan.log_prior_S
            made = await best(self.upstream, self.lexicon, texts, prior_S, plan.wanted, plan.stops)
            if made.writing.text:
                tell(made.writing.text)
            return plan.answer(made.writing, made.tokens, made.logps, made.posterior)
        writing = Writing(plan.stops, self.lexicon.ends)

        def add(piece: Choice) -> bool:
            goes_on = writing.add(piece)
            if news := writing.news():
                tell(news)
            return goes_on

        await self.upstream.stream(prompts.texts[0], plan.wanted, add)
        tokens, logps = self._tokens(prompts.texts[0], writing)
        alone = len(prompts.read) == 1
        return plan.answer(writing, tokens, logps, [1.0 if alone else None] * len(prompts.read))

    def _tokens(self, prompt: str, writing: Writing) -> tuple[list[str], list[float]]:
        """Those of the text, as the server tells them; else by our tokenizer, with NaN."""
        told = writing.kept()
        if told or not writing.text:
            return [token for token, _ in told], [_or_nan(logp) for _, logp in told]
        tokenizer = self.lexicon.tokenizer
        ids = tokenizer.encode(f" {writing.text}", add_special_tokens=False)
        return [tokenizer.decode([id]) for id in ids], [math.nan] * len(ids)

    def _reading(self, ask: Ask) -> Reading:
        reading = ask.reading or self.settings.reading
        if ask.k != 0 and reading == "token":
            raise UserError(f"reading=token needs the generator in this process: {CONCAT}")
        if ask.k != 0 and reading not in self.readings:
            raise UserError(
                f"reading={reading} needs a generator's server that scores prompts (echo with "
                f"logprobs, as vLLM does), which this one does not: {CONCAT}"
            )
        return reading

    # ----- scores --------------------------------------------------------------------------------

    def score(
        self,
        question: str,
        choices: Sequence[str],
        k: int | None = None,
        reading: Reading | None = None,
        namespaces: Collection[str] | None = None,
    ) -> Scored:
        """log p(choice | question) of each choice, as the harness computes it.

        Raises UserError as `Rag.score` does, and for a server that does not score prompts.
        """
        ask = Ask(question, k=k, reading=reading, namespaces=names_of(namespaces))
        check_choices(choices)
        if not self.upstream.scores:
            raise UserError(
                "scores need a generator's server that scores prompts (echo with logprobs, as vLLM "
                "does), which this one does not; answers are written with reading=concat"
            )
        together = self._reading(ask) == "concat"
        ((hits, view),) = self.searched([ask])
        together = together and len(hits) > 1
        table = self._table(question, choices, hits, together)
        logps, posterior = from_table(table, together, self.settings.temperature)
        shares = posterior or [None] * len(hits)
        cited = tuple(Citation.of(hit, share) for hit, share in zip(hits, shares, strict=True))
        return Scored(tuple(logps), cited, self.place(view))

    def _table(
        self, question: str, choices: Sequence[str], hits: Sequence[Hit], together: bool
    ) -> Scores:
        """The harness's table of one question; -inf for what this reading does not look at."""
        prompt, tokenizer = self.settings.prompt, self.lexicon.tokenizer
        passages = [hit.chunk.passage for hit in hits]
        groups = [passages] if together or not hits else [[passage] for passage in passages]
        contexts = [
            prompt.context(question, group, tokenizer, choices, prompt.header()).text
            for group in groups
        ]
        continuations = prompt.continuations(choices)
        rows = self.background.call(scored(self.upstream, self.lexicon, contexts, continuations))
        for choice, row in zip(choices, rows, strict=True):
            if not row:
                raise UserError(f"choice {choice[:60]!r}: it and its prompt are too long to score")
        logp_GC = np.array(
            [[sum(logp for _, logp in row[g]) for row in rows] for g in range(len(groups))]
        )
        nothing_QC = np.full((1, len(choices)), -np.inf)
        apart_QKC = np.full((1, len(hits), len(choices)), -np.inf)
        if hits and not together:
            apart_QKC[0] = logp_GC
        return Scores(
            logp_QKC=apart_QKC,
            closed_QC=nothing_QC if hits else logp_GC,
            scores_QK=np.array([[hit.score for hit in hits]], dtype=np.float64),
            ids_QK=np.array([[hit.chunk.id for hit in hits]], dtype=np.int64),
            concat={len(hits): logp_GC} if together else {},
        )


def _or_nan(logp: float | None) -> float:
    return math.nan if logp is None else logp


System = Rag | Remote
