"""`rag2 eval live`: times of changes that were seen to be found."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rag2 import config
from rag2.live.live import Live

SMALL = [
    *("sizes=[30, 60]", "delta=4", "changes=3", "chunk_tokens=8"),
    "encoder={hidden: 8, layers: 1, heads: 1, intermediate: 8}",
]


def measured(recipe: Callable[[str], ModuleType], out: Path) -> dict[str, Any]:
    """What the recipe finds."""
    module = recipe("eval/live.py")
    return module.main(config.load(module.LiveConfig, None, [*SMALL, f"out={out}"]))


def test_every_change_is_timed_until_a_search_has_shown_it(recipe, tmp_path: Path):
    found = measured(recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out/live.json").read_text()) == found
    assert [row["chunks"] for row in found["sizes"]] == [30, 60]
    for row in found["sizes"]:
        times = row["milliseconds"]
        for kind in ("add", "update", "remove"):
            assert times[kind]["n"] == times[f"{kind} and search"]["n"] == 3
            assert 0 < times[kind]["p50"][0] < times[f"{kind} and search"]["p100"][0]
        assert times["search"]["n"] == 9
        assert times["search by vectors and words"]["n"] == times["search by vectors"]["n"] == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.yaml", "live.json"}


def test_a_change_that_is_not_found_ends_the_measurement(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Live, "view", lambda self: self._view)
    with pytest.raises(AssertionError, match="after add"):
        measured(recipe, tmp_path / "out")
