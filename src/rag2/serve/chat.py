"""POST /v1/chat/completions and /v1/completions, whole or as a stream."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from rag2.answering.ask import Answer, Ask
from rag2.generator.prompt import GAP, Prompt
from rag2.serve import documented, replies
from rag2.serve.bodies import Chat, Completion, Message, Sampled
from rag2.serve.errors import ApiError
from rag2.serve.events import Events, unless_gone
from rag2.serve.serving import Serving
from rag2.types import Question

# (number of the choice, its text or piece, the answer once it is whole) -> the choice as JSON
Choice = Callable[[int, str, Answer | None], dict[str, Any]]


def router(serving: Serving) -> APIRouter:
    """The endpoints that write."""
    routes = APIRouter(tags=["answers"])

    @routes.post("/v1/chat/completions", responses=documented.streamed(documented.ChatAnswer))
    async def chat(body: Chat, request: Request) -> Response:
        """Answer the last message from documents; earlier ones are its context."""
        question = body.messages[-1].text
        most = body.max_completion_tokens or body.max_tokens
        asks = asked(body, question, header(body.messages[:-1]), most)
        head = replies.Head("chat.completion", "chatcmpl", body.model or serving.name)

        def message(number: int, text: str, answer: Answer | None) -> dict[str, Any]:
            assert answer is not None
            told = {"annotations": replies.annotations(answer), "citations": replies.cited(answer)}
            said = {"role": "assistant", "content": text, "refusal": None, **told}
            logprobs = replies.chat_logprobs(answer) if body.logprobs else None
            choice = {"index": number, "message": said, "logprobs": logprobs}
            return {**choice, "finish_reason": answer.finish}

        def delta(number: int, text: str, answer: Answer | None) -> dict[str, Any]:
            said: dict[str, Any] = {"content": text} if text else {}
            if answer is not None:
                said["annotations"] = replies.annotations(answer)
                said["citations"] = replies.cited(answer)
            logprobs = replies.chat_logprobs(answer) if answer and body.logprobs else None
            finish = answer.finish if answer else None
            return {"index": number, "delta": said, "logprobs": logprobs, "finish_reason": finish}

        if body.stream:
            first = [{"role": "assistant", "content": ""}] * len(asks)
            return streamed(serving, body, asks, head, delta, first)
        return await whole(serving, request, asks, head, message)

    @routes.post("/v1/completions", responses=documented.streamed(documented.TextAnswer))
    async def complete(body: Completion, request: Request) -> Response:
        """Answer a question, which is the prompt, from documents."""
        asks = asked(body, body.prompt, "", body.max_tokens)
        head = replies.Head("text_completion", "cmpl", body.model or serving.name)

        def choice(number: int, text: str, answer: Answer | None) -> dict[str, Any]:
            said: dict[str, Any] = {"index": number, "text": text, "logprobs": None}
            if answer is None:
                return {**said, "finish_reason": None}
            if body.logprobs is not None:
                said["logprobs"] = replies.completion_logprobs(answer)
            told = {"annotations": replies.annotations(answer), "citations": replies.cited(answer)}
            return {**said, "finish_reason": answer.finish, **told}

        if body.stream:
            return streamed(serving, body, asks, head, choice, [])
        return await whole(serving, request, asks, head, choice)

    return routes


def header(earlier: Sequence[Message]) -> str:
    """What prompts begin with: the system's messages, then earlier turns as worked examples.

    Raises ApiError for an answer without its question.
    """
    said = [m.text + GAP for m in earlier if m.role in ("system", "developer") and m.text]
    turns, question = [], None
    for message in earlier:
        if message.role == "user":
            question = message.text
        elif message.role == "assistant":
            if question is None:
                raise ApiError(422, "messages: an assistant's turn before any user's", "bad_turns")
            turns.append(Question("", question, answers=(message.text,)))
            question = None
    return "".join(said) + Prompt().header(examples=turns)


def asked(body: Sampled, question: str, header: str, most: int | None) -> list[Ask]:
    """An ask for each of the n choices; they differ by their seed."""
    options, seed = body.rag2, body.seed or 0
    spaces = None if options.namespaces is None else tuple(options.namespaces)
    return [
        Ask(
            question=question,
            header=header,
            k=options.k,
            reading=options.reading,
            namespaces=spaces,
            max_new_tokens=most,
            stop=body.stops,
            temperature=body.temperature or 0.0,
            top_p=body.top_p or 1.0,
            seed=(seed + number) % 2**64,
        )
        for number in range(body.n or 1)
    ]


async def whole(
    serving: Serving, request: Request, asks: Sequence[Ask], head: replies.Head, choice: Choice
) -> Response:
    """All answers in one response."""

    async def gathered() -> list[tuple[Answer, dict[str, Any]]]:
        found: dict[int, tuple[Answer, dict[str, Any]]] = {}
        async for number, said, work in events:
            if isinstance(said, ApiError):
                raise said
            if isinstance(said, Answer):
                total = time.monotonic() - work.began
                serving.metrics.answered(work, said, total)
                found[number] = (said, replies.made(work, said, total))
        return [found[number] for number in range(len(asks))]

    events = serving.events(asks, streamed=False)
    try:
        pairs = await unless_gone(request, gathered())
    finally:
        events.close()
    answers = [answer for answer, _ in pairs]
    choices = [choice(number, answer.text, answer) for number, answer in enumerate(answers)]
    told = {"choices": choices, "usage": replies.usage(answers), "rag2": pairs[0][1]}
    return replies.Reply(head.of(answers[0].place, **told))


def streamed(
    serving: Serving,
    body: Sampled,
    asks: Sequence[Ask],
    head: replies.Head,
    choice: Choice,
    first: Sequence[dict[str, Any]],
) -> Response:
    """Pieces as they are certain; citations come with the last one of each choice."""
    # Here, while there is still a status to say an error with.
    events = serving.events(asks, streamed=True)
    with_usage = bool(body.stream_options and body.stream_options.include_usage)

    async def pieces() -> AsyncIterator[bytes]:
        answers: list[Answer] = []
        for number, said in enumerate(first):
            opening = {"index": number, "delta": said, "logprobs": None, "finish_reason": None}
            yield replies.event(head.of(None, chunk=True, choices=[opening]))
        try:
            async for number, said, work in events:
                if isinstance(said, ApiError):
                    yield replies.event(said.body())
                    return
                if isinstance(said, str):
                    piece = [choice(number, said, None)]
                    yield replies.event(head.of(None, chunk=True, choices=piece))
                    continue
                answers.append(said)
                total = time.monotonic() - work.began
                serving.metrics.answered(work, said, total)
                told = replies.made(work, said, total)
                last = [choice(number, "", said)]
                yield replies.event(head.of(said.place, chunk=True, choices=last, rag2=told))
        except ApiError as error:  # there was no answer in time
            yield replies.event(error.body())
            return
        if with_usage:
            told_usage = replies.usage(answers)
            place = answers[0].place
            yield replies.event(head.of(place, chunk=True, choices=[], usage=told_usage))
        yield b"data: [DONE]\n\n"

    return Stream(events, pieces())


class Stream(StreamingResponse):
    """Server-sent events; whatever becomes of the response, what was taken for it is freed."""

    def __init__(self, events: Events, pieces: AsyncIterator[bytes]) -> None:
        headers = {"cache-control": "no-cache"}
        super().__init__(pieces, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._events.close()
