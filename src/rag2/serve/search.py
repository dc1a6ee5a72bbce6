"""Retrieval, ranking, scores and embeddings: what the models say without writing."""

import base64
import math
import uuid
from dataclasses import asdict
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from rag2.serve import replies
from rag2.serve.bodies import Embeddings, Rerank, Retrieve, Score
from rag2.serve.errors import ApiError
from rag2.serve.serving import Serving


def router(serving: Serving) -> APIRouter:
    """The endpoints that read."""
    routes = APIRouter(tags=["search"])

    @routes.post("/v1/retrieve")
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

    @routes.post("/rerank")
    @routes.post("/v1/rerank")
    async def rerank(body: Rerank, request: Request) -> Response:
        """Documents by relevance: p(document | query) among those given."""
        rag = serving.rag
        texts = [given if isinstance(given, str) else given.text for given in body.documents]

        def ranked() -> list[float]:
            embed = rag.live.view().embedder.embed
            (query_D,), texts_ND = embed([body.query], "question"), embed(texts, "chunk")
            scores_N = (texts_ND @ query_D).astype(np.float64) * rag.scale
            scores_N = np.exp(scores_N - scores_N.max())
            return (scores_N / scores_N.sum()).tolist()

        scores = await serving.call(request, ranked)
        order = sorted(range(len(texts)), key=lambda i: (-scores[i], i))[: body.top_n]
        results: list[dict[str, Any]] = []
        for index in order:
            result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
            if body.return_documents:
                result["document"] = {"text": texts[index]}
            results.append(result)
        meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
        return replies.Reply({"id": uuid.uuid4().hex, "results": results, "meta": meta})

    @routes.post("/v1/score")
    async def score(body: Score, request: Request) -> Response:
        """log p(choice | question) in nats, as the comparison of arms computes it."""
        rag = serving.rag
        scored = await serving.call(
            request,
            lambda: rag.score(body.question, body.choices, body.k, body.reading, body.namespaces),
        )
        highest = max(scored.logps)
        weights = [math.exp(logp - highest) if logp > -math.inf else 0.0 for logp in scored.logps]
        choices = [
            {"index": i, "text": text, "logprob": replies.finite(logp), "probability": p}
            for i, (text, logp, p) in enumerate(
                zip(body.choices, scored.logps, [w / sum(weights) for w in weights], strict=True)
            )
        ]
        cited = [asdict(citation) for citation in scored.citations]
        said = {"object": "score", "question": body.question, "best": scored.best}
        where = replies.where(scored.place)
        return replies.Reply({**said, "choices": choices, "citations": cited, "rag2": where})

    @routes.post("/v1/embeddings")
    async def embeddings(body: Embeddings, request: Request) -> Response:
        """Embeddings of documents, or of queries with input_type=query."""
        rag = serving.rag
        side = "question" if body.input_type == "query" else "chunk"

        def embedded() -> tuple[np.ndarray, int]:
            encoder = rag.live.view().embedder
            if body.dimensions not in (None, encoder.dimension):
                said = f"dimensions: this encoder has {encoder.dimension}"
                raise ApiError(422, said, "dimensions", "dimensions")
            read = rag.encoder.tokenize(body.texts, side)
            return encoder.embed(body.texts, side), sum(map(len, read))

        vectors_ND, tokens = await serving.call(request, embedded)
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
