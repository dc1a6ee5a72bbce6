"""What /openapi.json says of responses: their fields as the endpoints write them, and errors."""

from typing import Any, Literal

from pydantic import BaseModel


class Where(BaseModel):
    """Which state answered."""

    export: str
    generation: int
    version: int


class Seconds(BaseModel):
    """Of one answer."""

    retrieve: float
    first_token: float
    total: float


class Made(Where):
    """How an answer was made; `logp` is log p(y|x) in nats."""

    logp: float
    dropped: int
    seconds: Seconds


class Passage(BaseModel):
    """A chunk: where it stands and how it was found."""

    chunk: int
    namespace: str
    document: str
    title: str
    start: int
    end: int
    score: float
    text: str


class Citation(Passage):
    """A chunk that was read; `posterior` is p(z|x,y)."""

    posterior: float | None


class Result(Passage):
    """A chunk that was found; `prior` is p(z|x)."""

    prior: float


class Message(BaseModel):
    """An answer."""

    role: Literal["assistant"]
    content: str
    annotations: list[dict[str, Any]]
    citations: list[Citation]


class ChatChoice(BaseModel):
    """One of n answers."""

    index: int
    message: Message
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class TextChoice(BaseModel):
    """One of n answers."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]
    annotations: list[dict[str, Any]]
    citations: list[Citation]


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answered(BaseModel):
    """What answers have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    rag2: Made


class ChatAnswer(Answered):
    """POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextAnswer(Answered):
    """POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class Found(BaseModel):
    """POST /v1/retrieve."""

    object: Literal["list"]
    query: str
    results: list[Result]
    rag2: Where


class Ranked(BaseModel):
    """One of the texts; `document` where it was wanted."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class Ranking(BaseModel):
    """POST /rerank."""

    id: str
    results: list[Ranked]
    meta: dict[str, Any]


class Choice(BaseModel):
    """log p(choice | question) in nats, and its share."""

    index: int
    text: str
    logprob: float
    probability: float


class Scores(BaseModel):
    """POST /v1/score."""

    object: Literal["score"]
    question: str
    best: int
    choices: list[Choice]
    citations: list[Citation]
    rag2: Where


class Embedding(BaseModel):
    """Numbers, or their bytes (float32, little-endian) in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embedded(BaseModel):
    """POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: dict[str, int]


class Listed(BaseModel):
    """A document, in short."""

    id: str
    title: str
    characters: int


class Listing(BaseModel):
    """GET /v1/documents."""

    object: Literal["list"]
    data: list[Listed]
    has_more: bool


class Shown(BaseModel):
    """GET /v1/documents/{id}."""

    id: str
    title: str
    text: str
    metadata: dict[str, Any]
    namespace: str


class Changed(BaseModel):
    """POST /v1/documents."""

    added: int
    updated: int
    unchanged: int
    chunks: int
    rag2: Where


class Removed(BaseModel):
    """DELETE /v1/documents/{id}."""

    deleted: Literal[True]
    id: str
    chunks: int
    rag2: Where


class Refreshed(BaseModel):
    """POST /v1/refresh."""

    rag2: Where


class Model(BaseModel):
    """The model, and how it answers."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    rag2: dict[str, Any]


class Models(BaseModel):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class State(BaseModel):
    """GET /health and /ready."""

    status: Literal["ok", "ready", "starting", "draining", "failed"]
    reason: str | None = None


def json(model: type[BaseModel], *others: int) -> dict[int | str, dict[str, Any]]:
    """For `responses`: 200, and other statuses that have the same shape."""
    return {status: {"model": model} for status in (200, *others)}


def streamed(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The same where the answer may come as server-sent events."""
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    events = {"text/event-stream": {"schema": event}}
    return {200: {"model": model, "content": events}}


PLAIN: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}
