"""The figures of a run's log, line by line, to trackers besides: TensorBoard, trackio, W&B, ...

The trackers are Hugging Face accelerate's. log.jsonl stays what a run is judged and resumed by.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from rag2 import config
from rag2.registry import UserError, nearest
from rag2.training.log import RunLog

PROJECT = "rag2"  # what the runs are gathered under, in trackers that know projects


def _known(names: list[str]) -> list[str]:
    """The names; ValueError, with the nearest, for one that accelerate has no tracker of."""
    if names:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS as known

        for name in names:
            if name not in known:
                allowed = ", ".join(sorted(known))
                raise ValueError(
                    f"unknown tracker {name!r}; allowed: {allowed}.{nearest(name, known)}"
                )
    return names


Names = Annotated[list[str], AfterValidator(_known)]


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in available:
            raise UserError(
                f"log_with: {name} is not installed: pip install {name}, or 'rag2[trackers]' for "
                "tensorboard and trackio"
            )


class TrackedLog:
    """A log whose lines go to trackers too: every number in them, at the line's step."""

    def __init__(self, log: RunLog, cfg: Any, out: Path, start: int) -> None:
        """Start the trackers in `cfg.log_with` for the run in `out`, which is at step `start`.

        Raises UserError when a tracker does not start.
        """
        from accelerate import PartialState

        # The trackers' own messages need it. In a plain process it must not look for GPUs; in a
        # group that a launcher started, the group is there already and is only read.
        PartialState(cpu="LOCAL_RANK" not in os.environ)
        self.log = log
        try:
            self.trackers = [_start(name, out, start) for name in dict.fromkeys(cfg.log_with)]
        except UserError:
            log.close()  # nothing of this run is left in the way of the next
            raise
        if start == 0:  # a run that goes on has told its settings
            for tracker in self.trackers:
                tracker.store_init_configuration(_flat(cfg))

    def write(self, **values: Any) -> None:
        """As RunLog.write; then tell the trackers."""
        line = self.log.write(**values)
        step = line.pop("step")
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        for tracker in self.trackers:
            tracker.log(numbers, step=step)

    def sync(self) -> None:
        """As RunLog.sync; the trackers promise nothing."""
        self.log.sync()

    def close(self) -> None:
        """Close the log and end the trackers' runs."""
        self.log.close()
        for tracker in self.trackers:
            tracker.finish()


def _start(name: str, out: Path, start: int) -> Any:
    """A running tracker; what the run told from step `start` on is told once more."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    make = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        # In `out` itself, where figures from before an interruption can be taken back.
        tracker = make(name, out, purge_step=start)
    elif name == "trackio":
        tracker = make(PROJECT, name=str(out), resume="allow" if start else "never")
    else:
        where = [out] if make.requires_logging_directory else []
        tracker = make(PROJECT, *where)
    try:
        tracker.start()
    except Exception as error:  # a missing login, an unreachable server: each has its own class
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"log_with: {name} did not start: {type(error).__name__}: {reason}"
        ) from error
    return tracker


def _flat(cfg: config.Config) -> dict[str, Any]:
    """The settings under dotted keys; what is no number, text or truth value, as text."""
    settings = {
        key: value
        for name, block in cfg.model_dump(mode="json").items()
        for key, value in config.leaves(name, block)
    }
    return {
        key: value if isinstance(value, int | float | str) else str(value)
        for key, value in settings.items()
    }
