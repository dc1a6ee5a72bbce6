"""Hostile bytes are refused in words: no 500, no silence, no traceback."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import serve_faults
from hostile_requests import answered, hostile
from rag2.answering.rag import Rag
from rag2.serve import app
from rag2.serve.limits import Limits
from rag2.serve.server import Server
from small_systems import served, small_system
from wire import check_error, exchange, request


@pytest.fixture(scope="module")
def system(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rag]:
    """Random models over the small world, with short answers."""
    with small_system(home, tmp_path_factory.mktemp("fuzzed"), max_new_tokens=2) as rag:
        yield rag


@pytest.fixture
def server(system: Rag) -> Iterator[Server]:
    """A server of it."""
    with served(system) as server:
        yield server


def test_random_hostile_requests_get_no_500_and_leave_no_traceback(
    server: Server, seed: int, caplog: pytest.LogCaptureFixture, script
):
    with caplog.at_level(logging.ERROR):
        statuses, found = script("serve_fuzz").fuzz(server.address, range(250), seed)
    assert not found and not caplog.records
    assert statuses[200] > 20 and statuses[422] > 20 and statuses[400] > 5


def test_the_same_requests_find_the_500s_of_stock_error_handling(
    system: Rag, monkeypatch: pytest.MonkeyPatch, seed: int, script
):
    for name in ("Guard", "_errors"):
        monkeypatch.setattr(app, name, getattr(app, name))
    serve_faults.stock_errors()
    with served(system) as server:
        _, found = script("serve_fuzz").fuzz(server.address, range(100), seed)
    assert any(item["wrong"] == "status 500" for item in found)


@pytest.mark.parametrize(
    "body",
    [
        b'{"query": "\\ud800"}', b'{"query": NaN}', b'{"query": 1e999}', b"\xff\xfe", b"{", b"'a'",
        b'{"query": "a", "query": "b", "k": []}', b"[]", b'"a"', b"null", b'{"query": "\x00"}',
    ],
)  # fmt: skip
def test_what_is_no_good_json_is_422(server: Server, body: bytes):
    got = exchange(server.address, request("POST", "/v1/retrieve", body))
    assert got is not None and got.status == 422
    check_error(got)


def test_a_body_that_breaks_while_its_request_is_refused_leaves_no_traceback(
    system: Rag, caplog: pytest.LogCaptureFixture
):
    chunked = {"transfer-encoding": "chunked", "content-length": "", "host": "evil"}
    broken = request("POST", "/v1/retrieve", b"no chunk\r\n", chunked)
    with caplog.at_level(logging.ERROR), served(system, Limits(hosts=["x"])) as server:
        for _ in range(5):
            got = exchange(server.address, broken)
            assert got is not None and got.status == 400
            check_error(got)
    assert not caplog.records


def test_half_a_request_is_owed_nothing_and_a_whole_one_a_response(dice: random.Random):
    whole = request("POST", "/v1/retrieve", {"query": "a"})
    assert answered(whole) == 1 and answered(whole[: dice.randrange(1, len(whole))]) == 0
    assert answered(b"") == 0 and answered(b"no HTTP at all\r\n\r\n") == 1
    made = {hostile(random.Random(f"{n}")) for n in range(50)}
    assert len(made) == 50, "requests that are not random"
