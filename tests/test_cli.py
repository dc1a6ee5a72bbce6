"""The command line: what it answers, with which exit status, and how fast."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rag2 import __version__, cli, config
from rag2.cli.recipes import RECIPES
from rag2.registry import UserError

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [(group, name) for group in RECIPES for name in RECIPES[group]]


def rag2(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command, in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in words])
    status = caught.value.code
    assert isinstance(status, int)
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line on stderr of a command that ends with status 2."""
    status, out, err = rag2(capsys, *words)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, (status, err)
    return err


def test_version_and_help_succeed(capsys: pytest.CaptureFixture[str]):
    assert rag2(capsys, "--version") == (0, f"rag2 {__version__}\n", "")
    status, out, err = rag2(capsys, "--help")
    assert (status, err) == (0, "")
    assert "rag2 demo --out runs/demo" in out and {"demo", "kb", "train", "eval"} <= set(
        out.split()
    )


@pytest.mark.parametrize(
    "words",
    [
        ["demo"],
        ["sweep"],
        ["advise"],
        ["kb", "build"],
        ["kb", "list"],
        ["kb", "show"],
        ["kb", "search"],
        *(["kb", name] for name in ("add", "update", "remove", "compact", "export")),
    ],
)
def test_the_help_of_every_command_has_an_example(
    capsys: pytest.CaptureFixture[str], words: list[str]
):
    status, out, _ = rag2(capsys, *words, "--help")
    assert status == 0 and re.search(rf"Examples?:\n\s+rag2 {' '.join(words)}", out)


def test_help_loads_nothing_that_takes_seconds_to_load():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "kernels")])}
    code = (
        "import atexit, sys; from rag2.cli import main;"
        "atexit.register(lambda: print('LOADED', *sorted(sys.modules))); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], env=env, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.rsplit("LOADED", 1)[1].split())
    slow = {"torch", "transformers", "faiss", "numpy", "scipy", "pyarrow", "datasets", "peft"}
    assert "rag2.cli" in loaded and not loaded & slow, loaded & slow


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing command"),
        (["trian"], "no such command 'trian'. Did you mean 'train'?"),
        (["train"], "missing command"),
        (["train", "jont"], "Did you mean 'joint'?"),
        (["kb", "buidl"], "Did you mean 'build'?"),
        (["demo", "--sed", "3"], "no such option: --sed (Possible options: --seed)"),
        (["demo", "--seed", "x"], "'--seed'"),
        (["demo", "--seed", "-1"], "'--seed'"),
        (["demo", "extra"], "unexpected extra argument"),
        (["kb", "build"], "missing argument 'KB'"),
        (["kb", "search", "a.sqlite"], "missing argument 'query'"),
    ],
)
def test_a_mistyped_command_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    assert message in refused(capsys, *words)


# ----- recipes -------------------------------------------------------------------------------

