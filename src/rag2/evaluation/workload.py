"""A seed -> made-up multiple-choice questions in their usual settings, and what they cost.

For measurements of speed: the texts mean nothing, their lengths and what they share are realistic.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rag2.generator.pairs import Pair
from rag2.generator.prompt import Prompt
from rag2.types import Question

SHOTS, CHUNKS = 5, 5
CHUNK_WORDS, CONTEXT_WORDS = 90, 600


@dataclass(frozen=True, slots=True)
class Case:
    """Requests: each context with its continuations. `aim` is the speed-up it is to reach."""

    name: str
    aim: float
    contexts: list[str]
    continuations: list[list[str]]

    @property
    def texts(self) -> list[tuple[str, str]]:
        """All (context, continuation) pairs, in order."""
        both = zip(self.contexts, self.continuations, strict=True)
        return [(context, choice) for context, choices in both for choice in choices]


class Writer:
    """Words, questions and passages from one seed."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.lexicon = ["".join(self._syllables()) for _ in range(8000)]

    def _syllables(self) -> list[str]:
        count = self.dice.randint(1, 4)
        return [
            self.dice.choice("bdfgklmnprstvz") + self.dice.choice("aeiou") for _ in range(count)
        ]

    def words(self, low: int, high: int) -> str:
        """Between `low` and `high` words."""
        return " ".join(self.dice.choices(self.lexicon, k=self.dice.randint(low, high)))

    def question(self) -> Question:
        """A question about as long as MMLU's, with four choices of several words."""
        choices = tuple(self.words(3, 8) for _ in range(4))
        return Question("made-up", f"{self.words(15, 40)}?", choices, self.dice.randrange(4))


def cases(seed: int, questions: int, tokenizer: Any) -> list[Case]:
    """Letters and cloze, 0- and 5-shot; long contexts and five chunks each for a third of them."""
    writer = Writer(seed)
    asked = [writer.question() for _ in range(questions)]
    shots = [writer.question() for _ in range(SHOTS)]
    chunks = [writer.words(CHUNK_WORDS, CHUNK_WORDS) for _ in range(2 * questions)]
    none = [[None] for _ in asked]
    some = asked[: max(1, questions // 3)]
    long = [[writer.words(CONTEXT_WORDS, CONTEXT_WORDS)] for _ in some]
    found = [writer.dice.sample(chunks, CHUNKS) for _ in some]

    def case(name: str, aim: float, format: Any, count: int = 0, passages: Any = none) -> Case:
        prompt = Prompt(format=format, budget=100_000)
        header = prompt.header("", shots[:count])
        contexts, continuations = [], []
        for question, each in zip(asked, passages, strict=False):
            for passage in each:
                read = [] if passage is None else [passage]
                built = prompt.context(question.question, read, tokenizer, question.choices, header)
                contexts.append(built.text)
                continuations.append(prompt.continuations(question.choices))
        return Case(name, aim, contexts, continuations)

    return [
        case("letters, 0-shot", 1.2, "letters"),
        case("letters, 5-shot", 4.0, "letters", SHOTS),
        case("cloze, 5-shot", 8.0, "cloze", SHOTS),
        case("cloze, 700-token contexts", 3.5, "cloze", passages=long),
        case("RAG, 5 chunks each alone", 3.0, "cloze", passages=found),
    ]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a Llama computes for one token: parameters of its layers and of its head, its width."""

    body: int
    head: int
    width: int  # layers x hidden: what attention to one earlier token costs, over 4

    def flops(self, depths: Iterable[int], rows: int) -> int:
        """Floating-point operations for tokens after `depth` others each, and `rows` of logits."""
        return sum(2 * self.body + 4 * self.width * (d + 1) for d in depths) + 2 * self.head * rows

    def in_full(self, pairs: Sequence[Pair]) -> int:
        """Of one forward for each distinct input, all its logits: lm-evaluation-harness's cache."""
        inputs = {(*context, *ids[:-1]) for context, ids in pairs}
        return sum(self.flops(range(len(ids)), len(ids)) for ids in inputs)

    def shared(self, pairs: Sequence[Pair]) -> int:
        """Of every token after every distinct beginning once: the least there is to compute."""
        nodes: dict[tuple[int, int], int] = {}  # the trie: (parent, token) -> node
        depths, asked = [], set()
        for context, ids in pairs:
            node = 0
            for depth, token in enumerate([*context, *ids[:-1]]):
                key = node, token
                if key not in nodes:
                    nodes[key] = len(nodes) + 1
                    depths.append(depth)
                node = nodes[key]
                if depth >= len(context) - 1:
                    asked.add(node)
        return self.flops(depths, len(asked))
