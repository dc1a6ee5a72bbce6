"""The directory that an evaluation writes to: its settings first, and nobody else's results."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rag2 import artifact, config
from rag2.registry import UserError

CONFIG = "config.yaml"
# Keys that change no number: where it is written, and how many stages are made at once.
FREE = ("out", "jobs")


class Settings(Protocol):
    """What every evaluation's configuration has."""

    @property
    def out(self) -> str: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


def check(cfg: Settings) -> None:
    """Raise UserError, before the work begins, if the results cannot or must not go to `cfg.out`.

    That is a file, or a directory with results (or a run) of other settings; the same settings may
    be evaluated there again.
    """
    place = Path(cfg.out).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"out={cfg.out!r}: {place} is a file, not a directory")
    saved = Path(cfg.out) / CONFIG
    if not saved.is_file():
        if (Path(cfg.out) / "results.json").exists():
            raise UserError(f"out={cfg.out!r} holds results.json and no {CONFIG}: choose another")
        return
    before, now = config.read(saved), cfg.model_dump(mode="json")
    for key in sorted((before.keys() | now.keys()) - {*FREE}):
        if before.get(key) != now.get(key):
            raise UserError(
                f"out={cfg.out!r} holds what was made with {key}={_short(before.get(key))}, not "
                f"{_short(now.get(key))}: choose another out= or delete it"
            )


@contextmanager
def claimed(cfg: Settings) -> Iterator[Path]:
    """Make the directory and write config.yaml; on an error, leave nothing that was not there."""
    directory = Path(cfg.out)
    fresh = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        artifact.replace(directory / CONFIG, config.dump(cfg))  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise UserError(f"out={cfg.out!r} cannot be written to: {error.strerror}") from None
    try:
        yield directory
    except BaseException:
        if fresh and [path.name for path in directory.iterdir()] == [CONFIG]:
            (directory / CONFIG).unlink()
            directory.rmdir()
        raise


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
