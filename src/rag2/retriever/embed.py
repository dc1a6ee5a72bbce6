"""Encoder and texts -> one float32 embedding per text, in the order of the texts."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from rag2.modes import evaluating
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder, Side

# Texts are tokenized and sorted by length this many at a time: it bounds the token ids in memory.
WINDOW = 16_384
# Padded tokens of a batch on a CPU, where what stays in its caches is a quarter faster; elsewhere.
CPU_TOKENS, DEVICE_TOKENS = 2048, 8192


def embed_corpus(
    encoder: DualEncoder,
    texts: Sequence[str],
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    side: Side = "chunk",
) -> np.ndarray:
    """Embeddings [N, D] of `texts`, as `embed_blocks` makes them, in one array."""
    embeddings_ND = np.empty((len(texts), encoder.dimension), dtype=np.float32)
    done = 0
    for block_MD in embed_blocks(encoder, texts, batch_tokens, progress, side):
        embeddings_ND[done : done + len(block_MD)] = block_MD
        done += len(block_MD)
    return embeddings_ND


def embed_blocks(
    encoder: DualEncoder,
    texts: Sequence[str],
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    side: Side = "chunk",
) -> Iterator[np.ndarray]:
    """Embeddings [M, D] of WINDOW texts at a time, float32, without gradient or dropout.

    Texts of like length share a batch of at most `batch_tokens` padded tokens (one text at least;
    None: as many as suit the encoder's device). `progress(done, total)` is called after each batch.
    Raises UserError naming the first text whose embedding is not finite.
    """
    done = 0
    on_cpu = encoder.log_scale.device.type == "cpu"
    size = batch_tokens or (CPU_TOKENS if on_cpu else DEVICE_TOKENS)
    for start in range(0, len(texts), WINDOW):
        rows = encoder.tokenize(texts[start : start + WINDOW], side)
        block_MD = np.empty((len(rows), encoder.dimension), dtype=np.float32)
        with torch.no_grad(), evaluating(encoder):
            for batch in batches([len(row) for row in rows], size):
                batch_BD = encoder.embed([rows[i] for i in batch], side).cpu().numpy()
                wrong = batch[~np.isfinite(batch_BD).all(axis=1)]
                if wrong.size:
                    raise UserError(f"the embedding of {side} {start + wrong.min()} is not finite")
                block_MD[batch] = batch_BD
                done += len(batch)
                if progress is not None:
                    progress(done, len(texts))
        yield block_MD


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[np.ndarray]:
    """Row numbers of each batch, longest texts first, so that too large a budget fails at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        width = -(-lengths[order[start]] // 8) * 8
        stop = start + max(1, batch_tokens // width)
        yield order[start:stop]
        start = stop
