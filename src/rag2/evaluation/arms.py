"""An arm is a generator and a retriever, or a hybrid of two such: all else is the same for all.

Letters: Q questions, K retrieved chunks, C choices.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from scipy.special import softmax

from rag2.evaluation import operations, score
from rag2.evaluation.hybrids import HYBRIDS
from rag2.evaluation.score import Floats, Ints, Scores
from rag2.evaluation.select import Choice
from rag2.evaluation.workload import Cost
from rag2.generator.choices import Encoded, encode_choices
from rag2.generator.exact import exact_choices
from rag2.generator.load import Generator
from rag2.generator.logprob import choice_logprobs
from rag2.generator.prompt import Built, Prompt
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
    "hybrid_rag": Arm("base", "hybrid"),
    "ft_rag": Arm("ft", "warm"),
    "sft_rag": Arm("sft", "warm"),
    "joint": Arm("joint", "joint"),
    "staged": Arm("staged", "warm"),
    # The other two cells of {warm, joint} retriever x {sft, joint} generator.
    "warm_joint": Arm("joint", "warm"),
    "joint_sft": Arm("sft", "joint"),
    "random_rag": Arm("base", "random"),
    "gold_rag": Arm("base", "gold"),
}


GENERATORS = tuple(dict.fromkeys(arm.generator for arm in ARMS.values()))
NAMES = (*ARMS, *HYBRIDS)
# Run where their name or their generator is given: answering a log of questions takes a minute.
ON_REQUEST = ("staged",)


def members(*names: str) -> dict[str, Arm]:
    """The arms that these consist of: a hybrid's two, or the arm itself.

    Raises UserError that names the nearest one for an unknown name.
    """
    found = {}
    for name in names:
        if name not in NAMES:
            allowed = ", ".join(NAMES)
            raise UserError(
                f"arms: unknown arm {name!r}; allowed: {allowed}.{nearest(name, NAMES)}"
            )
        parts = HYBRIDS[name].members if name in HYBRIDS else (name,)
        found |= {part: ARMS[part] for part in parts}
    return found


def arm(name: str) -> Arm:
    """The arm of a name that is no hybrid's; raises UserError that names the nearest one."""
    return members(name)[name]


# A prompt: the question, and the ids of the chunks it is read with, best first; () is closed book.
Item = tuple[Question, tuple[int, ...]]
Key = tuple[str, tuple[int, ...]]  # the same by the question's id


