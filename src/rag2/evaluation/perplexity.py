"""A generator and texts -> nats per token and per word, and how sure.

Letters: Q texts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rag2.evaluation import stats
from rag2.evaluation.score import Floats
from rag2.generator.load import Generator
from rag2.generator.logprob import pair_logprobs
from rag2.generator.pairs import Ids, Pair, encode_contexts, positions
from rag2.registry import UserError

WINDOW = 1024  # tokens read at once, where the model has positions for more
AT_ONCE = 256  # windows scored between two signs of progress


@dataclass(frozen=True, slots=True, eq=False)
class Perplexity:
    """-log p of each text in nats [Q], and what it is divided by: its tokens [Q], its words [Q].

    Means are over all tokens (words) of all texts, so that long texts weigh more; intervals are
    over texts drawn with replacement, None for a single text.
    """

    nats_Q: Floats
    tokens_Q: Floats
    words_Q: Floats

    @property
    def per_token(self) -> float:
        """Mean of -log p(token | tokens before) in nats."""
        return float(self.nats_Q.sum() / self.tokens_Q.sum())

    @property
    def per_word(self) -> float:
        """The same nats shared among the words: comparable between tokenizers."""
        return float(self.nats_Q.sum() / self.words_Q.sum())

    @property
    def perplexity(self) -> float:
        """exp of the nats per token; infinite where a float cannot hold it."""
        return math.exp(self.per_token) if self.per_token < 709 else math.inf

    def intervals(self, seed: int = 0) -> dict[str, tuple[float, float] | None]:
        """The 95 % intervals of `per_token` and `per_word`."""
        return {
            "per_token": stats.bootstrap_ratio(self.nats_Q, self.tokens_Q, seed=seed),
            "per_word": stats.bootstrap_ratio(self.nats_Q, self.words_Q, seed=seed),
        }


def perplexity(
    generator: Generator,
    texts: Sequence[str],
    window: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 8192,
    tick: Callable[[int], None] = lambda amount: None,
) -> Perplexity:
    """How surprising each text is to the generator by itself: no question, no passage.

    Counted are the tokens that the tokenizer makes of the text, without special tokens; each is
    predicted once, the first from the beginning-of-text token (end-of-text where there is none).
    Words are what white space separates. A text longer than `window` tokens (None: 1024, or the
    model's positions if fewer) is read by a sliding window: it moves on by `stride` tokens (None:
    half a window) and counts those not counted before, each then predicted from at least
    window - stride tokens of context. Raises UserError for a text without a token, and for a window
    that the model has no positions for.
    """
    limit = positions(generator.model)
    size = min(limit or WINDOW, WINDOW) if window is None else window
    step = max(1, size // 2) if stride is None else stride
    if size < 1 or (limit is not None and size > limit):
        raise UserError(f"window={size}; allowed: 1 to the {limit} positions of the generator")
    if not 1 <= step <= size:
        raise UserError(f"stride={step}; allowed: 1 to window={size}")
    pairs: list[Pair] = []
    owner: list[int] = []
    tokens: list[int] = []
    for number, ids in enumerate(_encoded(generator, texts)):
        windows = list(sliding(ids, size, step))
        pairs += windows
        owner += [number] * len(windows)
        tokens.append(len(ids) - 1)
    nats_Q = np.zeros(len(texts))
    for start in range(0, len(pairs), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        logps = pair_logprobs(generator.model, pairs[part], batch_tokens)
        if not np.isfinite(logps).all():
            number = owner[start + int(np.argmin(np.isfinite(logps)))]
            raise UserError(f"the generator's log-likelihood of text {number + 1} is not finite")
        np.subtract.at(nats_Q, owner[part], logps)
        tick(len(logps))
    words = [len(text.split()) for text in texts]
    return Perplexity(nats_Q, np.array(tokens, dtype=float), np.array(words, dtype=float))


def sliding(ids: Ids, window: int, stride: int) -> list[Pair]:
    """(context, counted) of each window over a sequence whose first id is not counted.

    A window reads `window` ids and predicts up to the one after them; the next one begins `stride`
    later and counts what no window has counted.
    """
    pairs, begin, done = [], 0, 1
    while done < len(ids):
        end = min(begin + window + 1, len(ids))
        pairs.append((ids[begin:done], ids[done:end]))
        begin, done = begin + stride, end
    return pairs


def difference(after: Perplexity, before: Perplexity, seed: int = 0) -> dict[str, object] | None:
    """Nats per token more than before, paired by text; None where tokenizers count otherwise."""
    if not np.array_equal(after.tokens_Q, before.tokens_Q):
        return None
    more_Q = after.nats_Q - before.nats_Q
    return {
        "difference": float(more_Q.sum() / after.tokens_Q.sum()),
        "ci95": stats.bootstrap_ratio(more_Q, after.tokens_Q, seed=seed),
    }


def _encoded(generator: Generator, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text after one id that stands for its beginning."""
    [start] = encode_contexts(generator.tokenizer, [""])
    rows = generator.tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    for number, (text, row) in enumerate(zip(texts, rows, strict=True), 1):
        if not row or not text.strip():
            raise UserError(f"text {number} of {len(texts)} is empty: it has no token to predict")
    return [[*start, *row] for row in rows]
