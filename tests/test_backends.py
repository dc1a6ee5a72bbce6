"""`rag2 eval backends`: every index measured on the same vectors, and what it cannot do is told."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nearest import brute_force
from rag2 import config
from rag2.index.flat import Flat
from rag2.index.ivf import IVF
from rag2.index.pgvector import PGVector
from rag2.index.shards import Shards
from rag2.registry import UserError

SMALL = ["sizes=[300]", "dimension=16", "queries=40", "k=5"]


def load(recipe: Callable[[str], ModuleType], *words: str) -> tuple[ModuleType, Any]:
    module = recipe("eval/backends.py")
    return module, config.load(module.BackendsConfig, None, [*SMALL, *words])


def test_rows_tell_what_was_measured_and_what_was_not(
    recipe: Callable[[str], ModuleType], tmp_path: Path
):
    gone = "{name: pgvector, dsn: host=localhost port=1}"
    indexes = f"indexes=[{{name: ivf, nprobe: 1, device: cpu}}, {gone}]"
    module, cfg = load(recipe, f"out={tmp_path / 'out'}", indexes)
    results = module.main(cfg)
    assert json.loads((tmp_path / "out" / "backends.json").read_text()) == results
    ivf, refused = results["rows"]
    assert not ivf["exact"] and 0.1 < ivf["recall"] < 1  # one of 17 cells
    assert ivf["asked"] == 40 and 0 < ivf["p50_ms"] <= ivf["p95_ms"]
    assert ivf["files"] > 300 * 16 * 4
    assert refused["skipped"].startswith("build: Postgres: connection failed")
    written = (tmp_path / "out" / "backends.md").read_text().splitlines()
    assert len(written) == 2 + 2 and all(line.count("|") == 9 for line in written)
    kept = {"config.yaml", "backends.json", "backends.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == kept


def test_questions_lie_in_clusters_and_the_truth_is_that_of_brute_force(
    recipe: Callable[[str], ModuleType], tmp_path: Path
):
    module, cfg = load(recipe, "cluster=30")
    files = module.made(cfg, 300, tmp_path)
    vectors, queries = (np.fromfile(files[n], np.float32) for n in ("vectors", "queries"))
    vectors, queries = vectors.reshape(300, 16), queries.reshape(40, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    truth = np.fromfile(files["nearest"], np.int64).reshape(40, 5)
    np.testing.assert_array_equal(truth, brute_force(vectors, np.arange(300), queries, 5)[1])
    near = np.take_along_axis(queries @ vectors.T, truth, axis=1)
    assert near.mean() > 0.5  # of random directions: 0.6 at the 5th of 300 would be rare


def test_what_takes_too_long_is_ended_and_told(recipe: Callable[[str], ModuleType], tmp_path: Path):
    module, cfg = load(recipe, f"out={tmp_path / 'out'}", "limit_seconds=0.01", "indexes=[flat]")
    assert module.main(cfg)["rows"][0]["skipped"] == "build: more than 0.01 s"


def test_an_index_is_called_by_what_is_not_its_default(recipe: Callable[[str], ModuleType]):
    label = recipe("eval/backends.py").label
    assert label(Flat(device="cpu")) == "flat" and label(IVF(nprobe=4)) == "ivf nprobe=4"
    assert label(PGVector(kind="flat", dsn="host=x")) == "pgvector flat"
    assert label(Shards(inner=IVF())) == "4 shards ivf"


def test_more_neighbours_than_vectors_are_refused(recipe: Callable[[str], ModuleType]):
    with pytest.raises(UserError, match="k=301 is more than the smallest of sizes"):
        load(recipe, "k=301")
