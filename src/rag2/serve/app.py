"""All endpoints of a server, and what every response has in common."""

import hashlib
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, PlainTextResponse, Response

from rag2 import __version__
from rag2.registry import UserError
from rag2.serve import chat, documented, documents, replies, search
from rag2.serve.errors import ApiError, told
from rag2.serve.guard import App, Guard, Message, Receive, Send
from rag2.serve.serving import Serving

PAGE = Path(__file__).parent / "page"
OTHER = "other"  # no route of the API: pages, and what there is not
# What takes its turn in the queue: turned away before its body is read.
QUEUED = {
    "/v1/chat/completions", "/v1/completions", "/v1/retrieve", "/rerank", "/v1/rerank",
    "/v1/score", "/v1/embeddings",
}  # fmt: skip
SAFE = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
STATUSES = {
    400: "A question that cannot be answered, such as one that is too long",
    401: "The token is missing or wrong",
    404: "There is no such thing",
    405: "The path has other methods",
    408: "No answer in time",
    413: "The body is too large",
    422: "The body is not what the endpoint takes",
    429: "As many requests as the server takes; see Retry-After",
    431: "The headers are too large",
    503: "Starting, shutting down, or the generator's own server does not answer",
}


def build(serving: Serving) -> App:
    """The ASGI application, guarded and measured."""
    described: dict[int | str, dict[str, Any]] = {
        status: {"description": meaning, "content": {"application/json": {"schema": ERROR}}}
        for status, meaning in STATUSES.items()
    }
    app = FastAPI(
        title="rag2",
        version=__version__,
        responses=described,
        openapi_url=None,
        redirect_slashes=False,
    )
    _errors(app)
    _operations(app, serving)
    for part in (chat, search, documents):
        app.include_router(part.router(serving))
    _page(app)
    schema = replies.encode(app.openapi())

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(schema, media_type="application/json")

    def admit(method: str, path: str) -> None:
        if method == "POST" and path in QUEUED:
            serving.check_room()

    return Measured(Guard(app, serving.limits, admit), serving, {"/", *app.openapi()["paths"]})


def _operations(app: FastAPI, serving: Serving) -> None:
    """Is it alive, is it ready, what does it hold, what has it done."""

    @app.get("/health", tags=["operations"], responses=documented.json(documented.State, 503))
    async def health() -> Response:
        """Whether the process is to live on; a system that is still being loaded is."""
        broken = serving.broken
        told = {"status": "failed", "reason": broken} if broken else {"status": "ok"}
        return replies.Reply(told, status_code=503 if broken else 200)

    @app.get("/ready", tags=["operations"], responses=documented.json(documented.State, 503))
    async def ready() -> Response:
        """Whether it takes questions: verified, warmed up, and not shutting down."""
        state = serving.state()
        told = {"status": state} | ({"reason": serving.broken} if serving.broken else {})
        return replies.Reply(told, status_code=200 if state == "ready" else 503)

    @app.get(
        "/metrics",
        tags=["operations"],
        response_class=PlainTextResponse,
        responses=documented.PLAIN,
    )
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        text = await serving.look(lambda: serving.metrics.text(serving.running))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", tags=["operations"], responses=documented.json(documented.Models))
    async def models() -> Response:
        """The one model there is, and how it answers."""
        return replies.Reply({"object": "list", "data": [await serving.look(model)]})

    @app.get(
        "/v1/models/{name:path}", tags=["operations"], responses=documented.json(documented.Model)
    )
    async def one_model(name: str) -> Response:
        """The same by its name."""
        if name != serving.name:
            raise ApiError(404, f"the model is {serving.name!r}", "model_not_found", "model")
        return replies.Reply(await serving.look(model))

    def model() -> dict[str, Any]:
        rag = serving.rag
        view, settings = rag.live.view(), rag.settings
        parts = [part for part in (view.base, view.delta) if part is not None]
        told = settings.model_dump(include={"k", "reading", "temperature", "max_new_tokens"})
        told["readings"] = list(rag.readings)
        told["chunks"] = sum(int(part.alive_N.sum()) for part in parts)
        live = {name for p in parts for name, rows in p.rows.items() if p.alive_N[rows].any()}
        told["namespaces"] = sorted(live)
        told |= replies.where(rag.place(view))
        said = {"id": serving.name, "object": "model", "created": 0, "owned_by": "rag2"}
        return {**said, "rag2": told}


def _errors(app: FastAPI) -> None:
    """Every error in one shape; none repeats what the client sent but for names of fields."""

    def paths() -> dict[str, Any]:
        page = {"get": {}}
        return {OTHER: page, **app.openapi()["paths"]}

    @app.exception_handler(ApiError)
    async def ours(_: Request, error: Any) -> Response:
        return replies.Reply(error.body(), status_code=error.status, headers=error.headers)

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: Any) -> Response:
        said = told(error)
        return replies.Reply(said.body(), status_code=said.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Any) -> Response:
        first = error.errors()[0]
        # Of a type with alternatives pydantic names each; the client wrote none of those names.
        named = [str(part) for part in first["loc"][1:]]
        place = ".".join(part for part in named if re.fullmatch(r"[a-z0-9_]+", part))[:200]
        said = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "model_attributes_type":
            said = "the body is no JSON object sent as content-type: application/json"
        message = f"{place}: {said}" if place else said
        wrong = ApiError(422, message[:300], "invalid_request", place or None)
        return replies.Reply(wrong.body(), status_code=422)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, __: Any) -> Response:  # raised again, and logged by Guard
        failed = ApiError(500, "the server failed; its log says why", "internal_error")
        return replies.Reply(failed.body(), status_code=500)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: Any) -> Response:
        codes = {404: "path_not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code, "invalid_request")
        said = ApiError(error.status_code, str(error.detail), code)
        headers = dict(error.headers or {})
        if error.status_code == 405:  # Starlette names those of one of its routes
            methods = paths()[named(request.url.path, paths())]
            headers["allow"] = ", ".join(sorted(method.upper() for method in methods))
        return replies.Reply(said.body(), status_code=error.status_code, headers=headers)


def _page(app: FastAPI) -> None:
    """The page at /, from the files there are; nothing else is served from the disk."""

    def route(path: str, file: Path) -> None:
        etag = hashlib.sha256(file.read_bytes()).hexdigest()[:16]

        async def served() -> Response:
            return FileResponse(file, headers={**SAFE, "etag": etag, "cache-control": "no-cache"})

        app.add_api_route(path, served, include_in_schema=False)

    for file in sorted(PAGE.glob("*.*")):
        route("/" if file.name == "index.html" else f"/page/{file.name}", file)


class Measured:
    """ASGI around all: counts responses and times them by the path of their route."""

    def __init__(self, app: App, serving: Serving, paths: set[str]) -> None:
        self.app, self.metrics, self.paths = app, serving.metrics, paths

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # nginx's number for a client that left

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            path = named(scope["path"], self.paths)
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)


def named(path: str, paths: Collection[str]) -> str:
    """The route's path: a client cannot make up new labels."""
    if path in paths:
        return path
    return next((p for p in paths if "{" in p and path.startswith(p.split("{")[0])), OTHER)
