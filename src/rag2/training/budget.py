"""How long a run trains (steps, epochs, tokens of loss or seconds), and what it learns when.

Letters: N training rows.
"""

import math
from typing import Any, Protocol

import numpy as np

from rag2.registry import UserError
from rag2.training import batches, distributed
from rag2.training.optim import Schedule

INSTEAD = ("epochs", "tokens", "seconds")  # keys that take the place of `steps`


class Length(Protocol):
    """What a configuration says of its run's length."""

    @property
    def seed(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def epochs(self) -> int | None: ...
    @property
    def tokens(self) -> int | None: ...
    @property
    def seconds(self) -> float | None: ...


def one_length(cfg: Any) -> Any:
    """`cfg`; raises ValueError unless it has one length: epochs, tokens or seconds, else steps."""
    given = [key for key in INSTEAD if getattr(cfg, key) is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} both say how long to train: give one of them")
    if not given and cfg.steps is None:
        raise ValueError(f"steps=null: give steps, {', '.join(INSTEAD[:-1])} or {INSTEAD[-1]}")
    return cfg


class Course:
    """The rows of each step, counted from 0, and the end of training, as functions of the config.

    Given `steps`, batches are slices of one endless row of shuffled epochs. Otherwise an epoch goes
    through every row once and its last batch is smaller, so that epochs end where steps end.
    """

    def __init__(self, cfg: Length, tokens_N: np.ndarray) -> None:
        """`tokens_N` are the tokens of each row that carry loss.

        Raises UserError where `seconds` would end the processes of a group at different steps.
        """
        self.tokens_N, self.size, self.seed = tokens_N, cfg.batch_size, cfg.seed
        self.seconds = cfg.seconds
        self.whole = any(getattr(cfg, key) is not None for key in INSTEAD)
        self.per_epoch = math.ceil(len(tokens_N) / self.size)
        self.steps = cfg.steps
        """of the whole run; None where seconds decide"""
        if cfg.epochs is not None:
            self.steps = cfg.epochs * self.per_epoch
        elif cfg.tokens is not None:
            self.steps = self._steps_for(cfg.tokens)
        elif cfg.seconds is not None:
            self.steps = None
            if distributed.world() > 1:
                raise UserError(
                    "seconds: the clocks of several processes differ; give steps, epochs or tokens"
                )

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of batch `step`."""
        draw = batches.whole_epochs if self.whole else batches.sample
        return draw(len(self.tokens_N), self.size, self.seed, step)

    def epoch(self, step: int) -> int:
        """The epoch, counted from 0, of the first row of `step`."""
        return self._rows_before(step) // len(self.tokens_N)

    def tokens(self, step: int) -> int:
        """Tokens that carried loss in the steps before `step`."""
        epochs, rest = divmod(self._rows_before(step), len(self.tokens_N))
        return epochs * int(self.tokens_N.sum()) + int(self._shuffled(epochs)[:rest].sum())

    def validates(self, step: int, over: bool) -> bool:
        """Whether an epoch, or the run, ends with `step`."""
        return over or self.epoch(step + 1) > self.epoch(step)

    def over(self, step: int, seconds: float) -> bool:
        """Whether the run ends before `step`, after so many seconds of training."""
        if self.seconds is not None:
            return seconds >= self.seconds
        assert self.steps is not None
        return step >= self.steps

    def factor(self, schedule: Schedule, step: int, seconds: float) -> float:
        """The share of the peak learning rate at `step`, after so many seconds of training.

        The schedule runs over the whole length; by seconds, over as many steps as fit at the pace
        until now.
        """
        if self.seconds is None:
            assert self.steps is not None
            return schedule.factor(step, self.steps)
        pace = step / seconds if seconds > 0 else 0.0
        return schedule.factor(step, max(step + 1, round(pace * self.seconds)))

    def _rows_before(self, step: int) -> int:
        if not self.whole:
            return step * self.size
        epochs, batch = divmod(step, self.per_epoch)
        return epochs * len(self.tokens_N) + batch * self.size

    def _shuffled(self, epoch: int) -> np.ndarray:
        """`tokens_N` in the order of an epoch."""
        order = batches.generator(self.seed, epoch).permutation(len(self.tokens_N))
        return self.tokens_N[order]

    def _steps_for(self, tokens: int) -> int:
        """The fewest steps after which so many tokens carried loss."""
        epochs, rest = divmod(tokens, int(self.tokens_N.sum()))
        after = np.cumsum(self._shuffled(epochs))
        ends = [after[min(n + self.size, len(after)) - 1] for n in range(0, len(after), self.size)]
        return epochs * self.per_epoch + int(np.searchsorted(ends, rest)) + (rest > 0)
