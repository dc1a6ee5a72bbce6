"""`rag2 serve` as a process: signals, kills, artefacts that are broken."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import exports
from rag2.evaluation.questions import load_questions
from server_process import ServerProcess
from storm_ends import killed, terminated
from wire import asked, chat, exchange


@pytest.fixture(scope="module")
def export(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models, exported."""
    return exports.exported(home, tmp_path_factory.mktemp("served")).directory


@pytest.fixture
def questions(home: Path) -> list[str]:
    """The small world's."""
    return [q.question for q in load_questions(home / "data" / "questions.jsonl")]


@pytest.mark.slow
def test_a_broken_export_is_never_served(export: Path, tmp_path: Path, dice):
    files = sorted(path for path in export.rglob("*") if path.is_file())
    for number in range(2):
        broken = exports.hostile(export, tmp_path / f"{number}", lambda _: None, seal=False)
        target = broken / dice.choice(files).relative_to(export)
        data = bytearray(target.read_bytes())
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        target.write_bytes(data)
        command = [sys.executable, "-m", "rag2", "serve", str(broken), "--port", "0"]
        command += ["--state", str(tmp_path / "state")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 2 and "ready" not in ended.stdout
        (line,) = ended.stderr.strip().splitlines()
        assert line.startswith("error: ") and target.name in line or "manifest" in line


@pytest.mark.slow
def test_sigterm_under_load_answers_what_was_taken(
    export: Path, tmp_path: Path, questions: list[str], seed: int
):
    for number in range(2):
        told = terminated(export, tmp_path / "state", questions, seed + number)
        assert not told["wrong"] and told["unready"] < 1
    told = terminated(export, tmp_path / "state", questions, seed, fault="abrupt")
    assert told["wrong"]


@pytest.mark.slow
def test_edits_that_were_told_outlive_sigkill(export: Path, tmp_path: Path, seed: int):
    told = killed(export, tmp_path / "state", 2, seed)
    assert not told["wrong"] and told["edits"] > 4


@pytest.mark.slow
def test_a_process_whose_engine_crashed_ends_with_1(export: Path, tmp_path: Path):
    with ServerProcess(export, tmp_path / "state", fault="asleep").ready() as server:
        got = exchange(server.address, chat("crash here"))
        assert got is not None and got.status == 500
        assert server.process.wait(30) == 1 and "the engine crashed" in server.logged()
    limits = "stuck_seconds=1"
    with ServerProcess(export, tmp_path / "state", fault="asleep", limits=limits).ready() as server:
        got = exchange(server.address, chat("hang here"))
        assert got is not None and got.status == 500
        assert server.process.wait(30) == 1 and "has not moved" in server.logged()


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(export: Path, tmp_path: Path):
    with ServerProcess(export, tmp_path / "state").ready() as server:
        assert asked(server.address, "GET", "/ready").status == 200
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.end() == 0
