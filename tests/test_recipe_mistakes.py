"""What a user does wrong with a recipe is answered in one line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rag2 import cli, config
from rag2.kb.store import KnowledgeBase
from rag2.types import Chunk
from small_runs import settings


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., str]:
    """Runs a command that must fail; returns its one line. It leaves nothing in `out`."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        out = tmp_path / "out"
        with pytest.raises(SystemExit) as caught:
            cli.main([*words, f"out={out}"])
        shown = capsys.readouterr()
        assert caught.value.code == 2, shown.err
        lines = [line for line in shown.err.splitlines() if line.strip()]
        assert lines and lines[-1].startswith("error: "), shown.err
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert "Traceback" not in shown.err + shown.out
        assert not out.exists(), sorted(out.rglob("*"))
        return lines[-1]

    return run


def command(kind: str, home: Path, **changes: Any) -> list[str]:
    """The command line of a recipe's run with small settings."""
    return ["train", kind] + [
        f"{key}={json.dumps(value)}" for key, value in (settings(kind, home) | changes).items()
    ]


def test_a_typo_in_a_key_is_answered_with_the_nearest_key(
    refused: Callable[..., str], home: Path, tmp_path: Path
):
    assert "batch_sise" in (line := refused(*command("joint", home, batch_sise=3)))
    assert "batch_size" in line
    line = refused(*command("joint", home), "candidates.dence=3")
    assert "candidates.dence" in line and "dense" in line
    (tmp_path / "mine.yaml").write_text("stepz: 3\n")
    assert "steps" in refused("train", "pretrain", "-c", "mine.yaml")
    assert "two_pass" in refused(*command("joint", home, step="two_pas"))


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("joint", "kb"),
        ("joint", "questions"),
        ("joint", "generator"),
        ("joint", "retriever"),
        ("retriever", "kb"),
        ("retriever", "questions"),
        ("retriever", "tokenizer"),
        ("finetune", "generator"),
        ("finetune", "kb"),
        ("finetune", "paraphrases"),
        ("pretrain", "corpus"),
        ("pretrain", "tokenizer"),
    ],
)
def test_a_missing_file_is_named(refused: Callable[..., str], home: Path, kind: str, key: str):
    line = refused(*command(kind, home, **{key: "nowhere/at-all/x"}))
    assert "nowhere/at-all/x" in line


@pytest.mark.parametrize(
    ("kind", "key"), [("joint", "kb"), ("finetune", "generator"), ("pretrain", "corpus")]
)
def test_an_input_that_is_not_given_is_named(
    refused: Callable[..., str], home: Path, kind: str, key: str
):
    assert f"{key} is not given" in refused(*command(kind, home, **{key: None}))


def test_an_empty_corpus_is_named(refused: Callable[..., str], home: Path, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl: no rows" in refused(*command("pretrain", home, corpus="empty.jsonl"))
    empty = tmp_path / "empty.sqlite"
    KnowledgeBase(empty, create=True).close()
    for kind in ("joint", "retriever", "finetune"):
        line = refused(*command(kind, home, kb=str(empty)))
        assert "empty.sqlite" in line or "0 chunks" in line, line


def test_a_question_without_choices_is_named_by_file_and_line(
    refused: Callable[..., str], home: Path, tmp_path: Path
):
    good = {"id": "a", "question": "Who?", "choices": ["x", "y"], "answer": 0, "split": "train"}
    bad = {"id": "b", "question": "Who?", "split": "train"}
    rows = [json.dumps(good), json.dumps(bad)]
    (tmp_path / "q.jsonl").write_text("\n".join(rows) + "\n")
    for words in (
        command("joint", home, questions="q.jsonl"),
        command("finetune", home, questions="q.jsonl", objective="supervised"),
        ["eval", "mc", f"generator={home / 'generator'}", "questions=q.jsonl"],
    ):
        assert "q.jsonl:2" in refused(*words)


@pytest.mark.parametrize("inside", ["", "/a"])
def test_an_out_that_is_a_file_is_refused_before_anything_is_loaded(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], inside: str
):
    (tmp_path / "notes").write_text("mine")
    words = command("joint", home, generator="/nowhere", out=f"{tmp_path}/notes{inside}")
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert capsys.readouterr().err.endswith("notes is a file; choose another out=\n")


