"""Retrieval, ranking, scores and embeddings: what the models say without writing."""

import base64
import math
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from rag2.answering.remote import System
from rag2.serve import documented, replies
from rag2.serve.bodies import Embeddings, Rerank, Retrieve, Score
from rag2.serve.errors import ApiError
from rag2.serve.serving import Serving


def router(serving: Serving) -> APIRouter:
    """The endpoints that read."""
    routes = APIRouter(tags=["search"])

    @routes.post("/v1/retrieve", responses=documented.json(documented.Found))
    async def retrieve(body: Retrieve, request: Request) -> Response:
        """The best chunks of a query; `prior` is p(z|x) among them."""
        rag = serving.rag
        found, view = await serving.call(
            request, lambda: rag.retrieved(body.query, body.k, body.namespaces)
        )
        results = []
        for citation in found:
            told = asdict(citation)
            told["prior"] = told.pop("posterior")
            results.append(told)
        where = replies.where(rag.place(view))
        said = {"object": "list", "query": body.query, "results": results, "rag2": where}
        return replies.Reply(said)

    @routes.post("/rerank", responses=documented.json(documented.Ranking))
    @routes.post("/v1/rerank", responses=documented.json(documented.Ranking))
    async def rerank(body: Rerank, request: Request) -> Response:
        """Documents by relevance: p(document | query) among those given."""
        rag, texts = serving.rag, body.texts
        scores = await serving.call(request, lambda: shares(rag, body.query, texts))
        order = sorted(range(len(texts)), key=lambda i: (-scores[i], i))[: body.top_n]
        results: list[dict[str, Any]] = []
        for index in order:
            result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
            if body.return_documents:
                result["document"] = {"text": texts[index]}
            results.append(result)
        meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
        return replies.Reply({"id": uuid.uuid4().hex, "results": results, "meta": meta})

    @routes.post("/v1/score", responses=documented.json(documented.Scores))
    async def score(body: Score, request: Request) -> Response:
        """log p(choice | question) in nats, as the comparison of arms computes it."""
        rag = serving.rag
        scored = await serving.call(
            request,
            lambda: rag.score(body.question, body.choices, body.k, body.reading, body.namespaces),
        )
        cited = [asdict(citation) for citation in scored.citations]
        said = {"object": "score", "question": body.question, "best": scored.best}
        told = {"choices": choices(body.choices, scored.logps), "citations": cited}
        return replies.Reply({**said, **told, "rag2": replies.where(scored.place)})

    @routes.post("/v1/embeddings", responses=documented.json(documented.Embedded))
    async def embeddings(body: Embeddings, request: Request) -> Response:
        """Embeddings of documents, or of queries with input_type=query."""
        rag = serving.rag
        vectors_ND, tokens = await serving.call(request, lambda: embedded(rag, body))
        data = []
        for index, vector_D in enumerate(vectors_ND.astype("<f4")):
            packed: Any = vector_D.tolist()
            if body.encoding_format == "base64":
                packed = base64.b64encode(vector_D.tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": packed})
        used = {"prompt_tokens": tokens, "total_tokens": tokens}
        model = body.model or serving.name
        return replies.Reply({"object": "list", "data": data, "model": model, "usage": used})

    return routes


def shares(rag: System, query: str, texts: Sequence[str]) -> list[float]:
    """p(text | query) of each text, among these."""
    embed = rag.live.view().embedder.embed
    (query_D,), texts_ND = embed([query], "question"), embed(texts, "chunk")
    scores_N = (texts_ND @ query_D).astype(np.float64) * rag.scale
    scores_N = np.exp(scores_N - scores_N.max())
    return (scores_N / scores_N.sum()).tolist()


def choices(texts: Sequence[str], logps: Sequence[float]) -> list[dict[str, Any]]:
    """Each choice with its log p, in nats, and its probability among these."""
    highest = max(logps)
    weights = [math.exp(logp - highest) if logp > -math.inf else 0.0 for logp in logps]
    total = sum(weights) or 1.0
    return [
        {"index": i, "text": text, "logprob": replies.finite(logp), "probability": w / total}
        for i, (text, logp, w) in enumerate(zip(texts, logps, weights, strict=True))
    ]


def embedded(rag: System, body: Embeddings) -> tuple[np.ndarray, int]:
    """Embeddings [N, D] of a request's texts, and how many tokens were read."""
    encoder, side = rag.live.view().embedder, body.side
    if body.dimensions not in (None, encoder.dimension):
        said = f"dimensions: this encoder has {encoder.dimension}"
        raise ApiError(422, said, "dimensions", "dimensions")
    read = rag.encoder.tokenize(body.texts, side)
    return encoder.embed(body.texts, side), sum(map(len, read))
