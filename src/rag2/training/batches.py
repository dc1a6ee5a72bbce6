"""Batches as functions of (seed, step): without iterator state a resumed run sees the same rows."""

from collections.abc import Sequence

import numpy as np


def generator(seed: int, *counters: int) -> np.random.Generator:
    """A counter-based random generator (Philox) that depends on its arguments alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *counters])))


def sample(num_rows: int, size: int, seed: int, step: int) -> np.ndarray:
    """Row numbers of batch `step`: consecutive slices of one fresh permutation per epoch."""
    assert num_rows > 0 and size > 0, (num_rows, size)
    positions = np.arange(step * size, (step + 1) * size)
    epochs, offsets = np.divmod(positions, num_rows)
    rows = np.empty(size, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = generator(seed, int(epoch)).permutation(num_rows)[offsets[chosen]]
    return rows


def whole_epochs(num_rows: int, size: int, seed: int, step: int) -> np.ndarray:
    """As `sample`, but no batch reaches into the next epoch: the last of an epoch is smaller."""
    assert num_rows > 0 and size > 0, (num_rows, size)
    epoch, batch = divmod(step, -(-num_rows // size))
    return generator(seed, epoch).permutation(num_rows)[batch * size : (batch + 1) * size]


def bucketed(
    lengths: Sequence[int], size: int, seed: int, step: int, window: int = 16
) -> np.ndarray:
    """Row numbers of batch `step`, alike in length: each window of batches is sorted, then dealt.

    Padding is wasted work: sorting `window` batches at a time removes most of it, and because the
    batches of a window come in random order, long and short sequences still alternate.
    """
    first = step // window
    rows = sample(len(lengths), size * window, seed, first)
    rows = rows[np.argsort(np.asarray(lengths)[rows], kind="stable")]
    turn = generator(seed, first, 1).permutation(window)[step % window]
    return rows[turn * size : (turn + 1) * size]
