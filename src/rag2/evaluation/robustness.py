"""One arm: what it forgot, when it keeps silent, how it writes, whether it follows the corpus.

Letters: Q questions, K retrieved chunks, C choices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rag2.evaluation import arms, confidence, score, select, trial
from rag2.evaluation.arms import Arm, Found, Reader
from rag2.evaluation.confidence import Threshold
from rag2.evaluation.counterfactual import Edit, edited_found
from rag2.evaluation.score import Bools, Floats, Ints, Reading
from rag2.evaluation.select import Choice
from rag2.generator.generate import generate
from rag2.retrieval import Fused, Retriever
from rag2.types import Question

# Sets of questions whose evidence no corpus holds: the gold control answers them by heart.
WITHOUT_EVIDENCE = ("control", "absent")


@dataclass(frozen=True, slots=True)
class Asked:
    """What every arm is asked; sets that are not there are empty."""

    validation: Sequence[Question]
    """chooses K and the temperature, and the confidence below which an arm abstains"""
    test: Sequence[Question]
    control: Sequence[Question] = ()
    absent: Sequence[Question] = ()
    rewordings: Sequence[Question] = ()
    """facts in several wordings; those of one `metadata.fact` share their choices"""
    edits: Sequence[Edit] = ()

    def all(self) -> list[Question]:
        """Every question, without those of the edits, which are test questions."""
        return [*self.validation, *self.test, *self.control, *self.absent, *self.rewordings]


@dataclass(frozen=True, slots=True)
class Rules:
    """What every arm alike chooses from and is measured by."""

    ks: Sequence[int]
    readings: Sequence[Reading] = ("marginal",)
    target_precision: float = 0.9
    max_new_tokens: int = 32
    given: Mapping[str, Choice] = field(default_factory=dict)
    """arm -> K, temperature and reading of an earlier comparison, instead of choosing"""


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What an arm answers to a set of questions, and how sure it is."""

    questions: Sequence[Question]
    found: Found
    picks_Q: Ints
    right_Q: Bools
    confidence_Q: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One arm's answers by set, and what was made of them.

    `flags` are yes or no per question (of the rewordings: per fact), the same ones for every arm;
    `edits` are those per edited question that the arm had answered right.
    """

    name: str
    arm: Arm
    choice: Choice
    threshold: Threshold
    answers: Mapping[str, Answers]
    flags: Mapping[str, Bools]
    edits: Mapping[str, Bools]


def measure(
    name: str,
    arm: Arm,
    retriever: Retriever | None,
    reader: Reader,
    asked: Asked,
    rules: Rules,
    tick: Callable[[int], None] = lambda amount: None,
) -> Measured:
    """Ask the arm everything; `reader` must know the edits' chunks."""
    ks = [1] if arm.retriever == "gold" else list(rules.ks)
    depth = max(ks)
    choice = rules.given.get(name)
    if isinstance(retriever, Fused):
        if choice:
            retriever = replace(retriever, weight=choice.dense_weight)
        else:
            retriever = trial.weighed(retriever, asked.validation, reader, ks, rules.readings)
    found = arms.retrieve(asked.validation, retriever, depth)
    choice = choice or _choose(asked.validation, found, arm, reader, ks, rules)

    def answer(questions: Sequence[Question], part: str) -> Answers:
        blind = part in WITHOUT_EVIDENCE and arm.retriever == "gold"
        seen = arms.retrieve(questions, None if blind else retriever, depth)
        return read(questions, seen, reader, choice, tick)

    parts = ("validation", "test", "control", "absent", "rewordings")
    sets = {part: answer(rows, part) for part in parts if (rows := getattr(asked, part))}
    sure = sets["validation"]
    threshold = confidence.choose_threshold(sure.confidence_Q, sure.right_Q, rules.target_precision)
    flags = flags_of(sets, threshold)
    flags |= _written(sets["test"], reader, choice, rules.max_new_tokens)
    edits = _edited(asked.edits, sets["test"], retriever, reader, choice)
    return Measured(name, arm, choice, threshold, sets, flags, edits)


def read(
    questions: Sequence[Question],
    found: Found,
    reader: Reader,
    choice: Choice,
    tick: Callable[[int], None] = lambda amount: None,
) -> Answers:
    """The answers from the best chunks of `found`, as many and mixed as `choice` says."""
    k = min(choice.k, found.ids_QK.shape[1])
    cut = Found(found.scores_QK[:, :k], found.ids_QK[:, :k])
    concat = [k] if choice.reading == "concat" else []
    scores = arms.evaluate(questions, cut, reader, tick, concat)
    logp_QC = score.read(scores, choice.reading, k, choice.temperature)
    picks_Q = score.predict(logp_QC)
    right_Q = picks_Q == score.answers(questions)
    return Answers(questions, cut, picks_Q, right_Q, confidence.confidence(logp_QC))


