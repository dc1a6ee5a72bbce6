"""question + passages -> the text that the generator continues with an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

from pydantic import PositiveInt

from rag2.config import Config
from rag2.registry import UserError
from rag2.types import Question

GAP = "\n\n"  # after the description's examples and each passage


@dataclass(frozen=True, slots=True)
class Built:
    """A context, and how many of its passages were dropped to fit the budget."""

    text: str
    dropped: int
    head: int = 0
    """characters before the question: what other questions about the same passages begin with"""


class Prompt(Config):
    """[description, worked examples] [passages, best one last] question; the answer follows.

    `cloze` asks for the text of the answer; `letters` is the format of MMLU: the choices are
    listed and the answer is a letter. Both are those of lm-evaluation-harness to the character.
    """

    format: Literal["cloze", "letters"] = "cloze"
    budget: PositiveInt = 1024
    """tokens of the context; whole passages are dropped to keep it"""
    description: str = ""
    """what every context begins with; {subject} stands for the question's subject"""

    def context(
        self,
        question: str,
        passages: Sequence[str],
        tokenizer: Any,
        choices: Sequence[str] = (),
        header: str = "",
        name: str = "",
    ) -> Built:
        """The context for one question; `passages` come best first, none means closed book.

        `header` is what the method of that name makes: the same for all questions of a subject, and
        therefore first, so that it is read once for all of them. While the whole exceeds the
        budget, whole passages are dropped, worst first, and counted. Raises UserError, which calls
        the question by `name` (its id) or else by its text, when even the bare question does not
        fit: nothing is cut silently.
        """
        stem = self._stem(question, choices)
        for kept in range(len(passages), -1, -1):
            text = header + GAP.join([*reversed(passages[:kept]), stem])
            if self._fits(text, tokenizer):
                return Built(text, len(passages) - kept, head=len(text) - len(stem))
        raise UserError(
            f"prompt.budget={self.budget} tokens: question {name or question[:60]!r} alone takes "
            f"{len(tokenizer.encode(header + stem))}: raise the budget, "
            f"{'take fewer worked examples, ' * bool(header)}or shorten the question"
        )

    def leaving(
        self,
        tokens: int,
        limit: int | None,
        question: str,
        tokenizer: Any,
        choices: Sequence[str] = (),
        header: str = "",
    ) -> "Prompt":
        """The same with a budget that leaves room for so many tokens among `limit` positions.

        For one token at least where the bare question has no room for more; itself if not for that.
        """
        if limit is None:
            return self
        for least in (tokens, 1):
            most = max(1, min(self.budget, limit - least + 1))  # the last token is never read
            tight = self.model_copy(update={"budget": most})
            if tight._fits(header + self._stem(question, choices), tokenizer):
                return tight
        return self

    def header(self, subject: str = "", examples: Sequence[Question] = ()) -> str:
        """The description, then each worked example with its answer and an empty line."""
        described = self.description.replace("{subject}", subject.replace("_", " "))
        return described + "".join(
            self._stem(q.question, q.choices) + self._right(q) + GAP for q in examples
        )

    def continuations(self, choices: Sequence[str]) -> list[str]:
        """What follows the context for each choice: a space, then its label."""
        return [f" {label}" for label in self.labels(choices)]

    def labels(self, choices: Sequence[str]) -> list[str]:
        """What is scored for each choice: its letter, or the choice itself."""
        if self.format == "letters":
            return [letter for letter, _ in _lettered(choices)]
        return list(choices)

    def _right(self, question: Question) -> str:
        if not question.choices:
            return f" {question.gold}"
        return self.continuations(question.choices)[question.answer]

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