def test_a_k_larger_than_the_corpus_is_refused(
    refused: Callable[..., str], home: Path, chunks: list[Chunk]
):
    count = len(chunks)
    line = refused(*command("joint", home, candidates={"dense": 2000, "bm25": 0, "random": 0}))
    assert "K = 2000" in line and f"{count} chunks" in line
    recall = ["eval", "recall", f"retriever={home / 'retriever'}", "split=test", "ks=[1,5000]"]
    data = home / "data"
    line = refused(*recall, f"kb={data / 'kb.sqlite'}", f"questions={data / 'questions.jsonl'}")
    assert "5000" in line and str(count) in line


def test_a_mistake_ends_a_process_with_status_two_and_one_line(home: Path, tmp_path: Path):
    import os
    import subprocess

    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root / "kernels")])}
    words = command("joint", home, kb="nowhere.sqlite")[2:]
    done = subprocess.run(
        [sys.executable, str(config.recipe("train/joint.py")), *words, "out=out"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "nowhere.sqlite" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stdout == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "setting", "named"),
    [
        ("retriever", "pairs.words=[12,4]", "the fewest are more than the most"),
        ("retriever", "pairs.words=[0,4]", "words"),
        ("retriever", "pairs=question", "questions"),
        ("retriever", "log_with=[trakio]", "'trackio'"),
        ("joint", "seed=-1", "seed"),
        ("joint", "betas=[1.5,2]", "betas"),
        ("joint", "jobs=0", "jobs"),
        ("joint", "device=mps", "allowed: cpu, cuda, cuda:N"),
        ("finetune", "device=meta", "allowed: cpu, cuda, cuda:N"),
        ("pretrain", "text_weight=0", "text_weight"),
    ],
)
def test_a_number_or_a_name_out_of_range_is_named(
    refused: Callable[..., str], home: Path, kind: str, setting: str, named: str
):
    assert named in refused(*command(kind, home), setting)


def test_an_evaluation_of_nothing_is_refused(refused: Callable[..., str], home: Path):
    questions = f"questions={home / 'data' / 'questions.jsonl'}"
    model = f"generator={home / 'generator'}"
    assert "budget" in refused("eval", "mc", model, questions, "budget=0")
    assert "arms" in refused("eval", "compare", "world=almanac", "arms=[]")


@pytest.mark.parametrize(
    ("key", "kind", "row", "named"),
    [
        ("corpus", "pretrain", '{"title": 1, "text": "x", "qa": []}', ":1: a row needs title"),
        ("corpus", "pretrain", '{"title": "", "text": "x", "qa": 3}', ":1: 'qa' must be a list"),
        ("corpus", "pretrain", '{"title": "", "text": "x", "qa": [["q"]]}', ":1: 'qa' must be"),
        ("paraphrases", "finetune", '{"text": "x"}', ":1: a row needs title and text"),
        ("paraphrases", "finetune", "{bad", ":1: "),
        ("questions", "joint", '{"id": "a", "question": "caf\\ud83d?"}', ":1: half of a surrogate"),
        ("questions", "joint", '{"id": ' + "1" * 5000 + "}", ":1: "),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(
    refused: Callable[..., str],
    home: Path,
    tmp_path: Path,
    key: str,
    kind: str,
    row: str,
    named: str,
):
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    assert f"rows.jsonl{named}" in refused(*command(kind, home, **{key: "rows.jsonl"}))


def test_a_template_that_was_not_filled_in_is_named(refused: Callable[..., str], tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("steps: 3\nhome: {{ HOME }}\n")
    line = refused("train", "pretrain", "-c", "mine.yaml")
    assert "mine.yaml, line 2: a key must be a plain word" in line


def test_validation_questions_without_evidence_cannot_stop_a_warm_start(
    refused: Callable[..., str], home: Path, tmp_path: Path
):
    questions = (home / "data" / "questions.jsonl").read_text().splitlines()
    rows = [json.dumps(json.loads(line) | {"evidence": []}) for line in questions]
    (tmp_path / "q.jsonl").write_text("\n".join(rows) + "\n")
    line = refused(*command("retriever", home, questions="q.jsonl"))
    assert "no validation question names evidence" in line


def test_a_row_longer_than_the_network_is_refused_before_the_first_step(
    refused: Callable[..., str], home: Path
):
    network = settings("pretrain", home)["network"] | {"max_positions": 24}
    line = refused(*command("pretrain", home, network=network))
    assert "pretrain.jsonl:" in line and "positions for 24: raise network.max_positions" in line
