"""One question at a time, from its text to the choice -> how long each took."""

import time
from collections.abc import Sequence

import numpy as np

from rag2.evaluation import arms, score, trial
from rag2.evaluation.arms import Reader
from rag2.evaluation.outcome import WARM
from rag2.evaluation.score import Scores
from rag2.evaluation.select import Choice
from rag2.retrieval import Retriever
from rag2.types import Question

CLOSED = Choice(0, 1.0, 0.0)


def pick(
    question: Question, retriever: Retriever | None, reader: Reader, choice: Choice | None
) -> int:
    """Index of the choice that the arm picks, from what it reads at its K and nothing else."""
    told = choice or CLOSED
    found = arms.retrieve([question], retriever if told.k else None, told.k)
    (prompts,) = trial.prompts([question], found.ids_QK, told)
    reader.forget()
    reader.read([(question, ids) for _, ids in prompts])
    logp_KC = np.array([reader.known[prompt] for prompt in prompts])
    if len(prompts) == 1:
        return int(score.predict(logp_KC)[0])
    scores = Scores(logp_KC[None], np.zeros((1, logp_KC.shape[1])), found.scores_QK, found.ids_QK)
    return int(score.predict(score.read(scores, told.reading, told.k, told.temperature))[0])


def milliseconds(
    questions: Sequence[Question],
    retriever: Retriever | None,
    reader: Reader,
    choice: Choice | None,
) -> tuple[float, ...]:
    """Of each question, after the first WARM have been asked once before."""
    for question in questions[:WARM]:
        pick(question, retriever, reader, choice)
    took = []
    for question in questions:
        began = time.perf_counter()
        pick(question, retriever, reader, choice)
        took.append(1000 * (time.perf_counter() - began))
    return tuple(took)
