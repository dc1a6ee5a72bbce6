"""An arm is a generator and a retriever, nothing else: prompt and scoring are the same for all.

Letters: Q questions, K retrieved chunks, C choices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rag2.evaluation.score import Scores, choice_lengths
from rag2.generator.load import Generator
from rag2.generator.logprob import score_choices
from rag2.generator.prompt import Prompt
from rag2.registry import UserError, nearest
from rag2.retrieval import Retriever
from rag2.types import Chunk, Question

# Questions scored together. A passage that several of them found is read once for all of them, so
# more is faster; but progress is told, and prompts are held in memory, for so many at a time.
AT_ONCE = 300


@dataclass(frozen=True, slots=True)
class Arm:
    """Which generator answers, and which retriever finds its chunks (None: closed book)."""

    generator: str
    retriever: str | None = None


ARMS = {
    "base": Arm("base"),
    "ft": Arm("ft"),
    "ft_paraphrase": Arm("ft_paraphrase"),
    "sft": Arm("sft_closed"),
    "frozen_rag": Arm("base", "warm"),
    "bm25_rag": Arm("base", "bm25"),
    "ft_rag": Arm("ft", "warm"),
    "sft_rag": Arm("sft", "warm"),
    "joint": Arm("joint", "joint"),
    # The other two cells of {warm, joint} retriever x {sft, joint} generator.
    "warm_joint": Arm("joint", "warm"),
    "joint_sft": Arm("sft", "joint"),
    "random_rag": Arm("base", "random"),
    "gold_rag": Arm("base", "gold"),
}


def arm(name: str) -> Arm:
    """The arm of a name; raises UserError that names the nearest one."""
    if name not in ARMS:
        allowed = ", ".join(ARMS)
        raise UserError(f"arms: unknown arm {name!r}; allowed: {allowed}.{nearest(name, ARMS)}")
    return ARMS[name]


def stages(arm: Arm) -> set[str]:
    """The stages of a job that make the arm's parts."""
    trained = {"warm": "retriever", "joint": "joint"}.get(arm.retriever or "")
    return {"data", arm.generator, *([trained] if trained else [])}


@dataclass
class Reader:
    """A generator that scores choices, and remembers: arms that share it share its work."""

    generator: Generator
    prompt: Prompt
    by_id: dict[int, Chunk]
    batch_tokens: int = 8192
    known: dict[tuple[str, int | None], list[float]] = field(default_factory=dict)
    dropped: set[tuple[str, int | None]] = field(default_factory=set)
    """(question, chunk) pairs whose chunk the prompt's budget had no room for"""

    def read(self, pairs: Sequence[tuple[Question, int | None]]) -> None:
        """Score every (question, chunk) pair that is not known yet; chunk None is closed book."""
        tokenizer = self.generator.tokenizer
        todo = {(q.id, chunk): (q, chunk) for q, chunk in pairs if (q.id, chunk) not in self.known}
        contexts, continuations = [], []
        for question, chunk in todo.values():
            passages = [] if chunk is None else [self.by_id[chunk].passage]
            built = self.prompt.context(question.question, passages, tokenizer, question.choices)
            if built.dropped:
                self.dropped.add((question.id, chunk))
            contexts.append(built.text)
            continuations.append(self.prompt.continuations(question.choices))
        scored = score_choices(
            self.generator.model, tokenizer, contexts, continuations, self.batch_tokens
        )
        for (question, _), scores in zip(todo, scored, strict=True):
            if not np.isfinite(scores).all():
                raise UserError(f"the generator's log-likelihoods of {question!r} are not finite")
        self.known.update(zip(todo, scored, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a retriever found for some questions: scores_QK and chunk ids_QK, K = 0 without one."""

    scores_QK: np.ndarray
    ids_QK: np.ndarray


def retrieve(questions: Sequence[Question], retriever: Retriever | None, k: int) -> Found:
    """The best `k` chunks of each question; none without a retriever."""
    if retriever is None:
        return Found(np.zeros((len(questions), 0)), np.zeros((len(questions), 0), dtype=np.int64))
    scores_QK, ids_QK = retriever.search(questions, k)
    return Found(scores_QK.astype(np.float64), ids_QK)


def evaluate(
    questions: Sequence[Question],
    found: Found,
    reader: Reader,
    tick: Callable[[int], None] = lambda amount: None,
) -> Scores:
    """Every choice's log-likelihood with each of the chunks found, and without any."""
    for start in range(0, len(questions), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        pairs: list[tuple[Question, int | None]] = [(q, None) for q in questions[part]]
        for question, ids in zip(questions[part], found.ids_QK[part].tolist(), strict=True):
            pairs += [(question, chunk) for chunk in ids]
        reader.read(pairs)
        tick(len(questions[part]))
    lengths_QC = choice_lengths(questions)
    closed_QC = np.full(lengths_QC.shape, -np.inf)
    logp_QKC = np.full((*found.ids_QK.shape, lengths_QC.shape[1]), -np.inf)
    for row, question in enumerate(questions):
        count = len(question.choices)
        closed_QC[row, :count] = reader.known[question.id, None]
        for column, chunk in enumerate(found.ids_QK[row].tolist()):
            logp_QKC[row, column, :count] = reader.known[question.id, chunk]
    return Scores(logp_QKC, closed_QC, found.scores_QK, found.ids_QK, lengths_QC)
