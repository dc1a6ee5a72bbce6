"""What the benchmarks of joint training report: what a re-index costs, what a step costs."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rag2 import cli, yaml12
from rag2.registry import lookup

Recipe = Callable[[str], ModuleType]


def test_the_share_lost_is_that_of_steps_per_second_over_all_rounds(recipe: Recipe):
    seconds = {"none": (8.0, 10.0), "sync": (20.0, 16.0), "async": (9.0, 11.0)}
    rows = [{"way": way, "seconds": s} for way, both in seconds.items() for s in both]
    lost = recipe("eval/refresh.py").lost(rows)
    assert lost == pytest.approx({"none": 0.0, "sync": 0.5, "async": 0.1})


def test_each_way_is_a_valid_refresh_and_only_sync_has_both_cores(recipe: Recipe):
    refresh = recipe("eval/refresh.py")
    ways = refresh.ways(refresh.RefreshConfig(every=7, lag=3, cores=(0, 1)))
    parsed = {way: yaml12.parse(text, way) for way, text in ways.items()}
    made = {way: lookup("refresh", way).model_validate(row) for way, row in parsed.items()}
    assert made["sync"].every == made["async"].every == 7 and made["async"].lag == 3
    assert made["sync"].threads == 2 and made["sync"].cpus == [0, 1]
    assert made["async"].cpus == [1] and made["async"].threads == 1


def test_a_benchmark_that_cannot_be_is_refused_before_it_begins(recipe: Recipe):
    for wrong in ({"every": 7, "lag": 7}, {"steps": 1}):
        with pytest.raises(ValueError, match=r"must be below every=7|greater than or equal to 2"):
            recipe("eval/refresh.py").RefreshConfig(**wrong)


@pytest.mark.slow
def test_a_step_is_timed_in_one_pass_and_in_two(home: Path, tmp_path: Path):
    given = {"kb": "data/kb.sqlite", "questions": "data/questions.jsonl"}
    given |= {"generator": "generator", "retriever": "retriever"}
    words = [f"{key}={home / path}" for key, path in given.items()]
    words += [f"out={tmp_path / 'out'}", "ks=[2]", "skip_below=[0.0,0.3]"]
    words += ["repeats=1", "batch_size=4"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "steps", *words])
    assert ended.value.code == 0
    one, skipping, two, _ = json.loads((tmp_path / "out" / "steps.json").read_text())["cases"]
    assert (one["step"], one["skip_below"], one["error"]) == ("one_pass", 0.0, 0.0)
    assert (skipping["step"], skipping["skip_below"]) == ("one_pass", 0.3)
    assert (two["step"], two["skip_below"]) == ("two_pass", 0.0) and two["error"] < 1e-4
    assert skipping["kept"] == 1 or skipping["error"] > two["error"]
    assert one["kept"] == two["kept"] == 1.0
    assert min(one["seconds"], two["seconds"]) > 0
