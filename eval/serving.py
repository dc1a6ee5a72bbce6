"""The same checkpoint served by rag2 and naively -> requests a second and latency, side by side.

rag2 eval serving export=exports/almanac questions=runs/demo/data/questions.jsonl out=runs/serving
rag2 eval serving export=exports/almanac questions=q.jsonl concurrency=[8] max_new_tokens=64

The naive server is what a first version of one looks like: FastAPI, one request after the other,
transformers' `generate` for the prompts of one question, faiss' flat index. Reading `marginal` it
does RAG-Sequence as transformers' own class does: an answer for each chunk, every answer scored
with every chunk. Each server has a core of its own, and the client another.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from rich.console import Console
from rich.table import Table

from rag2 import config
from rag2.answering.exported import Exported
from rag2.answering.rag import Rag
from rag2.evaluation import place
from rag2.evaluation.environment import environment
from rag2.evaluation.questions import load_questions, split
from rag2.generator.logprob import Request, choice_logprobs
from rag2.registry import UserError
from rag2.stages import LEASH

SERVERS = ("naive", "rag2", "rag2, remembering nothing")
WARM = 16  # requests before the clock runs
PATH = "/v1/completions"


class ServingConfig(config.Config):
    """Closed loop: each of `concurrency` clients asks its next question when it has an answer."""

    out: str = "runs/serving"
    export: str | None = None
    """what `rag2 export` wrote"""
    questions: str | None = None
    """JSONL; those of split test are asked, in an order of the seed's"""
    readings: list[Literal["marginal", "concat"]] = Field(["marginal", "concat"], min_length=1)
    concurrency: list[PositiveInt] = Field(default=[1, 8, 32], min_length=1)
    requests: PositiveInt = 300
    """timed, of each server, reading and concurrency"""
    max_new_tokens: PositiveInt = 32
    whole_lines: bool = True
    """answers end with their line; false: all have max_new_tokens"""
    repeats: PositiveInt = 3
    """the median of so many is told"""
    seed: int = Field(default=0, ge=0)
    role: Literal["all", *SERVERS] = "all"  # pyright: ignore[reportInvalidTypeForm]
    """all: the comparison; else one server, as the comparison starts it"""


