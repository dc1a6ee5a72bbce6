"""Chunks found and choices -> log p(choice | question) and the posterior of the likeliest one."""

from collections.abc import Sequence

import numpy as np
from einops import rearrange

from rag2.answering.ask import Ask, Hit
from rag2.answering.draft import CALLED, Prompts
from rag2.answering.settings import Settings
from rag2.evaluation import score
from rag2.evaluation.arms import Found, Reader, evaluate
from rag2.generator.load import Generator
from rag2.generator.mixture import log_prior
from rag2.generator.pairs import encode_pairs, positions
from rag2.generator.steps import step_logprobs
from rag2.registry import UserError
from rag2.types import Question

LONGEST = 1 << 15  # tokens of all choices times chunks: some seconds of a small model
Likelihoods = tuple[list[float], list[float] | None]


def log_likelihoods(
    generator: Generator, settings: Settings, ask: Ask, hits: Sequence[Hit], choices: Sequence[str]
) -> Likelihoods:
    """In nats, and p(z|x,y) of each chunk; None for chunks that were read in one prompt."""
    reading = ask.reading or settings.reading
    tokens = len(generator.tokenizer(" ".join(choices))["input_ids"]) * max(1, len(hits))
    if tokens > LONGEST:
        raise UserError(
            f"{tokens} tokens of choices and chunks together; allowed: {LONGEST}: give fewer or "
            "shorter choices, or a smaller k"
        )
    if reading == "token" and hits:
        return _by_token(generator, settings, ask, hits, choices)
    return _by_harness(generator, settings, ask, hits, choices, reading)


def _by_harness(
    generator: Generator,
    settings: Settings,
    ask: Ask,
    hits: Sequence[Hit],
    choices: Sequence[str],
    reading: str,
) -> Likelihoods:
    """By the harness's own functions, as it scores an arm."""
    question = Question(CALLED, ask.question, tuple(choices), answer=0)
    header = settings.prompt.header() + ask.header
    by_id = {hit.chunk.id: hit.chunk for hit in hits}
    tokenizer, limit = generator.tokenizer, positions(generator.model)
    labels = settings.prompt.continuations(choices)
    longest = max(len(tokenizer.encode(label, add_special_tokens=False)) for label in labels)
    prompt = settings.prompt.leaving(longest, limit, ask.question, tokenizer, choices, header)
    reader = Reader(generator, prompt, by_id, headers={question.id: header})
    scores_QK = np.array([[hit.score for hit in hits]], dtype=np.float64)
    ids_QK = np.array([[hit.chunk.id for hit in hits]], dtype=np.int64)
    together = reading == "concat" and len(hits) > 1
    concat = [len(hits)] if together else []
    table = evaluate([question], Found(scores_QK, ids_QK), reader, concat=concat)
    return from_table(table, together, settings.temperature)


def from_table(table: score.Scores, together: bool, temperature: float) -> Likelihoods:
    """Of the scores of one question; `together`: its chunks were read in one prompt."""
    mode: score.Reading = "concat" if together else "marginal"
    logp_QC = score.read(table, mode, table.retrieved, temperature)
    if together:
        return logp_QC[0].tolist(), None
    best_Q = score.predict(logp_QC)
    posterior_QK = score.posterior(table, table.retrieved, temperature, best_Q)
    return logp_QC[0].tolist(), posterior_QK[0].tolist()


def _by_token(
    generator: Generator, settings: Settings, ask: Ask, hits: Sequence[Hit], choices: Sequence[str]
) -> Likelihoods:
    """By weights that stand still from token to token."""
    tokenizer, limit = generator.tokenizer, positions(generator.model)
    header = settings.prompt.header() + ask.header
    stem = settings.prompt.context(ask.question, [], tokenizer, header=header).text
    pairs = [(stem, choice) for choice in settings.prompt.continuations(choices)]
    continuations = [ids for _, ids in encode_pairs(tokenizer, pairs)]
    longest = max(map(len, continuations))
    chunks = [hit.chunk for hit in hits]
    prompts = Prompts.of(ask, chunks, settings, tokenizer, longest, limit)
    scores_S = np.array([hits[at].score for at in prompts.read])
    prior_S1 = rearrange(log_prior(scores_S, settings.temperature), "s -> s 1")
    joint = [
        prior_S1 + logp_ST
        for logp_ST in step_logprobs(generator.model, prompts.contexts, continuations)
    ]
    logps = [float(joint_ST.logsumexp(0).sum()) for joint_ST in joint]
    best = max(range(len(logps)), key=logps.__getitem__)
    shares = dict(zip(prompts.read, joint[best].softmax(0).mean(1).tolist(), strict=True))
    return logps, [shares.get(at, 0.0) for at in range(len(hits))]
