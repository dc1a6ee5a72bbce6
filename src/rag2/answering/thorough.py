"""RAG-Sequence by a server that writes and scores: thorough decoding (Lewis et al. 2020, sec. 2.5).

One candidate is written after each prompt; each is scored after all of them; the one with the
largest sum_k p(z_k|x) p(y|x,z_k) is the answer. There y has its end: a text is no better than a
longer one for being its beginning. What is told of the answer is without it, as of answers that
are made token by token. Letters: S prompts, C candidates, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rag2.answering.lexicon import Lexicon
from rag2.answering.upstream import Upstream, Wanted
from rag2.answering.writing import Writing, kept
from rag2.generator.mixture import Mixture
from rag2.generator.pairs import encode_pairs
from rag2.registry import UserError

Rows = list[list[tuple[str, float]]]  # of one candidate: its tokens after each prompt


@dataclass(frozen=True, slots=True)
class Best:
    """The answer, and what makes it one."""

    writing: Writing
    tokens: tuple[str, ...]
    logps: tuple[float, ...]
    """log p(y_t | x, y_<t) of the mixture in nats"""
    posterior: list[float]
    """p(z|x,y) of each prompt"""


async def best(
    upstream: Upstream,
    lexicon: Lexicon,
    prompts: Sequence[str],
    log_prior_S: Tensor,
    wanted: Wanted,
    stops: Sequence[str],
) -> Best:
    """The answer by all prompts; drawn, it is a draw from the mixture: a prompt by p(z|x) first."""
    asked = list(prompts)
    if wanted.temperature > 0:
        chance = np.random.Generator(np.random.Philox(np.random.SeedSequence(wanted.seed)))
        prior_S = log_prior_S.exp().numpy()
        asked = [prompts[int(chance.choice(len(prompts), p=prior_S / prior_S.sum()))]]
    candidates: dict[str, Writing] = {}
    for choice in await upstream.write(asked, replace(wanted, stop=tuple(stops))):
        writing = Writing(stops, lexicon.ends)
        writing.add(choice)
        candidates.setdefault(writing.raw + writing.ending(), writing)
    rows = await scored(upstream, lexicon, prompts, list(candidates))
    totals = [_total(log_prior_S, row) for row in rows]
    first = max(range(len(totals)), key=lambda c: (totals[c], -c))
    return _told(list(candidates.values())[first], rows[first], log_prior_S, stops, lexicon.ends)


async def scored(
    upstream: Upstream, lexicon: Lexicon, prompts: Sequence[str], candidates: Sequence[str]
) -> list[Rows]:
    """Tokens and log p of each candidate after each prompt; none where it cannot stand there."""
    texts, lengths, counts = [], [], []
    for candidate in candidates:
        try:
            pairs = encode_pairs(lexicon.tokenizer, [(prompt, candidate) for prompt in prompts])
        except UserError:  # nothing of it is a token of its own
            pairs = []
        fits = upstream.limit is None or all(len(c) + len(y) < upstream.limit for c, y in pairs)
        alike = len({len(own) for _, own in pairs}) == 1
        counts.append(len(prompts) if fits and alike else 0)
        if counts[-1]:
            texts += [prompt + candidate for prompt in prompts]
            lengths += [(len(before), len(own)) for before, own in pairs]
    found = iter(await upstream.logps(texts, lengths))
    return [[next(found) for _ in range(count)] for count in counts]


def _total(log_prior_S: Tensor, rows: Rows) -> float:
    """log sum_k p(z_k|x) p(y|x,z_k)."""
    if not rows:
        return -torch.inf
    logp_S = torch.tensor([sum(logp for _, logp in row) for row in rows]).double()
    return float((log_prior_S + logp_S).logsumexp(0))


def _told(
    writing: Writing, rows: Rows, log_prior_S: Tensor, stops: Sequence[str], ends: Sequence[str]
) -> Best:
    """By Bayes' rule from token to token, as the mixture goes."""
    mixture, logps = Mixture([], log_prior_S), []
    tokens = [token for token, _ in rows[0]] if rows else []
    tokens = tokens[: kept(tokens, stops, ends)]
    for at in range(len(tokens)):
        logp_S = torch.tensor([row[at][1] for row in rows]).double()
        logps.append(float((mixture.log_weights_S + logp_S).logsumexp(0)))
        mixture.follow(logp_S)
    return Best(writing, tuple(tokens), tuple(logps), mixture.posterior())
