"""Runs of several processes: `together` starts them with torchrun; they do job after job.

A job is {"settings": of train/joint.py, "fault": a name in FAULTS or None}, and where it is another
recipe than joint "recipe": its name. Beside each run lies
OUT.idle-RANK: how many passes the process made only because the other had more to do.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rag2
import rag2_kernels
from exact_norms import exact_norms
from rag2 import config
from rag2.training import checkpoint, distributed, step

FAULTS = {
    "gradients not averaged": (distributed, "average_gradients"),
    "optimizer forgotten": (checkpoint, "_restore_optimizer"),
}


def together(jobs: list[dict[str, Any]], folder: Path, processes: int = 2) -> None:
    """Do the jobs in processes that talk by gloo."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += [f"--nproc_per_node={processes}"]
    roots = [str(Path(str(package.__file__)).parents[1]) for package in (rag2, rag2_kernels)]
    done = subprocess.run(
        [*launch, __file__, str(file)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]


def main(file: Path) -> None:
    """What each of them does."""
    for job in json.loads(file.read_text(encoding="utf-8")):
        with pytest.MonkeyPatch.context() as patch:
            exact_norms(patch)
            if job["fault"]:
                patch.setattr(*FAULTS[job["fault"]], lambda *_: None)
            idle: list[list[int]] = []
            honest = step._idle
            patch.setattr(step, "_idle", lambda *a, f=honest, i=idle: i.extend(f(*a)) or f(*a))
            name = job.get("recipe", "joint")
            recipe = loaded(name)
            recipe.main(getattr(recipe, f"{name.title()}Config")(**job["settings"]))
        out = Path(job["settings"]["out"])
        Path(f"{out}.idle-{distributed.rank()}").write_text(str(len(idle)), encoding="utf-8")


def loaded(name: str) -> ModuleType:
    """A training recipe as a module."""
    spec = importlib.util.spec_from_file_location(name, config.recipe(f"train/{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(Path(sys.argv[1]))
