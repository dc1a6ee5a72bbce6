"""One bad request, one client that leaves, one failing thread: the others get their answers."""

import asyncio
import gc
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

import serve_faults
import storm_answers
from rag2.answering.ask import Ask
from rag2.answering.draft import Draft
from rag2.answering.rag import Rag
from rag2.evaluation.questions import load_questions
from rag2.generator.mixture import Mixtures
from rag2.registry import UserError
from rag2.serve import refusal
from rag2.serve.engine import Engine
from rag2.serve.limits import Limits
from rag2.serve.refusal import Refusal
from rag2.serve.server import Server, serve
from rag2.serve.serving import Serving
from rag2.serve.work import Work
from small_systems import TOKEN, served, small_system
from wire import Reader, asked, chat, check_error, connected, edited, events, exchange, request


@pytest.fixture(scope="module")
def system(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rag]:
    """Random models over the small world."""
    with small_system(home, tmp_path_factory.mktemp("engine"), max_new_tokens=6) as rag:
        yield rag


@pytest.fixture(scope="module")
def questions(home: Path) -> list[str]:
    """The small world's."""
    return [q.question for q in load_questions(home / "data" / "questions.jsonl")]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Faults of helpers/serve_faults.py are taken back after the test."""
    places = [(Rag, "drafts"), (Draft, "take"), (Mixtures, "add"), (Engine, "give_up")]
    for place, name in places:
        monkeypatch.setattr(place, name, getattr(place, name))
    return monkeypatch


@pytest.fixture
def opened() -> Iterator[Callable[[Server], socket.socket]]:
    """Connections that are closed after the test."""
    with ExitStack() as stack:
        yield lambda server: stack.enter_context(connected(server.address))


class Slow:
    """A call that takes its time in the engine, to queue up behind."""

    def __init__(self, engine: Engine) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.work = Work(self._run, lambda _: None, time.monotonic() + 60)
        engine.submit([self.work])
        assert self.begun.wait(10)

    def _run(self) -> None:
        self.begun.set()
        self.go.wait(30)


def test_a_client_that_leaves_the_queue_frees_its_place_at_once(
    opened: Any, system: Rag, questions: list[str]
):
    with served(system, Limits(waiting=2)) as server:
        engine = server.serving.engine
        assert isinstance(engine, Engine)
        slow = Slow(engine)
        lines = [opened(server) for _ in range(2)]
        for number, line in enumerate(lines):
            line.sendall(chat(questions[0], stream=bool(number)))
        _until(lambda: engine.waiting == 2)
        full = exchange(server.address, chat(questions[0]))
        assert full is not None and full.status == 429 and full.headers["retry-after"]
        for line in lines:
            line.close()
        _until(lambda: engine.waiting == 0)  # while the engine is still busy with the call
        assert not slow.go.is_set()
        slow.go.set()
        got = exchange(server.address, chat(questions[0]))
        assert got is not None and got.status == 200 and engine.live == 0


def test_clients_that_leave_leave_nothing_behind(
    opened: Any, system: Rag, questions: list[str], seed: int, planted: pytest.MonkeyPatch
):
    with served(system) as server:
        assert not storm_answers.leave(server.address, questions, 40, seed)
        engine = server.serving.engine
        _until(lambda: engine.waiting == engine.live == 0, 10)
        threads = threading.active_count()
        assert not storm_answers.leave(server.address, questions, 20, seed + 1)
        _until(lambda: engine.waiting == engine.live == 0, 10)
        assert threading.active_count() <= threads + 1
    serve_faults.deaf()
    with served(system, Limits(waiting=2)) as server:
        engine = server.serving.engine
        assert isinstance(engine, Engine)
        slow = Slow(engine)
        line = opened(server)
        line.sendall(chat(questions[0]))
        _until(lambda: engine.waiting == 1)
        line.close()
        time.sleep(0.3)
        assert engine.waiting == 1  # what the test before would have found
        slow.go.set()


def test_poison_fails_alone_and_its_text_is_not_logged(
    system: Rag, questions: list[str], planted: pytest.MonkeyPatch, seed: int,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    serve_faults.poisoned()
    with served(system) as server, caplog.at_level(logging.DEBUG):
        told = storm_answers.poisoned(server.address, questions, 60, seed)
        for kind in storm_answers.POISONS[:2]:
            got = exchange(server.address, chat(f"A {kind}?"))
            assert got is not None and got.status == 500
            check_error(got)
    assert not told["first"] and told["differ"] == 0
    assert "RuntimeError" in caplog.text and "poison of search" not in caplog.text


@pytest.mark.parametrize("how", ["crash here", "hang here"])
def test_an_engine_that_fails_ends_the_server_which_says_so_before(
    system: Rag, planted: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
):
    serve_faults.asleep()
    planted.setattr("rag2.serve.server.PATIENCE", 1)
    serving = Serving(Limits(stuck_seconds=0.3), "small", TOKEN)
    server, ready, codes = Server(serving, lambda: system, "127.0.0.1", 0), threading.Event(), []

    def run() -> None:
        try:
            server.answer(ready.set)
        except SystemExit as ended:
            codes.append(ended.code)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    assert asked(server.address, "GET", "/health").status == 200
    got = exchange(server.address, chat(how))
    assert got is not None and got.status == 500 and got.json["error"]["code"] == "engine_failed"
    thread.join(20)
    assert codes == [1] and serving.state() == "failed" and "engine" in serving.broken
    assert any(record.levelno == logging.CRITICAL for record in caplog.records)


def test_health_and_ready_say_503_once_the_engine_has_failed(
    system: Rag, planted: pytest.MonkeyPatch
):
    planted.setattr(Server, "on_tick", uvicorn.Server.on_tick)  # it does not end by itself
    serve_faults.asleep()
    with served(system) as server:
        got = exchange(server.address, chat("crash here"))
        assert got is not None and got.status == 500
        for path in ("/health", "/ready"):
            got = asked(server.address, "GET", path)
            assert got.status == 503 and got.json["status"] == "failed" and got.json["reason"]
        assert asked(server.address, "POST", "/v1/retrieve", {"query": "a"}).status == 503


def test_who_waits_for_an_engine_that_hangs_is_told_in_time(system: Rag, questions: list[str]):
    with served(system, Limits(deadline=0.5)) as server:
        engine = server.serving.engine
        assert isinstance(engine, Engine)
        slow = Slow(engine)
        began = time.monotonic()
        got = exchange(server.address, chat(questions[0]))
        assert got is not None and got.status == 408 and time.monotonic() - began < 5
        check_error(got)
        slow.go.set()


def test_a_stream_that_has_begun_is_answered_though_the_queue_filled_up(
    opened: Any, system: Rag, questions: list[str]
):
    with served(system, Limits(waiting=1)) as server:
        engine = server.serving.engine
        assert isinstance(engine, Engine)
        slow = Slow(engine)
        line = opened(server)
        line.sendall(chat(questions[0], stream=True, n=1))
        _until(lambda: engine.waiting == 1)
        full = exchange(server.address, chat(questions[0], stream=True))
        assert full is not None and full.status == 429  # not a stream that ends in an error
        slow.go.set()
        got = Reader(line).next()
        assert got is not None and got.status == 200 and events(got)


def test_a_refusal_on_the_short_way_is_the_one_of_the_long_way(system: Rag, questions: list[str]):
    with served(system, Limits(waiting=1)) as server:
        engine = server.serving.engine
        assert isinstance(engine, Engine)
        slow = Slow(engine)
        engine.submit([Work(Ask("a"), lambda _: None, time.monotonic() + 60)])
        short = chat(questions[0])
        long = short.replace(b"host: localhost", b"host: localhost\r\nexpect: 100-continue")
        refuse = Refusal(server.serving).of
        assert refuse(short) and not refuse(long) and not refuse(short[:-1])
        assert not refuse(short + b"a") and not refuse(request("GET", "/health"))
        one, other = (exchange(server.address, data) for data in (short, long))
        assert one and other and one.status == other.status == 429 and one.json == other.json
        assert one.headers["retry-after"] == other.headers["retry-after"]
        with connected(server.address) as line:  # and the connection goes on
            reader = Reader(line)
            for data, status in ((short, 429), (request("GET", "/health"), 200), (short, 429)):
                line.sendall(data)
                got = reader.next()
                assert got is not None and got.status == status
        slow.go.set()


def test_the_event_loop_rests_once_for_all_that_is_refused_in_one_go(
    monkeypatch: pytest.MonkeyPatch,
):
    rests: list[float] = []
    monkeypatch.setattr(refusal, "sleep", rests.append)
    loop, refused = asyncio.new_event_loop(), Refusal(Serving(Limits(), "a", "b"))
    for count in (10, 1):
        for _ in range(count):
            refused.rest(loop)
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert rests == [refusal.REST] * 2


@pytest.mark.parametrize("streamed", [True, False])
def test_pieces_are_told_of_what_is_streamed_alone(
    system: Rag, questions: list[str], streamed: bool
):
    told: list[Any] = []
    engine = Engine(system, Limits())
    until = time.monotonic() + 60
    engine.submit([Work(Ask(questions[0], max_new_tokens=12), told.append, until, streamed)])
    assert engine.close(30)
    *pieces, answer = told
    assert answer.text == system.answer(questions[0], max_new_tokens=12).text
    assert "".join(pieces) == (answer.text if streamed else "")


def test_a_signal_ends_the_server_when_all_that_it_took_is_answered(
    opened: Any, system: Rag, questions: list[str]
):
    with served(system) as server:
        engine = server.serving.engine
        assert isinstance(engine, Engine)
        slow = Slow(engine)
        kept = opened(server)
        lines = [opened(server) for _ in range(6)]
        for number, line in enumerate(lines):
            line.sendall(chat(questions[number], stream=bool(number % 2)))
        _until(lambda: engine.waiting == 6)
        server.handle_exit(15, None)
        kept.sendall(request("GET", "/ready"))
        got = Reader(kept).next("GET")
        assert got is not None and got.status == 503 and got.json == {"status": "draining"}
        got = exchange(server.address, chat(questions[0]))
        assert got is not None and got.status == 503 and got.json["error"]["code"] == "draining"
        check_error(got)
        slow.go.set()
        for number, line in enumerate(lines):
            answer = Reader(line).next()
            assert answer is not None and answer.status == 200
            assert events(answer) if number % 2 else storm_answers.texts(answer)


def test_no_more_prompts_are_read_at_once_than_there_may_be(
    system: Rag, planted: pytest.MonkeyPatch, questions: list[str]
):
    counted, add = [], Mixtures.add

    def spied(self: Mixtures, mixtures: Any) -> None:
        add(self, mixtures)
        counted.append(sum(len(mixture.contexts) for mixture in self.live))

    planted.setattr(Mixtures, "add", spied)
    with served(system, Limits(rows=6)) as server, ExitStack() as stack:
        engine = server.serving.engine
        assert isinstance(engine, Engine)
        slow = Slow(engine)
        counted.clear()
        lines = [stack.enter_context(connected(server.address)) for _ in range(7)]
        for line, question in zip(lines, questions, strict=False):
            line.sendall(chat(question, rag2={"k": 3, "reading": "marginal"}))
        _until(lambda: engine.waiting == 7)
        slow.go.set()
        assert all((got := Reader(line).next()) and got.status == 200 for line in lines)
    assert max(counted) == 6


def test_a_process_that_serves_keeps_what_it_loaded_for_good(monkeypatch: pytest.MonkeyPatch):
    loaded, codes = [[]], list[int]()  # the collector knows of lists

    def answer(self: Server, when_ready: Callable[[], None]) -> None:
        assert any(known is loaded for known in gc.get_objects())
        assert self.load() is loaded
        when_ready()
        self.socket.close()

    monkeypatch.setattr(Server, "answer", answer)
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    try:
        serve(lambda: loaded, "small", "127.0.0.1", 0, TOKEN)  # pyright: ignore
        assert codes == [0] and not any(known is loaded for known in gc.get_objects())
    finally:
        gc.unfreeze()


def test_a_system_that_cannot_answer_is_not_ready():
    def answer(*_: Any, **__: Any) -> None:
        raise RuntimeError("the model is broken")

    serving = Serving(Limits(), "small", TOKEN)
    with pytest.raises(RuntimeError, match="broken"):
        serving.start(SimpleNamespace(answer=answer))  # pyright: ignore[reportArgumentType]
    assert serving.state() == "starting"


def test_what_is_newer_than_the_index_is_built_into_it_once_it_is_much(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def put(server: Server, count: int, name: str) -> None:
        documents = [{"id": f"{name}{n}", "text": f"News {name} {n}."} for n in range(count)]
        got = edited(server.address, "POST", "/v1/documents", {"documents": documents})
        assert got.status == 200

    def indexed() -> int:
        base = rag.live.view().base
        return 0 if base is None else len(base.index)

    with small_system(home, tmp_path) as rag, served(rag) as server:
        monkeypatch.setattr("rag2.serve.serving.NEWER", 20)
        first = indexed()
        put(server, 3, "few")
        assert server.serving._refreshing is None
        put(server, max(40, first // 5), "many")
        _until(lambda: indexed() > first and rag.live.view().delta is None, 20)


def test_a_system_that_cannot_be_loaded_is_never_ready_but_alive():
    go = threading.Event()

    def load() -> Any:
        go.wait(30)
        raise UserError("index/index.faiss: not as the manifest says")

    serving = Serving(Limits(), "small", TOKEN)
    server, failed = Server(serving, load, "127.0.0.1", 0), list[UserError]()

    def run() -> None:
        try:
            server.answer(lambda: None)
        except UserError as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    _until(lambda: server.started)
    assert asked(server.address, "GET", "/health").json == {"status": "ok"}
    for method, path in (("GET", "/ready"), ("POST", "/v1/retrieve"), ("GET", "/v1/models")):
        assert asked(server.address, method, path, {"query": "a"}).status == 503
    assert asked(server.address, "GET", "/metrics").status == 200
    go.set()
    thread.join(10)
    assert "manifest" in str(failed[0]) and serving.state() == "failed"


def _until(true: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)
