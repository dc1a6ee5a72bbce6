"""The key of a cell: every setting that can change a number, and the bytes of what it names."""

from pathlib import Path

import pytest

from rag2 import config
from rag2.sweep import cell

# A changed value of every kind of setting, one a line.
CHANGES = {
    "eval/compare": [
        *("limit=3", "seed=1", "ks=[0,1]", "readings=[concat]", "metrics=[mutual_info]"),
        *("arms=[base]", "shots.count=1", "shots.seed=1", "prompt.budget=9", "dtype=bfloat16"),
        *("prompt.format=letters", "generators.ft=other", "retrievers.warm=other"),
    ],
    "eval/mc": ["split=validation", "shots=1", "exact=true", "seed=1", "format=letters"],
    "eval/open": ["limit=3", "seed=1", "ks=[0,1]", "retriever=gold", "max_new_tokens=9", "shots=1"],
    "train/joint": ["seed=1", "steps=7", "batch_size=3", "lr_retriever=0.5", "refresh.every=7"],
}


def key(tmp_path: Path, recipe: str, *words: str) -> str:
    """The key of a recipe's cell with these settings."""
    group, name = recipe.split("/")
    path = config.recipe(f"{recipe}.py")
    made = cell.Recipe(group, name, path, cell.configuration(path))
    cfg = config.load(made.cls, None, list(words))
    return cell.plan(made, cfg, {}, tmp_path / "sweep", {}).key


@pytest.mark.parametrize("recipe", CHANGES)
def test_every_setting_makes_another_cell_but_those_that_say_where_and_how(tmp_path, recipe: str):
    keys = [key(tmp_path, recipe, *words) for words in ([], *([word] for word in CHANGES[recipe]))]
    assert len(set(keys)) == len(keys)
    for word in ("out=elsewhere", "home=elsewhere", "jobs=1"):
        assert key(tmp_path, recipe, word) == keys[0], word


def test_a_folder_is_what_its_files_hold_wherever_it_lies(tmp_path: Path):
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "weights").write_bytes(b"1234")
    (folder / ".lock").touch()
    before = key(tmp_path, "eval/compare", f"generators.ft={folder}")
    (folder / "part" / "weights").write_bytes(b"1243")
    assert key(tmp_path, "eval/compare", f"generators.ft={folder}") != before
    (folder / "part" / "weights").write_bytes(b"1234")
    (folder / ".lock").unlink()
    moved = folder.rename(tmp_path / "moved")
    assert key(tmp_path, "eval/compare", f"generators.ft={moved}") == before
    (moved / "part" / "weights").rename(moved / "part" / "renamed")
    assert key(tmp_path, "eval/compare", f"generators.ft={moved}") != before
