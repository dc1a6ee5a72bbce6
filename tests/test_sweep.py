"""Sweeps: the grid, what makes a cell what it is, and that nothing is computed twice."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rag2 import cli, config, stages
from rag2.registry import UserError
from rag2.sweep import axes, cell
from rag2.sweep.run import Sweep
from small_runs import Killed
from small_sweeps import ADD, in_this_process, mark, runs, snapshot, table

SWEEP = """
from pathlib import Path
from rag2 import cli, config
config.SHIPPED = (Path({tree!r}),)
cli.main()
"""


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config of a recipe that adds, shipped in place of eval/mc.py; runs in an empty folder."""
    (tmp_path / "tree" / "eval").mkdir(parents=True)
    (tmp_path / "tree" / "eval" / "mc.py").write_text(ADD)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(config, "SHIPPED", (tmp_path / "tree",))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    Path("add.yaml").write_text("# rag2 eval mc -c add.yaml\nb: 0.5\n")
    return "add.yaml"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells that are run, in this process."""
    names: list[str] = []
    monkeypatch.setattr(stages, "run", in_this_process(names))
    return names


def sweep(*words: str, config: str = "add.yaml") -> dict[str, str]:
    return Sweep.of(config, words).run()


# ----- the grid ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("a=0,1,2", ("0", "1", "2")),
        ("a=0", ("0",)),
        ("a=", ("",)),
        ("ks=[0,1],[0,1,2]", ("[0, 1]", "[0, 1, 2]")),
        ("ks=[0,1]", ("[0,1]",)),
        ("t={name: lora, rank: 8},full", ("{name: lora, rank: 8}", "full")),
        ('p="a, b",c', ("a, b", "c")),
        ('p="a, b"', ('"a, b"',)),
        ("lr=1e-3,2e-3", ("0.001", "0.002")),
        ("x=no,null,'1'", ("no", "null", "'1'")),
    ],
)
def test_commas_part_values_only_at_the_top(word: str, values: tuple[str, ...]):
    (axis,) = axes.parse([word])
    assert axis.values == values


def test_the_cells_are_the_product_and_tied_keys_go_together(dice):
    counts = [dice.randint(1, 4) for _ in range(3)]
    words = [f"k{i},t{i}={','.join(map(str, range(count)))}" for i, count in enumerate(counts)]
    cells = list(axes.product(axes.parse(words)))
    assert (
        len({tuple(c.values()) for c in cells}) == len(cells) == counts[0] * counts[1] * counts[2]
    )
    assert all(c[f"k{i}"] == c[f"t{i}"] for c in cells for i in range(3))
    assert axes.swept(axes.parse(["a=1", "b,c=1,2"])) == ["b", "c"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a=0,0", "gives the value 0 twice"),
        ("a=0,,1", "malformed values"),
        ("a=0,", "malformed values"),
        ("a=[0,1", "malformed values"),
        ("a", "malformed setting"),
        ("a,=0", "malformed setting"),
        ("a,a=0", "a is given twice"),
    ],
)
def test_a_malformed_axis_is_one_line(word: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        axes.parse([word])
    assert "\n" not in str(caught.value)


# ----- one row per cell ----------------------------------------------------------------------


def test_a_sweep_writes_a_row_per_cell_and_arm_and_a_second_one_does_nothing(add, ran):
    words = ("a=1,2", "b=0.25,0.5", "words=[x]", "out=s")
    assert sweep(*words) == {} and len(ran) == 4
    rows = table(Path("s"))
    assert [(row["a"], row["b"], float(row["accuracy"]), row["arm"]) for row in rows] == [
        (str(a), str(b), a + b, "sum") for a in (1, 2) for b in (0.25, 0.5)
    ]
    assert list(rows[0])[:3] == ["a", "b", "cell"] and rows[0]["ci95_high"] == "1.0"
    assert [r["k"] for r in table(Path("s"), "by_k.csv")] == ["0", "1", "2"] * 4
    summary = json.loads(Path("s/sweep.json").read_text())
    assert (summary["format"], summary["recipe"]) == ("rag2.sweep/1", "eval mc")
    assert summary["cells"] == 4 and len(summary["rows"]) == 4 and len(summary["by_k"]) == 12
    before = snapshot(Path("s"))
    assert sweep(*words) == {} and len(ran) == 4
    assert snapshot(Path("s")) == before
    assert sweep("a=1,2,3", "b=0.25", "words=[x]", "out=s") == {}
    assert ran[4:] == ["a=3"] and [row["a"] for row in table(Path("s"))] == ["1", "2", "3"]


def test_a_cell_is_the_command_that_its_directory_says(add, ran):
    sweep("a=1,2", "out=s")
    for path in Path("s").glob("cells/*/cell.yaml"):
        text = path.read_text()
        assert text.startswith("# rag2 eval mc -c cell.yaml\n") and f"out: {path.parent.absolute()}"
        assert cell.Recipe.of(path).name == "mc"


def test_a_failing_cell_is_named_and_the_others_go_on(add, ran, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["sweep", "-c", add, "a=1,13,2", "out=s"])
    told = capsys.readouterr()
    assert caught.value.code == 1
    assert told.err == "error: cell a=13: thirteen brings bad luck\n"
    assert "0 cells were done, 2 run, 1 failed" in told.out
    assert [(row["a"], row["error"]) for row in table(Path("s"))] == [
        ("1", ""),
        ("13", "thirteen brings bad luck"),
        ("2", ""),
    ]
    assert ran == ["a=1", "a=13", "a=2"]
    with pytest.raises(SystemExit):
        cli.main(["sweep", "-c", add, "a=1,13,2", "out=s"])
    assert ran[3:] == ["a=13"]  # tried again; the others are done


def test_a_dry_run_lists_the_cells_and_writes_nothing(add, ran, capsys):
    sweep("a=1", "out=s")
    before = snapshot(Path())
    with pytest.raises(SystemExit) as caught:
        cli.main(["sweep", "-c", add, "a=1,2", "out=s", "--dry-run"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and snapshot(Path()) == before and len(ran) == 1
    assert [line.split(" | ")[-1] for line in out.splitlines()[2:]] == ["done |", "to do |"]


# ----- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=1,two"], "wrong value for 'a': 'two'"),
        (["c=1,2"], "unknown key 'c'"),
        (["out=x,y"], "out cannot be swept"),
        (["jobs=1,2"], r"compute the same: \(jobs=1\) and \(jobs=2\)"),
        (["b=1,1.0"], "compute the same"),
        (["kb=nowhere.sqlite"], "kb=nowhere.sqlite: the file does not exist"),
        (["out=add.yaml"], "is a file, not a directory"),
    ],
)
def test_a_mistake_in_any_cell_is_refused_before_one_is_run(add, ran, words, message):
    with pytest.raises(UserError, match=message) as caught:
        sweep(*words)
    assert "\n" not in str(caught.value) and not ran
    assert {path.name for path in Path().iterdir()} == {"add.yaml"}


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("b: 1", "its first line must be its command, as in '# rag2 train joint -c x.yaml'"),
        ("# rag2 kb build x", "its first line must be its command"),
        ("# rag2 eval mcc -c x.yaml", r"Did you mean 'eval/mc.py'\?"),
    ],
)
def test_a_config_that_names_no_recipe_is_refused(add, first, message):
    Path("x.yaml").write_text(f"{first}\n")
    with pytest.raises(UserError, match=message):
        sweep("a=1", config="x.yaml")


def test_a_second_sweep_in_the_same_directory_is_refused(add, ran):
    Path("s").mkdir()
    with Path("s/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another sweep is running there"):
            sweep("a=1", "out=s")
    assert not ran and sweep("a=1", "out=s") == {}


# ----- unchanged, changed, cut off -----------------------------------------------------------


def changes() -> dict[str, Callable[[], None]]:
    """Everything that must make a cell be computed anew."""
    return {
        "a setting of the file": lambda: edit("add.yaml", "0.5", "0.75"),
        "the content of an input": lambda: edit("kb", "old", "new"),
        "the version": lambda: setattr(cell, "__version__", "9.9"),
        "the results": lambda: edit(next(Path("s").glob("cells/*/results.json")), "arms", "legs"),
        "the cell's mark": lambda: next(Path("s").glob("cells/*/cell.json")).unlink(),
    }


def edit(path: str | Path, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def is_noticed(ran: list[str], change: str) -> bool:
    """Whether a sweep that was done runs again after the change."""
    Path("kb").write_text("old")
    sweep("a=1", "kb=kb", "out=s")
    done = len(ran)
    sweep("a=1", "kb=kb", "out=s")
    assert len(ran) == done, "what is unchanged was computed again"
    changes()[change]()
    sweep("a=1", "kb=kb", "out=s")
    return len(ran) == done + 1


@pytest.mark.parametrize("change", changes())
def test_what_has_changed_is_computed_anew(add, ran, monkeypatch, change: str):
    monkeypatch.setattr(cell, "__version__", cell.__version__)  # put back afterwards
    assert is_noticed(ran, change)
    if change not in ("the results", "the cell's mark"):
        assert len(list(Path("s/cells").iterdir())) == 2  # the old result is still there


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("a setting of the file", ("FREE", (*cell.FREE, "b"))),
        ("the content of an input", ("_contents", lambda value, digests, key="": value)),
        ("the results", ("_digest", lambda path: "")),
    ],
)
def test_a_key_that_forgets_something_is_caught(add, ran, monkeypatch, change: str, fault):
    monkeypatch.setattr(cell, *fault)
    assert not is_noticed(ran, change)


def test_an_input_that_has_only_moved_is_the_same(add, ran):
    Path("kb").write_text("x")
    sweep("kb=kb", "out=s")
    Path("kb").rename("other")
    sweep("kb=other", "out=s")
    assert len(ran) == 1


def test_a_sweep_that_was_cut_off_goes_on_with_what_is_missing(add, ran, monkeypatch):
    honest = stages.run

    def cut(jobs, at_once, done):
        honest(jobs, at_once, done)
        if jobs[0].name == "a=2":
            raise Killed  # its results are there, and nothing says that they are complete

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stages, "run", cut)
        sweep("a=1,2,3", "out=s")
    assert mark(Path("s"), "a=1")["done"] and not mark(Path("s"), "a=2")["done"]
    assert [row["a"] for row in table(Path("s"))] == ["1"]
    sweep("a=1,2,3", "out=s")
    assert ran == ["a=1", "a=2", "a=2", "a=3"]
    assert [row["a"] for row in table(Path("s"))] == ["1", "2", "3"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process with its parent")
def test_a_killed_sweep_goes_on_with_what_is_missing(add, tmp_path):
    code = SWEEP.format(tree=str(tmp_path / "tree"))
    command = [sys.executable, "-c", code, "sweep", "-c", add, "a=1,2,3", "out=s"]
    Path("kill-2").touch()
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert runs(Path("s")) == {"a=1": 1, "a=2": 1}
    assert mark(Path("s"), "a=1")["done"] and not mark(Path("s"), "a=2")["done"]
    assert [row["a"] for row in table(Path("s"))] == ["1"]
    Path("kill-2").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "1 cells were done, 2 run, 0 failed" in done.stdout, done
    assert runs(Path("s")) == {"a=1": 1, "a=2": 2, "a=3": 1}
    assert [row["a"] for row in table(Path("s"))] == ["1", "2", "3"]
