"""An export and a directory of one's own -> a knowledge base that can be changed.

The export stays as it is. Its documents and its generation are copied once to the state directory,
where changes and later generations live, bound to the export by the seal of its manifest.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path

from rag2 import artifact
from rag2.answering.exported import Exported
from rag2.registry import UserError

FORMAT = "rag2.state/1"
FILE, LOCK = "state.json", "lock"
KB, GENERATIONS, TOKENIZER = "kb.sqlite", "generations", "tokenizer"


class State:
    """A state directory, held by this process alone until it is closed."""

    def __init__(self, directory: Path, exported: Exported) -> None:
        """Make or open it.

        Raises UserError for a directory that is another export's, holds something else, or is in
        use by another process.
        """
        self.directory = directory.resolve()
        if self.directory.is_relative_to(exported.directory.resolve()):
            raise UserError(f"state {directory} lies inside the export, which stays as it is")
        try:
            artifact.make_folders(self.directory)
            self._lock = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"state {directory} cannot be made ({why}): choose another") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._bind(exported)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"state {directory} is in use by another process") from None
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def kb(self) -> Path:
        """The knowledge base that changes."""
        return self.directory / KB

    @property
    def generations(self) -> Path:
        """Where its generations are."""
        return self.directory / GENERATIONS

    @property
    def tokenizer(self) -> Path:
        """What cuts new documents."""
        return self.directory / TOKENIZER

    def close(self) -> None:
        """Let others have it."""
        os.close(self._lock)

    def _bind(self, exported: Exported) -> None:
        record = self.directory / FILE
        if record.is_file():
            if _export_of(record) != exported.id:
                raise UserError(
                    f"state {self.directory} belongs to another export than {exported.directory}: "
                    "choose another directory, or remove it and what was changed there"
                )
            return
        self._clear()
        copied = self.directory / KB
        shutil.copyfile(exported.kb, copied)
        first = self.generations / "000000"
        shutil.copytree(exported.directory / "index", first)
        if (exported.directory / TOKENIZER).is_dir():
            shutil.copytree(exported.directory / TOKENIZER, self.tokenizer)
        _sync(self.directory)
        artifact.replace(self.generations / "current", f"{first.name}\n")
        text = json.dumps({"format": FORMAT, "export": exported.id}, indent=2)
        artifact.replace(record, text + "\n")  # last: without it all this is made again

    def _clear(self) -> None:
        """Remove what a killed process left of a copy; UserError for anything else."""
        ours = {LOCK, KB, GENERATIONS, TOKENIZER}
        strange = sorted({path.name for path in self.directory.iterdir()} - ours)
        if strange:
            raise UserError(f"{self.directory} is no state directory: it holds {strange[0]!r}")
        self.kb.unlink(missing_ok=True)
        for folder in (self.generations, self.tokenizer):
            shutil.rmtree(folder, ignore_errors=True)


def _export_of(record: Path) -> str:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["format"] == FORMAT and isinstance(found["export"], str):
            return found["export"]
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(f"{record} is damaged, or of another version of rag2")


def _sync(directory: Path) -> None:
    """Make every file and folder below durable."""
    for folder, _, files in os.walk(directory):
        for path in (Path(folder), *(Path(folder, name) for name in files)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