@dataclass
class Reader:
    """A generator that scores choices, and remembers: arms that share it share its work."""

    generator: Generator
    prompt: Prompt
    by_id: dict[int, Chunk]
    batch_tokens: int = 8192
    exact: bool = False
    """a forward for every choice, equal to the bit to lm-evaluation-harness: slow"""
    headers: dict[str, str] = field(default_factory=dict)
    """question id -> what its prompt begins with, as `Prompt.header` makes it"""
    known: dict[Key, list[float]] = field(default_factory=dict)
    tokens: dict[Key, int] = field(default_factory=dict)
    """tokens of a prompt and its choices, as if nothing were shared with other prompts"""
    seconds: dict[Key, float] = field(default_factory=dict)
    """time of reading a prompt: of what was read together, a share by its tokens"""
    dropped: dict[Key, int] = field(default_factory=dict)
    """prompts whose budget had no room for some of their chunks, and for how many"""
    flops: dict[Key, int] = field(default_factory=dict)
    """operations of a prompt and its choices (see `operations`), empty where nobody knows"""

    def read(self, items: Sequence[Item]) -> None:
        """Score every prompt that is not known yet."""
        todo = {(q.id, ids): (q, ids) for q, ids in items if (q.id, ids) not in self.known}
        contexts, continuations = [], []
        for key, (question, ids) in todo.items():
            built = self._built(question, ids)
            if built.dropped:
                self.dropped[key] = built.dropped
            contexts.append(built.text)
            continuations.append(self.prompt.continuations(question.choices))
        began = time.perf_counter()
        encoded = self._encode(contexts, continuations, [q.id for q, _ in todo.values()])
        scored = self._score(encoded)
        tokens = encoded.tokens()
        pace = (time.perf_counter() - began) / max(1, sum(tokens))
        for (question, _), scores in zip(todo, scored, strict=True):
            if not np.isfinite(scores).all():
                raise UserError(f"the generator's log-likelihoods of {question!r} are not finite")
        self.known.update(zip(todo, scored, strict=True))
        self.tokens.update(zip(todo, tokens, strict=True))
        self.seconds.update(zip(todo, (pace * count for count in tokens), strict=True))
        if self.cost:
            self.flops.update(zip(todo, operations.of_prompts(encoded, self.cost), strict=True))

    @cached_property
    def cost(self) -> Cost | None:
        """What a token costs the generator; None where that is not known."""
        model = self.generator.model
        return operations.cost_of(model, model.get_output_embeddings())

    def forget(self) -> None:
        """Read every prompt anew from here on."""
        for memory in (self.known, self.tokens, self.seconds, self.dropped, self.flops):
            memory.clear()

    def unconditional(self, questions: Sequence[Question]) -> Floats:
        """log p(choice) in nats after no context at all [Q, C], for mutual information."""
        continuations = [self.prompt.continuations(question.choices) for question in questions]
        names = [question.id for question in questions]
        encoded = self._encode([""] * len(questions), continuations, names)
        return _table(questions, self._score(encoded))

    def contexts(self, questions: Sequence[Question]) -> list[str]:
        """The prompt of each question without passages."""
        return [self._built(question, ()).text for question in questions]

    def labels(self, questions: Sequence[Question]) -> list[list[str]]:
        """What is scored for each choice of each question."""
        return [self.prompt.labels(question.choices) for question in questions]

    def _built(self, question: Question, ids: tuple[int, ...]) -> Built:
        return self.prompt.context(
            question.question,
            [self.by_id[chunk].passage for chunk in ids],
            self.generator.tokenizer,
            question.choices,
            self.headers.get(question.id, ""),
            name=question.id,
        )

    def _encode(
        self,
        contexts: Sequence[str],
        continuations: Sequence[Sequence[str]],
        names: Sequence[str],
    ) -> Encoded:
        model, tokenizer = self.generator.model, self.generator.tokenizer
        return encode_choices(model, tokenizer, contexts, continuations, names)

    def _score(self, encoded: Encoded) -> list[list[float]]:
        model = self.generator.model
        if self.exact:
            return encoded.arrange(exact_choices(model, encoded.requests))
        return encoded.arrange(choice_logprobs(model, encoded.requests, self.batch_tokens))


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
    concat: Sequence[int] = (),
) -> Scores:
    """Every choice's log-likelihood with each of the chunks found, and without any.

    For every k > 1 in `concat` also with the best k chunks in one prompt.
    """
    ids_QK = found.ids_QK.tolist()
    together = [k for k in sorted(set(concat)) if 1 < k <= found.ids_QK.shape[1]]
    for start in range(0, len(questions), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        items: list[Item] = [(question, ()) for question in questions[part]]
        for question, ids in zip(questions[part], ids_QK[part], strict=True):
            items += [(question, (chunk,)) for chunk in ids]
            items += [(question, tuple(ids[:k])) for k in together]
        reader.read(items)
        tick(len(questions[part]))

    def table(ids_Q: Sequence[tuple[int, ...]]) -> Floats:
        known = reader.known
        rows = [known[q.id, ids] for q, ids in zip(questions, ids_Q, strict=True)]
        return _table(questions, rows)

    closed_QC = table([()] * len(questions))
    alone = [table([(ids[k],) for ids in ids_QK]) for k in range(found.ids_QK.shape[1])]
    logp_QKC = np.stack(alone, 1) if alone else np.zeros((len(questions), 0, closed_QC.shape[1]))
    joined = {k: table([tuple(ids[:k]) for ids in ids_QK]) for k in together}
    return Scores(logp_QKC, closed_QC, found.scores_QK, found.ids_QK, joined)


def debiased(questions: Sequence[Question], found: Found, reader: Reader, choice: Choice) -> Ints:
    """The pick of each question when its choices take turns at every place.

    Softmax over the choices for each cyclic rotation of them, averaged by choice (Izacard et al.
    2023, Atlas, section 4.1): what a model prefers by place alone cancels out.
    """
    cut = Found(found.scores_QK[:, : choice.k], found.ids_QK[:, : choice.k])
    concat = [choice.k] if choice.reading == "concat" else []
    widest = max(len(question.choices) for question in questions)
    total_QC = np.zeros((len(questions), widest))
    for turn in range(widest):
        asked = [_rotated(question, turn) for question in questions]
        for question, original in zip(asked, questions, strict=True):
            reader.headers[question.id] = reader.headers.get(original.id, "")
        scores = evaluate(asked, cut, reader, concat=concat)
        p_QC = softmax(score.read(scores, choice.reading, choice.k, choice.temperature), axis=1)
        for row, question in enumerate(questions):
            count = len(question.choices)
            if turn < count:
                total_QC[row, :count] += np.roll(p_QC[row, :count], turn) / count
    return score.predict(np.where(total_QC > 0, total_QC, -np.inf))


def _rotated(question: Question, turn: int) -> Question:
    """The question with its choices moved `turn` places to the front, cyclically."""
    turn %= len(question.choices)
    if not turn:
        return question
    choices = (*question.choices[turn:], *question.choices[:turn])
    answer = (question.answer - turn) % len(choices)
    return replace(question, id=f"{question.id} (rotated {turn})", choices=choices, answer=answer)


def _table(questions: Sequence[Question], rows: Sequence[Sequence[float]]) -> Floats:
    """Rows of unequal length as [Q, C], -inf where a question has fewer choices."""
    table_QC = np.full((len(questions), max(len(q.choices) for q in questions)), -np.inf)
    for row, values in zip(table_QC, rows, strict=True):
        row[: len(values)] = values
    return table_QC