def main(cfg: ServingConfig) -> dict:
    """Compare the servers; returns and writes serving.json."""
    if not cfg.export or not cfg.questions:
        raise UserError(
            "export and questions are not given: set export=EXPORT questions=FILE.jsonl"
        )
    cores = sorted(os.sched_getaffinity(0))
    if cfg.role != "all":
        os.sched_setaffinity(0, {cores[0]})
        torch.set_num_threads(1)
        serve_one(cfg)
        return {}
    asked = [q.question for q in split(load_questions(cfg.questions), "test")]
    random.Random(cfg.seed).shuffle(asked)
    place.check(cfg)
    rows: list[dict[str, Any]] = []
    cases = [(reading, count) for reading in cfg.readings for count in cfg.concurrency]
    with place.claimed(cfg) as out:
        for repeat in range(cfg.repeats):
            for name in SERVERS:
                process, port = started(cfg, name, cores)
                try:
                    for number, (reading, count) in enumerate(cases):
                        some = asked_in(asked, number, WARM + cfg.requests)
                        took = asyncio.run(load(cfg, port, reading, count, some))
                        rows.append({"server": name, "repeat": repeat} | took)
                finally:
                    process.terminate()
                    process.wait(30)
        told = cfg.model_dump(mode="json", exclude={"out", "role"})
        results = {"settings": told, "environment": environment(), "rows": rows}
        results["cells"] = cells(rows)
        (out / "serving.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console().print(table(results["cells"]))
    return results


# ----- the client -------------------------------------------------------------------------------


def started(cfg: ServingConfig, name: str, cores: Sequence[int]) -> tuple[subprocess.Popen, int]:
    """A server in a process of its own and its port, once it is ready; the client moves away."""
    command = [sys.executable, "-c", LEASH, str(os.getpid()), sys.executable, __file__]
    command += [f"role={name}", f"export={cfg.export}"]
    command += [f"questions={cfg.questions}", f"max_new_tokens={cfg.max_new_tokens}"]
    command += [f"whole_lines={str(cfg.whole_lines).lower()}"]
    os.sched_setaffinity(0, cores)  # which the server inherits, and takes the first of
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(0, {cores[-1]})
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready: "):
            assert os.sched_getaffinity(process.pid) == {cores[0]}
            return process, int(line.rsplit(":", 1)[1])
    raise UserError(f"server {name!r} did not start: exit status {process.wait()}")


def asked_in(asked: Sequence[str], case: int, count: int) -> list[str]:
    """What is asked in a case: nothing again before all was asked once, for a server remembers."""
    return [asked[(case * count + number) % len(asked)] for number in range(count)]


async def load(
    cfg: ServingConfig, port: int, reading: str, count: int, todo: Sequence[str]
) -> dict[str, Any]:
    """Seconds of each request of `count` clients, and all the answers."""
    took: list[float] = []
    answers: dict[str, str] = {}

    async def client(questions: list[str]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while questions:
            question = questions.pop()
            began = time.perf_counter()
            answers[question] = await ask(reader, writer, cfg, question, reading)
            took.append(time.perf_counter() - began)
        writer.close()

    warm = list(todo[:WARM])
    await asyncio.gather(*(client(warm) for _ in range(count)))
    took.clear()
    rest = list(todo[WARM:])
    began = time.perf_counter()
    await asyncio.gather(*(client(rest) for _ in range(count)))
    seconds = time.perf_counter() - began
    p50, p95 = np.percentile(took, [50, 95]).tolist()
    speed = {"per_second": len(took) / seconds, "p50_seconds": p50, "p95_seconds": p95}
    return {"reading": reading, "concurrency": count, **speed, "answers": answers}


async def ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    cfg: ServingConfig,
    question: str,
    reading: str,
) -> str:
    """One answer over an open connection."""
    body = {"prompt": question, "max_tokens": cfg.max_new_tokens, "rag2": {"reading": reading}}
    sent = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(sent)}\r\n\r\n".encode() + sent)
    status = await reader.readline()
    length = 0
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    got = await reader.readexactly(length)
    if b" 200 " not in status:
        raise UserError(f"a server answered {status!r} {got[:200]!r} to {question!r}")
    return json.loads(got)["choices"][0]["text"]


# ----- the servers ------------------------------------------------------------------------------


def serve_one(cfg: ServingConfig) -> None:
    """Run the server of `role` until it is terminated."""
    if cfg.role == "naive":
        serve_naively(cfg)
        return
    from rag2.serve.limits import Limits
    from rag2.serve.server import Server, settled
    from rag2.serve.serving import Serving

    remembered = 0 if "nothing" in cfg.role else Limits().remembered
    serving = Serving(Limits(remembered=remembered), "rag2", "unused-token")

    def loaded() -> Rag:
        rag = Rag.from_pretrained(str(cfg.export))
        stop = rag.settings.stop if cfg.whole_lines else []
        rag.settings = rag.settings.model_copy(update={"stop": stop})
        return rag

    server = Server(serving, lambda: settled(loaded()), "127.0.0.1", 0)
    server.answer(lambda: print(f"ready: {server.address}", flush=True))  # noqa: T201


def serve_naively(cfg: ServingConfig) -> None:
    """FastAPI as its tutorial has it, around `answers_naively`."""
    import socket

    import uvicorn
    from fastapi import Body, FastAPI

    app, answer, one_at_a_time = FastAPI(), answers_naively(cfg), Lock()

    @app.post(PATH)
    def complete(body: dict = Body()) -> dict:  # noqa: B008
        with one_at_a_time:
            text = answer(body["prompt"], body["rag2"]["reading"])
        return {"choices": [{"index": 0, "text": text}]}

    # With its protocol named asyncio turns Nagle's algorithm off; uvicorn's own sockets have it so.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    print(f"ready: http://127.0.0.1:{listening.getsockname()[1]}", flush=True)  # noqa: T201
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    asyncio.run(server.serve(sockets=[listening]))


