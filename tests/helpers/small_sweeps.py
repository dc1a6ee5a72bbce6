"""A recipe of no weight to sweep over, cells without processes, what a sweep leaves on disk."""

import csv
import json
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from rag2 import config, stages
from rag2.registry import UserError

# Adds numbers; notes every run of it, and dies or fails where a setting says so.
ADD = '''"""Adds."""
import json, os, signal
from pathlib import Path
from rag2.config import Config, run
from rag2.registry import UserError

class AddConfig(Config):
    out: str = "runs/add"
    a: int = 0
    b: float = 0.0
    words: list[str] = []
    kb: str | None = None
    jobs: int = 1

def main(cfg: AddConfig) -> dict:
    out = Path(cfg.out)
    with (out / "runs").open("a") as file:
        file.write("run\\n")
    if cfg.a == 13:
        raise UserError("thirteen brings bad luck")
    if Path(f"kill-{cfg.a}").exists():
        os.kill(os.getppid(), signal.SIGKILL)
    result = {"arms": {"sum": {"accuracy": cfg.a + cfg.b, "ci95": [0.0, 1.0], "k": len(cfg.words)}}}
    if cfg.words:
        points = [{"k": k, "accuracy": 0.1 * k, "ci95": [0.0, 0.5]} for k in range(3)]
        result["arms"]["sum"]["by_k"] = {"marginal": points}
    (out / "results.json").write_text(json.dumps(result | {"n": 10}))
    return result

if __name__ == "__main__":
    run(main, AddConfig)
'''


def in_this_process(ran: list[str]) -> Callable[..., None]:
    """`stages.run` without processes, which notes in `ran` what it runs."""

    def run(
        jobs: Sequence[stages.Job],
        at_once: int,
        done: Callable[[str], None],
        failed: Callable[[str, stages.Failed], None] | None = None,
    ) -> None:
        for job in jobs:
            ran.append(job.name)
            _, script, flag, file, *words = job.command
            assert flag == "-c"
            main = runpy.run_path(script, run_name="recipe")["main"]
            cls = next(iter(get_type_hints(main).values()))
            try:
                main(config.load(cls, file, words))
            except UserError as error:
                if failed is None:
                    raise stages.Failed(job, str(error)) from None
                failed(job.name, stages.Failed(job, str(error)))
            else:
                done(job.name)

    return run


def table(out: Path, name: str = "sweep.csv") -> list[dict[str, str]]:
    """The rows of a CSV file of a sweep."""
    with (out / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def runs(out: Path) -> dict[str, int]:
    """How often the recipe was run in each cell."""
    return {
        path.parent.name.rpartition("-")[0]: path.read_text().count("\n")
        for path in sorted(out.glob("cells/*/runs"))
    }


def mark(out: Path, cell: str) -> dict[str, Any]:
    """What is noted of the cell whose name begins so."""
    (path,) = out.glob(f"cells/{cell}*/cell.json")
    return json.loads(path.read_text(encoding="utf-8"))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below a folder but the locks."""
    files = (path for path in sorted(folder.rglob("[!.]*")) if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
