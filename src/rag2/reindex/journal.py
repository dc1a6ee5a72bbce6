"""At which step each generation was swapped in, where the clock decided."""

import json
from pathlib import Path

from rag2 import artifact
from rag2.registry import UserError


class Journal:
    """swaps.jsonl of a run: a run that goes on swaps at the steps it tells, as far as it goes."""

    def __init__(self, path: Path, keep: bool, resumed: bool) -> None:
        """Read it, or begin it anew where the run does; `keep=False` writes nothing."""
        self.path, self.keep, self.steps = path, keep, dict[int, int]()
        if not resumed:
            if keep:
                path.unlink(missing_ok=True)
        elif path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            for number, line in enumerate(lines, start=1):
                if line.endswith("\n"):  # a kill may have left half a line
                    try:
                        row = json.loads(line)
                        self.steps[row["generation"]] = row["step"]
                    except (ValueError, TypeError, KeyError):
                        raise UserError(f"{path}:{number}: not a line about a swap") from None
            if keep:
                artifact.replace(path, "".join(map(_line, self.steps.items())))

    def add(self, generation: int, step: int) -> None:
        """Durable on return: the swap that follows will be found where it was."""
        self.steps[generation] = step
        if self.keep:
            artifact.append(self.path, _line((generation, step)))


def _line(swap: tuple[int, int]) -> str:
    return json.dumps({"generation": swap[0], "step": swap[1]}) + "\n"