def _choose(
    questions: Sequence[Question],
    found: Found,
    arm: Arm,
    reader: Reader,
    ks: Sequence[int],
    rules: Rules,
) -> Choice:
    """As `eval compare` chooses: most validation questions right; closed book has no choice."""
    if arm.retriever is None:
        return Choice(0, 1.0, float("nan"))
    concat = ks if "concat" in rules.readings else ()
    scores = arms.evaluate(questions, found, reader, concat=concat)
    return select.choose(scores, score.answers(questions), ks, rules.readings)


def flags_of(sets: Mapping[str, Answers], threshold: Threshold) -> dict[str, Bools]:
    """Yes or no per question, or per fact, of what is counted."""
    flags = {part: sets[part].right_Q for part in ("test", "control") if part in sets}
    flags["answered"] = sets["test"].confidence_Q >= threshold.value
    flags["confident_wrong"] = flags["answered"] & ~flags["test"]
    if "absent" in sets:
        absent = sets["absent"]
        sure_Q = absent.confidence_Q >= threshold.value
        flags |= {"abstained": ~sure_Q, "absent_confident_wrong": sure_Q & ~absent.right_Q}
    if "rewordings" in sets:
        groups = facts(sets["rewordings"].questions)
        picks_Q, right_Q = sets["rewordings"].picks_Q, sets["rewordings"].right_Q
        flags["consistent"] = np.array([len(set(picks_Q[rows])) == 1 for rows in groups])
        flags["all_right"] = np.array([bool(right_Q[rows].all()) for rows in groups])
    return flags


def facts(questions: Sequence[Question]) -> list[list[int]]:
    """The places of the questions that ask for one fact, for each `metadata.fact`."""
    groups: dict[str, list[int]] = {}
    for row, question in enumerate(questions):
        groups.setdefault(str(question.metadata["fact"]), []).append(row)
    return list(groups.values())


def _written(test: Answers, reader: Reader, choice: Choice, longest: int) -> dict[str, Bools]:
    """Whether the greedy text is a choice of its question, of any question, the right choice.

    The text stands after the best chunk alone where chunks are mixed, after all in one prompt where
    they are read so.
    """
    together = choice.k if choice.reading == "concat" else min(choice.k, 1)
    ids_QK = test.found.ids_QK[:, :together].tolist()
    model, tokenizer = reader.generator.model, reader.generator.tokenizer
    contexts = [
        reader.prompt.context(
            question.question,
            [reader.by_id[chunk].passage for chunk in ids],
            tokenizer,
            question.choices,
            reader.headers.get(question.id, ""),
            name=question.id,
        ).text
        for question, ids in zip(test.questions, ids_QK, strict=True)
    ]
    names = [question.id for question in test.questions]
    texts = generate(model, tokenizer, contexts, longest, reader.batch_tokens, names)
    labels = reader.labels(test.questions)
    known = {label for row in labels for label in row}
    rows = list(zip(texts, labels, test.questions, strict=True))
    return {
        "wrote_choice": np.array([text in row for text, row, _ in rows]),
        "wrote_value": np.array([text in known for text, _, _ in rows]),
        "wrote_right": np.array([text == row[q.answer] for text, row, q in rows]),
    }


def _edited(
    edits: Sequence[Edit],
    test: Answers,
    retriever: Retriever | None,
    reader: Reader,
    choice: Choice,
) -> dict[str, Bools]:
    """Where the answers to questions that were right before went when the corpus changed."""
    if not edits:
        return {}
    row_of = {question.id: row for row, question in enumerate(test.questions)}
    rows = [row_of[edit.question.id] for edit in edits]
    before = Found(test.found.scores_QK[rows], test.found.ids_QK[rows])
    after, touched_Q = edited_found(edits, before, retriever)
    questions = [edit.question for edit in edits]
    picks_Q = read(questions, after, reader, choice).picks_Q
    followed_Q = picks_Q == np.array([edit.target for edit in edits])
    stuck_Q = picks_Q == score.answers(questions)
    kinds = {"followed": followed_Q, "stuck": stuck_Q, "other": ~followed_Q & ~stuck_Q}
    right_Q = test.right_Q[rows]
    return {kind: flags_Q[right_Q] for kind, flags_Q in {**kinds, "edit_read": touched_Q}.items()}
