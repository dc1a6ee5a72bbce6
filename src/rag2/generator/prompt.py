"""question + passages -> the text that the generator continues with an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

from pydantic import PositiveInt

from rag2.config import Config
from rag2.registry import UserError

GAP = "\n\n"  # between passages, and between the last passage and the question


@dataclass(frozen=True, slots=True)
class Built:
    """A context, and how many of its passages were dropped to fit the budget."""

    text: str
    dropped: int


class Prompt(Config):
    """[passages, best one last] then the question, in at most `budget` tokens; the answer follows.

    `cloze` asks for the text of the answer; `letters` is the format of MMLU: the choices are
    listed and the answer is a letter. Both are those of lm-evaluation-harness to the character.
    """

    format: Literal["cloze", "letters"] = "cloze"
    budget: PositiveInt = 1024

    def context(
        self,
        question: str,
        passages: Sequence[str],
        tokenizer: Any,
        choices: Sequence[str] = (),
    ) -> Built:
        """The context for one question; `passages` come best first, none means closed book.

        While it exceeds the budget, whole passages are dropped, worst first, and counted. Raises
        UserError when even the bare question does not fit: nothing is cut silently.
        """
        stem = self._stem(question, choices)
        for kept in range(len(passages), -1, -1):
            text = GAP.join([*reversed(passages[:kept]), stem])
            if self._fits(text, tokenizer):
                return Built(text, dropped=len(passages) - kept)
        raise UserError(
            f"prompt.budget={self.budget} tokens: question {question[:60]!r} alone takes "
            f"{len(tokenizer.encode(stem))}"
        )

    def continuations(self, choices: Sequence[str]) -> list[str]:
        """What follows the context for each choice: a space, then the choice or its letter."""
        if self.format == "letters":
            return [f" {letter}" for letter, _ in _lettered(choices)]
        return [f" {choice}" for choice in choices]

    def _fits(self, text: str, tokenizer: Any) -> bool:
        # A token stands for at least one character of ASCII, so that short texts need no counting.
        specials = tokenizer.num_special_tokens_to_add()
        if text.isascii() and len(text) + specials <= self.budget:
            return True
        return len(tokenizer.encode(text)) <= self.budget

    def _stem(self, question: str, choices: Sequence[str]) -> str:
        if self.format == "cloze":
            return f"Question: {question.strip()}\nAnswer:"
        if not choices:
            raise UserError("prompt.format=letters needs the choices; use cloze for free text")
        lines = [f"{letter}. {choice}" for letter, choice in _lettered(choices)]
        return "\n".join([question.strip(), *lines, "Answer:"])


def _lettered(choices: Sequence[str]) -> list[tuple[str, str]]:
    if len(choices) > len(ascii_uppercase):
        raise UserError(
            f"prompt.format=letters has {len(ascii_uppercase)} letters, not {len(choices)}; "
            "use cloze"
        )
    return list(zip(ascii_uppercase, choices, strict=False))
