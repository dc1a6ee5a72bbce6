"""The benchmark of the kernels: complete tables, planted faults, work that is counted right."""

import csv
import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rag2_kernels

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
# In this process kernels are interpreted or not, whatever the tiny suite would like.
POOL = ["--suite", "tiny", "--op", "masked_mean_pool", "--impl", "torch", "--rounds", "1"]
POOL += ["--dtype", "fp32"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of kernels/bench."""
    monkeypatch.syspath_prepend(KERNELS / "bench")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # run.py sets it; this takes it back
    names = ("bench_linear", "block", "measure", "op", "ops", "run")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def rows_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "bench.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_tiny_suite_tells_every_operation_and_every_provider_of_ours_matches(tmp_path):
    command = [sys.executable, KERNELS / "bench/run.py", "--suite", "tiny", "--rounds", "1"]
    environment = os.environ | {"PYTHONPATH": str(KERNELS), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*command, "--out", tmp_path], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_in(tmp_path)
    names = {"marginal_nll", "answer_logprob", "rag_loss", "mips_topk", "info_nce"}
    assert {row["op"] for row in rows} == names | {"masked_mean_pool"}
    for name in {row["op"] for row in rows}:
        for provider in ("plain", "rag2_torch", "rag2_triton"):
            mine = [r for r in rows if (r["op"], r["provider"]) == (name, provider)]
            assert mine and all(row["match"] == "True" for row in mine), (name, provider)
            assert provider == "plain" or all(row["twice_equal"] == "True" for row in mine)
            timed = [row for row in mine if row["p50_ms"]]
            assert timed and all(float(row["p50_ms"]) > 0 for row in timed), (name, provider)
            assert all(row[key] for row in timed for key in ("of_plain", "peak_mib", "tflops"))
            assert all("torch 2" in row["versions"] and row["device"] for row in mine)
    report = (tmp_path / "bench.md").read_text()
    assert all(f"## {name}\n" in report for name in names)
    assert "Wrong rows of rag2: 0." in report
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    left_over = [row for row in rows if not row["match"] and not row["note"]]
    assert not left_over  # every row has been checked, or says why not


def test_a_result_that_is_slightly_wrong_is_seen_and_ends_in_status_1(
    bench, tmp_path, monkeypatch, capsys
):
    providers = bench.ops.OPS["masked_mean_pool"].providers
    right = providers["rag2_torch"]

    def wrong(given, case):
        return (right.call(given, case)[0] * (1 + 3e-6),)

    monkeypatch.setitem(providers, "rag2_torch", replace(right, call=wrong))
    assert bench.run.main([*POOL, "--out", str(tmp_path)]) == 1
    match = {row["provider"]: row["match"] for row in rows_in(tmp_path)}
    assert match == {"rag2_torch": "False", "plain": "True", "compiled": "True"}
    assert "WRONG masked_mean_pool" in capsys.readouterr().out


def test_a_result_that_is_not_the_same_twice_ends_in_status_1(bench, tmp_path, monkeypatch):
    providers = bench.ops.OPS["masked_mean_pool"].providers
    right, calls = providers["rag2_torch"], []

    def unsteady(given, case):
        calls.append(case)
        return (right.call(given, case)[0] * (1 + 2.0**-23 * (len(calls) % 2)),)

    monkeypatch.setitem(providers, "rag2_torch", replace(right, call=unsteady))
    assert bench.run.main([*POOL, "--out", str(tmp_path)]) == 1
    (row,) = (row for row in rows_in(tmp_path) if row["provider"] == "rag2_torch")
    assert (row["match"], row["twice_equal"]) == ("True", "False")


def test_a_provider_that_fails_or_is_missing_is_told_and_the_others_go_on(
    bench, tmp_path, monkeypatch
):
    providers = bench.ops.OPS["masked_mean_pool"].providers

    def broken(given, case):
        raise RuntimeError("two\nlines")

    monkeypatch.setitem(providers, "peer", bench.op.Provider(broken))
    monkeypatch.setitem(providers, "other", bench.op.Provider(broken, ("no_such_package",)))
    assert bench.run.main([*POOL, "--out", str(tmp_path)]) == 0
    rows = {row["provider"]: row for row in rows_in(tmp_path)}
    assert rows["peer"]["note"] == "failed: RuntimeError: two lines"
    assert rows["other"]["note"] == "not installed: no-such-package"
    assert rows["rag2_torch"]["match"] == "True"


def test_when_the_time_is_used_up_what_is_left_is_listed(bench, tmp_path):
    assert bench.run.main(["--suite", "tiny", "--seconds", "1e-6", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path)
    assert {row["note"] for row in rows} == {"not run: time"}
    assert {row["op"] for row in rows} == set(bench.ops.OPS)


def test_a_lost_device_ends_the_process_and_a_new_one_goes_on_behind_the_row(
    bench, tmp_path, monkeypatch
):
    started = []

    def lost(op, case, setting, done):
        row = bench.block.empty_row(op, case, "rag2_torch", setting, "failed: RuntimeError: CUDA")
        raise bench.block.DeviceLost(row)

    def execute(program, words):
        started.append(words)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execute)
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(bench.block, "rows_of", lost)
        bench.run.main([*POOL, "--out", str(tmp_path)])
    ((_, script, *words),) = started
    assert script == bench.run.__file__ and "--resume" in words
    assert bench.run.main(words) == 1  # the row that lost the device stays, and counts
    told = [(row["provider"], row["note"], row["match"]) for row in rows_in(tmp_path)]
    assert told[0] == ("rag2_torch", "failed: RuntimeError: CUDA", "")
    assert sorted(told[1:]) == [("compiled", "", "True"), ("plain", "", "True")]


@pytest.mark.parametrize(
    "words, told",
    [
        (["--op", "rag_los"], "run.py: --op rag_los: no such operation; nearest: rag_loss"),
        (["--suite", "gpu2"], "invalid choice: 'gpu2'"),
        (["--rounds", "0"], "0 is not at least 1"),
        (["--seconds", "-1"], "-1 is not a positive number"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_one_line_and_status_2(bench, words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.run.main(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and told in error and error.count("\n") == 1, error


def test_operations_bytes_and_floors_are_those_counted_by_hand(bench):
    ops, case = bench.ops.OPS, bench.op.Case
    half = {"dtype": torch.bfloat16}
    rows = case({"B": 2, "K": 4, "T": 8, "H": 16, "V": 100}, **half, backward=True, f=0.25)
    # 64 rows: 2 M H V = 204,800 forward; 4 f M H V = 102,400 backward.
    assert ops["rag_loss"].flops(rows) == 307_200
    # (64 + 100) x 16 numbers of 2 bytes, in and out; a label and a log-probability a row.
    assert ops["rag_loss"].moved(rows) == 2 * 164 * 16 * 2 + 64 * 12
    head = case({"M": 10, "H": 3, "V": 7}, **half)
    assert ops["answer_logprob"].flops(head) == 2 * 10 * 3 * 7
    search = case({"B": 1, "N": 1_000_000, "D": 768, "K": 10}, **half)
    assert ops["mips_topk"].flops(search) == 2 * 768e6
    # One query reads the corpus: 1.536 GB at 4.3 TB/s.
    assert ops["mips_topk"].floor_s(search) == pytest.approx(0.357e-3, rel=0.01)
    pairs = case({"B": 32_768, "N": 65_536, "D": 768}, **half, backward=True)
    # 6 B N D = 9.9e12 at 790 TFLOP/s.
    assert ops["info_nce"].floor_s(pairs) == pytest.approx(12.53e-3, rel=0.01)
    texts = case({"B": 2, "L": 3, "H": 5}, **half, backward=True)
    assert ops["masked_mean_pool"].moved(texts) == 2 * 30 * 2 + 6 + 10 * 4
    answers = case({"B": 2, "K": 3, "T": 5})
    assert ops["marginal_nll"].flops(answers) == 30
    assert ops["marginal_nll"].moved(answers) == 6 * 6 * 4 + 30 + 2 * 4 * 4


@pytest.mark.parametrize("f", [1.0, 5 / 16])
def test_the_share_of_rows_that_carry_posterior_is_the_one_that_the_table_tells(bench, f):
    case = bench.op.Case(
        {"B": 32, "K": 16, "T": 32, "H": 16, "V": 50}, torch.bfloat16, backward=True, f=f
    )
    given = bench.bench_linear.make_rows(case, torch.device("cpu"))
    rows = (given[name] for name in ("hidden", "weight", "labels", "pair", "scores"))
    done = rag2_kernels.rag_loss(*rows, skip_below=bench.bench_linear.SKIPPED, impl="torch")
    assert float(done.kept) == f


def test_the_truth_is_the_same_whether_it_is_computed_at_once_or_in_blocks(bench, monkeypatch):
    def sevens(rows, *_):
        return [slice(at, at + 7) for at in range(0, rows, 7)]

    host = torch.device("cpu")
    for name in ("rag_loss", "mips_topk", "info_nce"):
        op = bench.ops.OPS[name]
        case = op.suites["tiny"][0]
        given = op.make(case, host)
        whole = bench.measure.truth_of(op, case, given)
        modules = ("logps", "bench_search", "bench_contrast")
        with monkeypatch.context() as patched:
            for module in map(importlib.import_module, modules):
                patched.setattr(module, "blocks", sevens)
            pieces = bench.measure.truth_of(op, case, given)
        for a, b in zip(whole, pieces, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_on_the_cpu_suite_memory_is_measured_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, KERNELS / "bench/run.py", "--op", "info_nce", "masked_mean_pool"]
    few = ["--rounds", "1", "--threads", "1", "--out", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(KERNELS)}
    done = subprocess.run([*command, *few], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["op"], row["provider"]): row for row in rows_in(tmp_path)}
    # Three matrices of 512 x 2048 in fp32 are alive at once: products, scaled ones and a gradient.
    assert 11 < float(rows["info_nce", "plain"]["peak_mib"]) < 14
    # The masked states are gone when their gradient, which does not count, takes their place.
    assert float(rows["masked_mean_pool", "plain"]["peak_mib"]) < 1
