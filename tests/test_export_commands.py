"""`rag2 export`: what it says, and the one line with which it refuses a mistake."""

import json
import shutil
from pathlib import Path

import pytest

import small_runs
from exports import exported, parts
from rag2.answering.exported import Exported
from rag2.cli import main
from rag2.export import beside
from rag2.registry import UserError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, home: Path, recipe: small_runs.Load) -> Path:
    """A home with a joint run, a run that was cut off and one that trained no retriever."""
    demo = tmp_path_factory.mktemp("demo")
    small_runs.start(recipe, "joint", home, demo / "joint", steps=1)
    small_runs.start(recipe, "finetune", home, demo / "ft", steps=1)
    shutil.copytree(demo / "joint", demo / "unfinished")
    shutil.rmtree(demo / "unfinished" / "final")
    return demo


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit status and what was said."""
    with pytest.raises(SystemExit) as caught:
        main(["export", *map(str, words)])
    said = capsys.readouterr()
    return int(caught.value.code or 0), (said.out + said.err).strip()


@pytest.mark.parametrize("named", ["", "joint", "joint/final"])
def test_a_demo_its_joint_run_and_the_final_of_that_give_the_same_export(
    tmp_path: Path, demo: Path, named: str, capsys: pytest.CaptureFixture[str]
):
    code, said = run(capsys, demo / named, tmp_path / "out", "--index", "torch")
    assert code == 0, said
    assert "k=8 temperature=1 reading=marginal (not chosen on validation)" in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    folders = {"generator", "retriever", "index", "tokenizer"}
    assert names == folders | {"manifest.json", "kb.sqlite", "prompt.json", "README.md"}


def test_settings_of_the_command_line_win(
    tmp_path: Path, demo: Path, capsys: pytest.CaptureFixture[str]
):
    words = ("--k", 2, "--temperature", 0.25, "--reading", "concat", "--index", "torch")
    code, _ = run(capsys, demo / "joint", tmp_path / "out", *words)
    settings = Exported.open(tmp_path / "out").settings
    assert code == 0
    assert (settings.k, settings.temperature, settings.reading) == (2, 0.25, "concat")


def test_a_system_from_elsewhere_is_put_together(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
):
    source = parts(home, tmp_path)
    words = (source.retriever, source.generator, source.kb, tmp_path / "out", "--k", 3)
    code, said = run(capsys, "--from", *words, "--index", "torch")
    assert code == 0 and "k=3" in said
    assert "They come from elsewhere" in (tmp_path / "out" / "README.md").read_text()
    assert Exported.open(tmp_path / "out").settings.k == 3


MISTAKES = [
    (("{demo}/joimt", "{out}"), "does not exist. Did you mean 'joint'?"),
    (("{demo}/unfinished", "{out}"), "is not finished: it has no final/"),
    (("{demo}/ft", "{out}"), "trained no retriever: an export is of a joint run"),
    (("{home}/data", "{out}"), "is no run directory"),
    (("{demo}/joint", "{demo}/ft"), "exists already"),
    (("{demo}/joint",), "1 paths instead of 2: rag2 export RUN OUT"),
    (("--from", "a", "b", "{out}"), "rag2 export --from RETRIEVER GENERATOR KB OUT"),
    (("{demo}/joint", "{out}", "--adapters", "marge"), "Did you mean 'merge'?"),
    (("{demo}/joint", "{out}", "--reading", "tokens"), "Did you mean 'token'?"),
    (("{demo}/joint", "{out}", "--index", "flatt"), "Did you mean 'flat'?"),
    (("{demo}/joint", "{out}", "--index", "milvus"), "allowed in an export: flat, ivf, hnsw"),
    (("{demo}/joint", "{out}", "--k", "0"), "k"),
    (("{demo}/joint", "{out}", "--temperature", "-1"), "temperature"),
    (("{demo}/joint", "{out}", "--results", "{demo}"), "there is no results.json"),
    (("{demo}/joint", "{out}", "--resluts", "x"), "--results"),
    (("--from", "x", "{home}/generator", "{home}/data/kb.sqlite", "{out}"), "is not a folder"),
    (
        ("--from", "{home}/data", "{home}/generator", "{home}/data/kb.sqlite", "{out}"),
        "the folder has no config.json",
    ),
    (
        ("--from", "{home}/retriever", "{home}/retriever", "{home}/data/kb.sqlite", "{out}"),
        "generator",
    ),
    (("--from", "{home}/retriever", "{home}/generator", "{out}.sqlite", "{out}"), "does not exist"),
]


@pytest.mark.parametrize(("words", "reason"), MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    demo: Path,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    reason: str,
):
    out = tmp_path / "out"
    code, said = run(capsys, *(w.format(demo=demo, home=home, out=out) for w in words))
    assert code == 2 and reason in said
    assert said.startswith("error: ") and len(said.splitlines()) == 1, said
    assert not list(tmp_path.iterdir())


def test_a_knowledge_base_that_is_gone_is_named(
    tmp_path: Path, demo: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = shutil.copytree(demo / "joint", tmp_path / "joint")
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("/kb.sqlite", "/gone.sqlite"))
    code, said = run(capsys, run_dir, tmp_path / "out")
    assert code == 2 and "gone.sqlite' does not exist" in said


def test_a_damaged_run_is_refused(tmp_path: Path, demo: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = shutil.copytree(demo / "joint", tmp_path / "joint")
    prompt = run_dir / "final" / "prompt.json"
    prompt.write_text(json.dumps(json.loads(prompt.read_text()) | {"budget": 5}))
    code, said = run(capsys, run_dir, tmp_path / "out")
    assert code == 2 and "is damaged: file 'prompt.json'" in said


@pytest.mark.parametrize("name", ["kb.sqlite", "prompt.json"])
def test_an_export_that_lacks_a_file_is_told_which(tmp_path: Path, home: Path, name: str):
    directory = exported(home, tmp_path).directory
    (directory / name).unlink()
    with pytest.raises(UserError, match=name):
        Exported.open(beside.exported(directory, print))
