"""`rag2 eval scaling`: rates that are what they say, and a table that follows from them."""

import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from rag2 import config
from rag2.evaluation import rates
from rag2.evaluation.scaling_tables import duration, tables
from rag2.index.flat import Flat
from rag2.registry import UserError

SMALL = [
    "rounds=1",
    "shapes=[{hidden: 16, layers: 1, heads: 1, chunks: 9}]",
    "chunk_tokens=16",
    "vectors=[200, 100]",
    "corpora=[1000, 1000000]",
    "encode_rate=50",
    "step_seconds=2",
    "ages=[40, 80000]",
    "steps=400",
]


def test_made_up_texts_have_the_tokens_asked_for_and_not_one_more(tokenizer: Any, seed: int):
    made = rates.texts(tokenizer, 20, 60, seed)
    lengths = [len(tokenizer(text).input_ids) for text in made]
    assert max(lengths) <= 60 and min(lengths) >= 40  # a made-up word has up to some 10 tokens
    assert len({*made}) == 20


def test_a_rate_counts_every_chunk_and_all_of_its_tokens(encoder: Any, tokenizer: Any):
    passages = rates.texts(tokenizer, 30, 24, 0)
    row = rates.encode_rate(encoder, passages, rounds=2)
    tokens = sum(len(ids) for ids in encoder.tokenize(passages, "chunk"))
    assert row["chunks"] == 30
    ratio = row["tokens_per_second"] / row["chunks_per_second"]
    assert ratio == pytest.approx(tokens / 30)
    assert row["range"][0] <= row["chunks_per_second"] <= row["range"][1]


def test_sleeping_takes_time_but_no_cpu():
    wall, cpu = rates.timed(lambda: time.sleep(0.1))
    assert wall >= 0.1 and cpu < 0.05


def test_what_is_committed_and_read_is_the_whole_generation(tmp_path: Path):
    vectors_ND = rates.directions(300, 8, 0)
    told = rates.disk(Flat(device="cpu"), vectors_ND, 500, tmp_path)
    assert 300 * (8 * 4 + 8 + 500) < told["bytes"] < 300 * (8 * 4 + 8 + 500 + 60) + 4000
    assert not list(tmp_path.iterdir())


def load(recipe: Callable[[str], ModuleType], *words: str) -> tuple[ModuleType, Any]:
    module = recipe("eval/scaling.py")
    return module, config.load(module.ScalingConfig, None, [*SMALL, *words])


def test_the_plan_follows_from_the_rate_given_and_the_file_holds_what_is_shown(
    recipe: Callable[[str], ModuleType], tmp_path: Path
):
    module, cfg = load(recipe, f"out={tmp_path / 'out'}")
    results = module.main(cfg)
    assert json.loads((tmp_path / "out/scaling.json").read_text()) == results
    assert len(results["corpora"]) == 2 * 4
    for row in results["corpora"]:
        assert row["seconds"]["encode"] == row["corpus"] / 50
        assert row["bytes"]["vectors"] == row["corpus"] * 16 * 4
    flat = results["corpora"][0]
    assert flat["index"] == "flat" and flat["least_age_one_device"] >= 2 * (1000 / 50) / 2
    # 20 s of one device fit into the 40 s of 20 steps; 20,000 s do not, in 80,000 s they do.
    assert [b["devices"] for b in flat["bounds"]] == [1, 1]
    large = next(r for r in results["corpora"] if (r["corpus"], r["index"]) == (10**6, "flat"))
    few, many = large["bounds"][1]["devices"], large["bounds"][0]["devices"]
    assert few == 1 and (many is None or many > 20_000 / 40)
    lost = [row["lost"] for row in results["simulated"] if row["policy"] == "sync"]
    assert lost == sorted(lost) and lost[0] > 0
    console = Console(width=80, file=io.StringIO(), record=True)
    for table in tables(results):
        console.print(table)
    shown = console.export_text()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lag=100", "lag=100 must be below every=100"),
        ("vectors=[100, 100]", "two different sizes"),
        ("ages=[1]", "ages"),
        ("shapes=[]", "shapes"),
        ("encode_rate=0", "encode_rate"),
        ("clock=cpu threads=2", "clock=cpu needs threads=1"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    recipe: Callable[[str], ModuleType], word: str, message: str
):
    with pytest.raises(UserError, match=message) as caught:
        load(recipe, *re.split(r" (?=\w+=)", word))
    assert "\n" not in str(caught.value)


def test_durations_are_told_in_a_unit_that_leaves_a_readable_number():
    told = [duration(s) for s in (0.04, 59.0, 90.0, 7200.0, 86400 * 1234.0)]
    assert told == ["0.0 s", "59 s", "1.5 min", "2.0 h", "1,234 d"]
