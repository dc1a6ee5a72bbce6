"""What three whole demos must show, each of another world."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demos import RAG_ARMS, SOURCES, lines
from rag2.evaluation import stats

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """`rag2 demo` with three seeds; complete stages in $RAG2_DEMO_RUNS/seed-N are reused."""
    given = os.environ.get("RAG2_DEMO_RUNS")
    runs = Path(given).resolve() if given else tmp_path_factory.mktemp("runs")
    for seed in SEEDS:
        subprocess.run(
            [sys.executable, "-c", "from rag2.cli import main; main()"]
            + ["demo", "--out", str(runs / f"seed-{seed}"), "--seed", str(seed)],
            env={**os.environ, "PYTHONPATH": SOURCES},
            check=True,
        )
    return {seed: runs / f"seed-{seed}" for seed in SEEDS}


@pytest.mark.slow
def test_three_seeds_of_the_demo_show_what_joint_training_is_for(demos: dict[int, Path]):
    seeds = {
        seed: json.loads((out / "results.json").read_text())["arms"] for seed, out in demos.items()
    }
    failures = []

    def expect(seed: object, what: str, holds: bool) -> None:
        if not holds:
            failures.append(f"seed {seed}: {what}")

    for seed, arms in seeds.items():
        accuracy = {name: arm["accuracy"] for name, arm in arms.items()}
        n = json.loads((demos[seed] / "results.json").read_text())["n"]
        expect(seed, f"n = {n}", n >= 500)
        expect(seed, f"base {accuracy['base']}", 0.19 <= accuracy["base"] <= 0.33)
        expect(seed, f"gold_rag {accuracy['gold_rag']}", accuracy["gold_rag"] >= 0.95)
        expect(seed, f"joint {accuracy['joint']}", accuracy["joint"] >= 0.90)
        found, warm = arms["joint"]["recall_at_1"], arms["frozen_rag"]["recall_at_1"]
        expect(seed, f"recall@1 {found}, warm start {warm}", found >= max(0.85, warm + 0.15))
        expect(seed, f"frozen_rag against ft: {accuracy}", accuracy["frozen_rag"] > accuracy["ft"])

    def right(arm: str) -> np.ndarray:
        rows = [row for out in demos.values() for row in lines(out / f"samples_{arm}.jsonl")]
        return np.array([row["acc"] == 1.0 for row in rows])

    for arm in RAG_ARMS:
        test = stats.paired(right("joint"), right(arm))
        expect("all", f"joint against {arm}: {test}", test.difference > 0 and test.mcnemar_p < 1e-3)
    assert not failures, "\n".join(failures)
