"""A generator behind OpenAI's completions, as vLLM answers them, and how such servers fail."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from rag2.answering.background import Background
from rag2.answering.lexicon import Lexicon
from rag2.answering.library import Parts
from rag2.answering.rag import Rag
from rag2.answering.remote import Remote
from rag2.answering.upstream import PROBE, Upstream
from rag2.generator.generate import ends_of
from rag2.generator.load import Generator
from rag2.generator.pairs import encode_contexts


class Fake:
    """Writes greedily or by chance, echoes and streams; `fault` names what it does instead."""

    def __init__(self, generator: Generator, echoes: bool = True) -> None:
        self.model, self.tokenizer = generator.model, generator.tokenizer
        self.ends = ends_of(generator.model, generator.tokenizer)
        self.echoes = echoes
        self.fault = ""
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.open = 0
        """streams that nobody closed yet"""
        self.models: list[dict[str, Any]] = [{"id": "small", "max_model_len": 512}]
        self.url = ""

    def app(self) -> FastAPI:
        """Its two endpoints."""
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> Response:
            return JSONResponse({"object": "list", "data": self.models})

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            body = await request.json()
            self.asked.append(body)
            self.keys.append(request.headers.get("authorization"))
            if self.fault:
                return await self.faulty(body)
            return self.good(body)

        return app

    def good(self, body: dict[str, Any]) -> Response:
        """What vLLM answers."""
        if body["model"] not in [model["id"] for model in self.models]:
            return JSONResponse({"error": {"message": "no such model"}}, status_code=404)
        if body.get("echo") and not self.echoes:
            return JSONResponse({"error": {"message": "no echo"}}, status_code=400)
        prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
        if body.get("stream"):
            return StreamingResponse(
                self.streamed(prompts[0], body), media_type="text/event-stream"
            )
        choices = [self.choice(index, prompt, body) for index, prompt in enumerate(prompts)]
        return JSONResponse({"object": "text_completion", "choices": choices})

    def choice(self, index: int, prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        (ids,) = encode_contexts(self.tokenizer, [prompt])
        made, logps, text, finish = self.written(ids, body)
        tokens = [self.tokenizer.decode([token]) for token in made]
        if body.get("echo"):
            tokens = [self.tokenizer.decode([token]) for token in ids] + tokens
            logps = [None, *self.logps(ids)] + logps
            text = prompt + text
        told = None
        if body.get("logprobs") is not None:
            told = {"tokens": tokens, "token_logprobs": logps, "text_offset": [0] * len(tokens)}
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}

    @torch.no_grad()
    def logps(self, ids: list[int]) -> list[float | None]:
        logp_LV = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return [logp_LV[at, token].item() for at, token in enumerate(ids[1:])]

    @torch.no_grad()
    def written(self, ids: list[int], body: dict[str, Any]) -> tuple[list[int], list, str, str]:
        """Tokens with the one that ends them, and the text before the first stop."""
        chance = torch.Generator().manual_seed(body.get("seed", 0))
        made: list[int] = []
        logps: list[float] = []
        text = ""
        while len(made) < body["max_tokens"]:
            logits_V = self.model(torch.tensor([[*ids, *made]])).logits[0, -1].float()
            if body["temperature"] == 0:
                token = int(logits_V.argmax())
            else:
                p_V = (logits_V / body["temperature"]).softmax(-1)
                token = int(torch.multinomial(p_V, 1, generator=chance))
            made.append(token)
            logps.append(logits_V.log_softmax(-1)[token].item())
            text = self.tokenizer.decode(made, skip_special_tokens=True)
            found = [at for stop in body.get("stop", []) if (at := text.find(stop)) >= 0]
            if found:
                return made, logps, text[: min(found)], "stop"
            if token in self.ends:
                return made, logps, text, "stop"
        return made, logps, text, "length"

    async def streamed(self, prompt: str, body: dict[str, Any]) -> AsyncIterator[str]:
        """A token an event; the text is held back where it may yet be a stop."""
        choice = self.choice(0, prompt, body)
        text, told, finish = choice["text"], choice["logprobs"], choice["finish_reason"]
        self.open += 1
        try:
            for at, token in enumerate(told["tokens"]):
                last = at == len(told["tokens"]) - 1
                piece, text = (text, "") if last else (text[: len(token)], text[len(token) :])
                pair = {"tokens": [token], "token_logprobs": told["token_logprobs"][at : at + 1]}
                part: dict[str, Any] = {"index": 0, "text": piece, "logprobs": pair}
                part["finish_reason"] = finish if last else None
                yield f"data: {json.dumps({'choices': [part]})}\n\n"
                if self.fault == "hangs up":
                    raise RuntimeError("a planted end of the connection")
                if self.fault == "dawdles":
                    await asyncio.sleep(60)
            yield "data: [DONE]\n\n"
        finally:
            self.open -= 1

    async def faulty(self, body: dict[str, Any]) -> Response:
        """Everything but an answer."""
        match self.fault:
            case "hangs up" | "dawdles":
                return self.good(body)
            case "sleeps":
                await asyncio.sleep(60)
            case "busy":
                return PlainTextResponse("later", status_code=503)
            case "busy once":
                self.fault = ""
                return PlainTextResponse("later", status_code=429)
            case "locks":
                return PlainTextResponse("no", status_code=401)
            case "breaks":
                return PlainTextResponse("a trace\nof a stack", status_code=500)
            case "moves":
                return Response(status_code=302, headers={"location": "http://127.0.0.1:9/"})
            case "packs":
                return PlainTextResponse("", headers={"content-encoding": "gzip"})
            case "floods":
                return StreamingResponse(_flood(), media_type="text/event-stream")
            case "null":
                return JSONResponse({"choices": None})
            case "nan":
                told = {"tokens": ["a"], "token_logprobs": [float("nan")]}
                choice = {"index": 0, "text": "a", "finish_reason": "stop", "logprobs": told}
                text = json.dumps({"choices": [choice]})
                return PlainTextResponse(f"data: {text}\n\n" if body.get("stream") else text)
            case "fails":
                return PlainTextResponse('data: {"error": {"message": "out of memory"}}\n\n')
            case "short":
                return JSONResponse({"choices": []})
        return PlainTextResponse("<html>It works!</html>")


async def _flood() -> AsyncIterator[bytes]:
    for _ in range(1 << 12):
        yield b"x" * (1 << 16)


@contextmanager
def running(fake: Fake) -> Iterator[Fake]:
    """The server on a free port; `fake.url` is its address."""
    config = uvicorn.Config(
        fake.app(), port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    fake.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def remote(rag: Rag, url: str, seconds: float = 20.0, **options: Any) -> Iterator[Remote]:
    """The same documents, encoder and settings; the generator is at `url`."""
    generator = rag.generator
    lexicon = Lexicon.of(generator.tokenizer, generator.model.config)
    (probe,) = encode_contexts(generator.tokenizer, [PROBE])
    with ExitStack() as opened:
        background = opened.enter_context(Background())
        upstream = Upstream(url, seconds=seconds, **options)
        opened.callback(lambda: background.call(upstream.close()))
        background.call(upstream.find(len(probe)))
        parts = Parts(rag.encoder, rag.live, rag.chunker, rag.settings, rag.export)
        yield opened.enter_context(Remote(parts, upstream, lexicon, background))
