"""/v1/documents and /v1/refresh: knowledge that changes while it is asked."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from rag2.serve import limits, replies
from rag2.serve.bodies import Documents
from rag2.serve.errors import ApiError
from rag2.serve.serving import Serving
from rag2.types import Document

Id = Annotated[str, Path(min_length=1, max_length=limits.NAME)]
Namespace = Annotated[str, Query(max_length=limits.NAME)]
After = Annotated[str, Query(max_length=limits.NAME)]
Limit = Annotated[int, Query(ge=1, le=1000)]


def router(serving: Serving) -> APIRouter:
    """The endpoints of documents; changing them takes the token."""
    routes = APIRouter(tags=["documents"])

    async def place() -> dict[str, Any]:
        return replies.where(await serving.place())

    @routes.get("/v1/documents")
    async def listed(namespace: Namespace = "", after: After = "", limit: Limit = 100) -> Response:
        """Documents in the order of their ids, those after `after`."""
        rag = serving.rag
        found = await serving.look(lambda: rag.documents(namespace, after, limit + 1))
        data = [{"id": d.id, "title": d.title, "characters": len(d.text)} for d in found[:limit]]
        return replies.Reply({"object": "list", "data": data, "has_more": len(found) > limit})

    @routes.get("/v1/documents/{id:path}")
    async def shown(id: Id, namespace: Namespace = "") -> Response:
        """A document, whole."""
        rag = serving.rag
        document = await serving.look(lambda: rag.document(id, namespace))
        if document is None:
            raise _missing(id)
        told = {"id": document.id, "title": document.title, "text": document.text}
        return replies.Reply({**told, "metadata": document.metadata, "namespace": namespace})

    @routes.post("/v1/documents")
    async def put(body: Documents, request: Request) -> Response:
        """Add documents, or replace those whose text differs; the next question knows them."""
        serving.authorize(request)
        rag = serving.rag
        documents = [Document(d.id, d.text, d.title, d.metadata) for d in body.documents]
        done = await serving.change(lambda: rag.put(documents, body.namespace))
        await serving.refresh_if_due()
        counts = {"added": done.added, "updated": done.updated, "unchanged": done.unchanged}
        return replies.Reply({**counts, "chunks": done.chunks, "rag2": await place()})

    @routes.delete("/v1/documents/{id:path}")
    async def removed(id: Id, request: Request, namespace: Namespace = "") -> Response:
        """Remove a document; the next question does not know it."""
        serving.authorize(request)
        rag = serving.rag

        def remove() -> int | None:
            if rag.document(id, namespace) is None:
                return None
            return rag.remove([id], namespace)

        chunks = await serving.change(remove)
        if chunks is None:
            raise _missing(id)
        return replies.Reply({"deleted": True, "id": id, "chunks": chunks, "rag2": await place()})

    @routes.post("/v1/refresh")
    async def refreshed(request: Request) -> Response:
        """Build an index of all documents as they are now and swap it in."""
        serving.authorize(request)
        await serving.change(serving.refresh)
        return replies.Reply({"rag2": await place()})

    return routes


def _missing(id: str) -> ApiError:
    return ApiError(404, f"there is no document {id[:60]!r}", "document_not_found", "id")