FAKE = '''"""A recipe that tells what it was given."""
import sys
from rag2.config import Config, run

class FakeConfig(Config):
    out: str = "runs/fake"
    home: str = "runs/fake"
    seed: int = 0
    world: dict[str, int] = {}

def main(cfg):
    if cfg.seed == 13:
        raise KeyboardInterrupt
    sys.stdout.write(f"{__name__} {cfg.out!r} {cfg.seed} {cfg.world}\\n")
    assert cfg.home in ("runs/fake", cfg.out)

if __name__ == "__main__":
    run(main, FakeConfig)
'''


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with fake recipes in place of the shipped one; the current directory is elsewhere."""
    for group, name in COMMANDS:
        (tmp_path / "tree" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / group / f"{name}.py").write_text(FAKE)
    (tmp_path / "tree/configs/demo").mkdir(parents=True)
    (tmp_path / "tree/configs/demo/compare.yaml").write_text("out: from-yaml\n")
    monkeypatch.setattr(config, "SHIPPED", (tmp_path / "tree",))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "tree"


@pytest.mark.parametrize(("group", "name"), COMMANDS)
def test_a_recipe_gets_its_words_as_they_were_typed(
    shipped: Path, capsys: pytest.CaptureFixture[str], group: str, name: str
):
    words = ["seed=4", "-c", "configs/demo/compare.yaml"]
    before = list(sys.argv)
    assert rag2(capsys, group, name, *words) == (0, "__main__ 'from-yaml' 4 {}\n", "")
    assert sys.argv == before


def test_mistakes_in_a_recipe_keep_their_line_and_status(
    shipped: Path, capsys: pytest.CaptureFixture[str]
):
    assert "unknown key 'sed' for FakeConfig" in refused(capsys, "train", "joint", "sed=4")
    assert "config file 'none.yaml' not found" in refused(capsys, "eval", "mc", "-c", "none.yaml")
    assert "unknown option '--seed'" in refused(capsys, "eval", "mc", "--seed", "3")
    (shipped / "eval/mc.py").unlink()
    assert "recipe 'eval/mc.py' not found" in refused(capsys, "eval", "mc")


def test_an_interrupted_recipe_ends_with_130(shipped: Path, capsys: pytest.CaptureFixture[str]):
    assert rag2(capsys, "train", "joint", "seed=13") == (130, "", "error: interrupted\n")


def test_the_help_of_a_recipe_has_an_example_and_its_defaults(
    shipped: Path, capsys: pytest.CaptureFixture[str]
):
    status, out, err = rag2(capsys, "train", "joint", "--help")
    assert (status, err) == (0, "")
    assert "rag2 train joint -c configs/demo/joint.yaml" in out
    assert "usage: rag2 train joint [-c FILE.yaml] [key=value ...]" in out
    assert "A recipe that tells what it was given." in out and "out: runs/fake" in out


@pytest.mark.parametrize("out", ["runs/a", "12", "no", "a: b", "it's # odd", 'x"y'])
def test_demo_is_the_comparison_with_its_own_config(
    shipped: Path, capsys: pytest.CaptureFixture[str], out: str
):
    # The stages lie beside the report: the fake recipe asserts that home is out.
    told = f"__main__ {out!r} 5 {{'seed': 5}}\n"
    assert rag2(capsys, "demo", "--out", out, "--seed", 5) == (0, told, "")


# ----- knowledge base ------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """A small tokenizer, trained on the spot."""
    from rag2.generator.bpe import train_bpe

    train_bpe(["The ferry to Aldbrook leaves at noon."] * 3, 300).save_pretrained(
        str(tmp_path / "tokenizer")
    )
    return str(tmp_path / "tokenizer")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    rows = [
        {"id": "ferry", "title": "Ferry", "text": "The ferry to Aldbrook leaves at noon."},
        {"id": "baker", "title": "Baker", "text": "The baker sells rye bread on Mondays."},
        {"id": "hollow", "title": "Hollow", "text": ""},
    ]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    return path


def test_a_knowledge_base_is_built_listed_shown_and_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: str, documents: Path
):
    path = tmp_path / "kb.sqlite"
    status, out, err = rag2(capsys, "kb", "build", path, documents, "--tokenizer", tokenizer)
    assert status == 0 and "2 accepted + 2 rejected = 4 documents" in out
    assert err.count("rejected ") == 2
    status, out, _ = rag2(capsys, "kb", "list", path)
    assert status == 0 and {line.split("\t")[0] for line in out.splitlines()} == {"ferry", "baker"}
    status, out, _ = rag2(capsys, "kb", "show", path, "baker")
    assert status == 0 and "The baker sells rye bread on Mondays." in out
    assert "Did you mean 'baker'?" in refused(capsys, "kb", "show", path, "bakr")
    status, out, _ = rag2(capsys, "kb", "search", path, "when does the ferry leave?", "-k", 1)
    assert status == 0 and out.count("\n") == 1 and out.split("\t")[2] == "ferry"


def test_a_knowledge_base_is_built_without_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], documents: Path
):
    path = tmp_path / "kb.sqlite"
    words = ["--tokens", 5, "--overlap", 0]
    status, out, _ = rag2(capsys, "kb", "build", path, documents, *words)
    assert status == 0 and "2 accepted + 2 rejected = 4 documents\n4 chunks" in out
    status, out, _ = rag2(capsys, "kb", "show", path, "ferry")
    assert "The ferry to Aldbrook leaves\n" in out and "\nat noon.\n" in out
    assert "words" in rag2(capsys, "kb", "build", "--help")[1]


def test_strict_or_empty_builds_end_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: str, documents: Path
):
    words = ["--tokenizer", tokenizer, "--strict"]
    status, out, err = rag2(capsys, "kb", "build", tmp_path / "a.sqlite", documents, *words)
    assert status == 2 and "2 accepted + 2 rejected = 4" in out
    assert "error: 2 documents were rejected (--strict)" in err.splitlines()[-1]
    assert err.endswith(" was not written\n") and not list(tmp_path.glob("*.sqlite*"))
    (tmp_path / "bad.jsonl").write_text("{}\n")
    words = [tmp_path / "bad.jsonl", "--tokenizer", tokenizer]
    status, out, err = rag2(capsys, "kb", "build", tmp_path / "b.sqlite", *words)
    assert status == 2 and "error:" in err and not (tmp_path / "b.sqlite").exists()


def test_impossible_chunk_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: str, documents: Path
):
    words = ["--tokenizer", tokenizer, "--tokens", 8, "--overlap", 8]
    assert "overlap=8 must be less" in refused(capsys, "kb", "build", "a", documents, *words)
    for unknown in (tmp_path / "none", ""):
        words = ["--tokenizer", unknown]
        told = refused(capsys, "kb", "build", tmp_path / "a", documents, *words)
        assert str(unknown or "not set") in told


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["show", "x"],
        ["search", "x"],
        ["add", "x.md"],
        ["update", "x.md"],
        ["remove", "x"],
        ["compact"],
        ["export", "x.jsonl"],
    ],
)
def test_a_missing_knowledge_base_is_a_users_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
):
    path = tmp_path / "none.sqlite"
    assert "none.sqlite" in refused(capsys, "kb", words[0], path, *words[1:])
    assert not path.exists()


# ----- how main ends -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: [Errno 13] Permission denied"),
    ],
)
def test_main_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    line: str,
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "run_recipe", fail)
    ended, _, err = rag2(capsys, "demo")
    assert ended == status and err.startswith(line) and err.count("\n") == 1


def test_main_does_not_hide_faults_of_the_program(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise ValueError("bug")

    monkeypatch.setattr(cli, "run_recipe", fail)
    with pytest.raises(ValueError, match="bug"):
        cli.main(["demo"])