@torch.no_grad()
def answers_naively(cfg: ServingConfig) -> Callable[[str, str], str]:
    """(question, reading) -> answer by transformers' generate."""
    import faiss

    exported = Exported.open(str(cfg.export))
    encoder, generation = exported.retriever().eval(), exported.generation()
    generator, settings = exported.generator(), exported.settings
    model, tokenizer = generator.model, generator.tokenizer
    tokenizer.padding_side = "left"
    vectors_ND = generation.index.vectors(np.arange(len(generation)))
    flat = faiss.IndexFlatIP(vectors_ND.shape[1])
    flat.add(vectors_ND)  # pyright: ignore[reportCallIssue]
    stops = {"stop_strings": settings.stop} if cfg.whole_lines else {}
    length = {"max_new_tokens": cfg.max_new_tokens, "do_sample": False}
    if not cfg.whole_lines:
        length["min_new_tokens"] = cfg.max_new_tokens

    @torch.no_grad()
    def answer(question: str, reading: str) -> str:
        query_1D = encoder.encode_questions([question]).numpy()
        scores_1K, rows_1K = flat.search(query_1D, settings.k)  # pyright: ignore[reportCallIssue]
        passages = [generation.chunk(int(generation.ids_N[row])).passage for row in rows_1K[0]]
        groups = [passages] if reading == "concat" else [[passage] for passage in passages]
        built = settings.prompt.context
        prompts = [built(question, group, tokenizer).text for group in groups]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        made = model.generate(**inputs, **length, **stops, tokenizer=tokenizer)
        new = made[:, inputs["input_ids"].shape[1] :].tolist()
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        texts = [text.partition("\n")[0] if cfg.whole_lines else text for text in texts]
        if len(texts) == 1:
            return texts[0].strip()
        scale = float(encoder.scale)
        prior_K = torch.from_numpy(scores_1K[0] * scale / settings.temperature).log_softmax(0)
        different = [text for text in dict.fromkeys(texts) if text.strip()]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in different]
        if not ids:
            return ""
        requests = [Request(tokenizer.encode(prompt), ids) for prompt in prompts]
        logp_KA = torch.tensor(choice_logprobs(model, requests))
        best = int((prior_K[:, None] + logp_KA).logsumexp(0).argmax())
        return different[best].strip()

    return answer


# ----- the table --------------------------------------------------------------------------------


def cells(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the repeats, the ratio to the naive server, and the share of equal answers."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["reading"], row["concurrency"], row["server"]), []).append(row)
    told = []
    for (reading, count, server), some in sorted(found.items()):
        opponent = found[reading, count, SERVERS[0]]
        paces = [row["per_second"] for row in some]
        ratios = [
            row["per_second"] / other["per_second"]
            for row, other in zip(some, opponent, strict=True)
        ]
        mine, theirs = some[0]["answers"], opponent[0]["answers"]
        equal = statistics.mean(mine[question] == theirs[question] for question in mine)
        told.append(
            {
                "reading": reading,
                "concurrency": count,
                "server": server,
                "per_second": statistics.median(paces),
                "p50_seconds": statistics.median(row["p50_seconds"] for row in some),
                "p95_seconds": statistics.median(row["p95_seconds"] for row in some),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "equal_answers": equal,
            }
        )
    return told


def table(found: Sequence[dict[str, Any]]) -> Table:
    """A row for each cell."""
    shown = Table(
        "reading", "clients", "server", "requests/s", "p50 ms", "p95 ms", "ratio", "equal"
    )
    for cell in found:
        low, high = cell["ratio_range"]
        shown.add_row(
            cell["reading"],
            str(cell["concurrency"]),
            cell["server"],
            f"{cell['per_second']:.1f}",
            f"{1000 * cell['p50_seconds']:.0f}",
            f"{1000 * cell['p95_seconds']:.0f}",
            f"{cell['ratio']:.1f} [{low:.1f}, {high:.1f}]",
            f"{cell['equal_answers']:.1%}",
        )
    return shown


if __name__ == "__main__":
    config.run(main, ServingConfig)
