"""How fast choices are scored, against lm-evaluation-harness at its fastest, in one process.

rag2 eval speed out=runs/speed
rag2 eval speed questions=16 rounds=3 out=runs/speed-small
"""

import json
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from rich.console import Console
from rich.table import Table

from rag2 import config
from rag2.evaluation import place
from rag2.evaluation.environment import environment
from rag2.evaluation.workload import Case, Cost, Writer, cases
from rag2.generator.bpe import train_bpe
from rag2.generator.choices import score_choices
from rag2.generator.load import Generator, build_llama
from rag2.generator.pairs import encode_pairs
from rag2.registry import UserError

SHAPE: dict[str, Any] = {
    "hidden": 256,
    "layers": 8,
    "heads": 8,
    "intermediate": 704,
    "max_positions": 2048,
}
VOCABULARY = 8192  # a quarter of the weights is the head's, as in Qwen3-0.6B
# On a CPU lm-evaluation-harness's "auto" always finds its ceiling of 64; it is timed as 64, without
# the minutes that finding out takes it.
BATCHES = (1, 8, 32, 64)


class SpeedConfig(config.Config):
    """A random Llama of 8.5 million parameters on made-up questions."""

    out: str = "runs/speed"
    seed: int = 0
    questions: PositiveInt = 24
    """questions of each case; a third of them where contexts are long"""
    rounds: PositiveInt = 5
    """alternations of the two sides; the median ratio counts"""
    threads: PositiveInt = 1
    """of torch, for both sides"""


def main(cfg: SpeedConfig) -> dict:
    """Time every case; writes speed.json."""
    place.check(cfg)
    harness = _harness()
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    writer = Writer(cfg.seed)
    # The words of prompts too, so that a letter after a space is one token, as in real ones.
    frames = ["\nA. B. C. D.\nQuestion: ?\nAnswer: A B C D\n\n"] * 1200
    tokenizer = train_bpe([writer.words(50, 50) + frame for frame in frames], VOCABULARY)
    generator = build_llama(tokenizer, **SHAPE)
    parameters = sum(p.numel() for p in generator.model.parameters())
    head = generator.model.get_output_embeddings().weight.numel()
    cost = Cost(parameters - head, head, SHAPE["layers"] * SHAPE["hidden"])
    rows = []
    for case in cases(cfg.seed, cfg.questions, tokenizer):
        rows.append(measure(case, generator, cost, harness, cfg.rounds))
        Console().print(table(rows[-1:]))
    results = {
        "parameters": parameters,
        **cfg.model_dump(exclude={"out"}),
        "environment": environment(),
        "cases": rows,
    }
    with place.claimed(cfg) as out:
        (out / "speed.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console().print(table(rows))
    return results


def measure(case: Case, generator: Generator, cost: Cost, harness: Any, rounds: int) -> dict:
    """Both sides on the same requests, alternating; a faster side that is wrong is an error."""
    model, tokenizer = generator.model, generator.tokenizer
    sides = {size: harness(generator, case.texts, size) for size in BATCHES}

    def ours() -> list[float]:
        scores = score_choices(model, tokenizer, case.contexts, case.continuations)
        return [score for choices in scores for score in choices]

    seconds, memory, expected = {}, {}, []
    for size, theirs in sides.items():
        expected, seconds[size], memory[size] = timed(theirs)
    best = min(BATCHES, key=lambda size: seconds[size])
    got, _, _ = timed(ours)  # warm, as the other side is by now
    error = max(abs(a - b) for a, b in zip(got, expected, strict=True))
    assert error < 1e-3, f"{case.name}: the two sides differ by {error}"
    mine, other = [], []
    for _ in range(rounds):
        mine.append(timed(ours)[1:])
        other.append(timed(sides[best])[1:])
    ratios = [b[0] / a[0] for a, b in zip(mine, other, strict=True)]
    pairs = encode_pairs(tokenizer, case.texts)
    return {
        "case": case.name,
        "requests": len(pairs),
        "tokens_per_request": round(statistics.mean(len(a) + len(b) for a, b in pairs), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "aim": case.aim,
        "flop_ratio": round(cost.in_full(pairs) / cost.shared(pairs), 2),
        "seconds": round(statistics.median(t for t, _ in mine), 3),
        "lm_eval_seconds": round(statistics.median(t for t, _ in other), 3),
        "lm_eval_batch": best,
        "lm_eval_seconds_by_batch": {str(size): round(t, 3) for size, t in seconds.items()},
        "peak_mb": max(m for _, m in mine),
        "lm_eval_peak_mb": max(m for _, m in other),
        "largest_difference": error,
    }


def timed(run: Callable[[], list[float]]) -> tuple[list[float], float, float]:
    """The scores, wall seconds, and how many MB the process grew by at most on the way."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, began = _resident("VmRSS"), time.perf_counter()
    scores = run()
    seconds = time.perf_counter() - began
    return scores, seconds, round(_resident("VmHWM") - before, 1)


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def _harness() -> Callable[[Generator, list[tuple[str, str]], int], Callable]:
    """(generator, requests, batch size) -> lm-evaluation-harness's run of them, its cache on."""
    try:
        instance: Any = import_module("lm_eval.api.instance").Instance
        hflm: Any = import_module("lm_eval.models.huggingface").HFLM
    except ImportError:
        raise UserError("eval speed measures against lm-eval: pip install 'rag2[lmeval]'") from None

    def side(generator: Generator, texts: list[tuple[str, str]], size: int) -> Callable:
        lm = hflm(
            pretrained=generator.model,
            tokenizer=generator.tokenizer,
            batch_size=size,
            device="cpu",
            logits_cache=True,
        )
        requests = [instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)]
        return lambda: [logp for logp, _ in lm.loglikelihood(requests, disable_tqdm=True)]

    return side


def table(rows: list[dict]) -> Table:
    """Speed-ups beside their limits."""
    shown = Table(title="scoring choices, against lm-evaluation-harness at its fastest")
    for column in (
        "case",
        "times faster",
        "aim",
        "limit by FLOPs",
        "s",
        "lm-eval s",
        "MB",
        "lm-eval MB",
    ):
        shown.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        low, high = row["ratio_range"]
        shown.add_row(
            row["case"],
            f"{row['ratio']} [{low}, {high}]",
            f"{row['aim']}",
            f"{row['flop_ratio']}",
            f"{row['seconds']}",
            f"{row['lm_eval_seconds']} (batch {row['lm_eval_batch']})",
            f"{row['peak_mb']:.0f}",
            f"{row['lm_eval_peak_mb']:.0f}",
        )
    return shown


if __name__ == "__main__":
    config.run(main, SpeedConfig)
