"""A question that was searched for -> what a server is asked to write, and the answer of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rag2.answering.ask import Answer, Ask, Citation, Hit, Place
from rag2.answering.draft import Prompts
from rag2.answering.upstream import Wanted
from rag2.answering.writing import Writing


@dataclass(frozen=True, slots=True)
class Plan:
    """An answer that is about to be written."""

    ask: Ask
    found: Sequence[Hit]
    place: Place
    prompts: Prompts
    wanted: Wanted
    stops: tuple[str, ...]
    log_prior_S: Tensor | None
    """of each prompt, where there are several"""

    def answer(
        self,
        writing: Writing,
        tokens: Sequence[str],
        logps: Sequence[float],
        posterior_S: Sequence[float | None],
    ) -> Answer:
        """All of it."""
        read = zip(self.prompts.read, posterior_S, strict=True)
        return Answer(
            text=writing.text,
            citations=tuple(Citation.of(self.found[at], share) for at, share in read),
            tokens=tuple(tokens),
            logps=tuple(logps),
            finish=writing.finish,
            prompt_tokens=sum(map(len, self.prompts.contexts)),
            dropped=self.prompts.dropped,
            place=self.place,
        )
