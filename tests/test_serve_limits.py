"""What is too large, too deep, too many or too slow costs next to nothing and hurts nobody else."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import serve_faults
import storm_limits
from rag2.answering.rag import Rag
from rag2.registry import UserError
from rag2.serve import server as module
from rag2.serve.errors import ApiError
from rag2.serve.guard import check_json
from rag2.serve.limits import Limits
from rag2.serve.server import Server, hosts_of
from small_systems import served, small_system
from wire import Reader, asked, check_error, connected, exchange, request


@pytest.fixture(scope="module")
def system(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rag]:
    """Random models over the small world."""
    with small_system(home, tmp_path_factory.mktemp("limited"), max_new_tokens=2) as rag:
        yield rag


@pytest.fixture(scope="module")
def server(system: Rag) -> Iterator[Server]:
    """A server of it."""
    with served(system) as server:
        yield server


def test_a_small_answer_is_not_held_back_for_a_larger_packet(server: Server):
    with connected(server.address, 5) as line:
        line.sendall(request("GET", "/health"))
        assert Reader(line).next() is not None
        transports = [c.transport for c in server.server_state.connections]  # pyright: ignore
        (ours,) = (
            transport.get_extra_info("socket")
            for transport in transports
            if transport.get_extra_info("peername") == line.getsockname()
        )
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_every_number_beyond_its_bounds_is_422(server: Server):
    wrong = [case for case in storm_limits.beyond(server.address, _refused()) if case["wrong"]]
    assert not wrong


def _refused() -> list[storm_limits.Case]:
    return [case for case in storm_limits.numbers() if case[2] == {422}]


@pytest.mark.parametrize("case", storm_limits.bombs() + storm_limits.sizes(), ids=lambda c: c[0])
def test_what_is_too_large_is_refused(server: Server, case: storm_limits.Case):
    (got,) = storm_limits.beyond(server.address, [case])
    assert not got["wrong"]


def test_a_bomb_is_not_parsed(seed: int):
    keys = "{" + ",".join(f'"{n:x}":0' for n in range(400_000)) + "}"
    for text in (keys, "[" * 200_000, '{"a":"' + ',"a":'.join(['"'] * 300_000)):
        began = time.process_time()
        with pytest.raises(ApiError, match="more than 65536 values"):
            check_json(text.encode(), 64, 1 << 16)
        # Parsing the first takes 200 ms of a core of 2023; the bound has room for a busy machine.
        assert time.process_time() - began < 0.15


def test_commas_in_a_text_are_not_values():
    check_json(b'{"text": "' + b"a, [b]: {c}, " * 20_000 + b'\\", \\\\"}', 64, 1 << 16)


def test_a_body_is_refused_before_it_is_sent(server: Server):
    head = request("POST", "/v1/retrieve", headers={"content-length": str(1 << 30)})
    with connected(server.address, 5) as line:
        line.sendall(head)
        got = Reader(line).next()
    assert got is not None and got.status == 413
    check_error(got)


def test_bodies_are_bounded_together(system: Rag):
    with served(system, Limits(bodies=1 << 20)) as server:
        part = request("POST", "/v1/retrieve", b"a" * (700 << 10))
        with connected(server.address) as first, connected(server.address) as second:
            first.sendall(part[:-10])
            time.sleep(0.2)
            second.sendall(part[:-10])
            got = Reader(second).next()
            assert got is not None and got.status == 429
            check_error(got)
            first.sendall(part[-10:])
            other = Reader(first).next()
            assert other is not None and other.status == 422
        assert asked(server.address, "POST", "/v1/retrieve", {"query": "a"}).status == 200


def test_requests_on_one_connection_are_answered_in_order(server: Server):
    assert [got.status for got in storm_limits.pipelined(server.address)] == [200, 404, 200]


def test_slow_clients_are_closed_and_others_do_not_notice(system: Rag, seed: int):
    with served(system, Limits(read_seconds=1)) as server:
        slow = storm_limits.Slow(server.address, 10, seed, 15)
        slow.start()
        healthy = storm_limits.healthy(server.address, 1.5)
        slow.join()
        assert not slow.left and healthy
        assert {kind for kind, _ in slow.closed} == {"silent", "headers", "body", "chunks", "deaf"}
        # Deaf ones first get what fits into the buffers on the way.
        assert all(0.9 < seconds < 5 for kind, seconds in slow.closed if kind != "deaf")
        assert exchange(server.address, request("GET", "/health")) is not None


def test_the_slow_are_found_where_nothing_closes_them(
    system: Rag, monkeypatch: pytest.MonkeyPatch, seed: int
):
    monkeypatch.setattr(module, "protocol", module.protocol)
    serve_faults.no_patience()
    with served(system, Limits(read_seconds=1)) as server:
        slow = storm_limits.Slow(server.address, 5, seed, 2.5)
        slow.start()
        slow.join()
        assert len(slow.left) >= 4


OURS = {"localhost", "127.0.0.1", "[::1]"}


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "LOCALHOST", "127.1.2.3", "::1", "0:0:0:0:0:0:0:1", "::ffff:127.0.0.1"]
)
def test_a_loopback_address_has_names_of_its_own_however_it_is_written(host: str):
    names = hosts_of(host, ["MyBox"])
    assert OURS < {*names} and "mybox" in names and names == [name.lower() for name in names]


def test_other_addresses_have_the_names_that_are_given_or_any():
    assert hosts_of("0.0.0.0", []) == hosts_of("::", []) == []
    assert hosts_of("0.0.0.0", ["Box.example"]) == ["box.example"]
    with pytest.raises(UserError, match="--host 'no host at all'"):
        hosts_of("no host at all", [])


def test_a_name_that_was_allowed_is_known_in_any_case(system: Rag):
    with served(system, Limits(hosts=hosts_of("127.0.0.1", ["MyBox"]))) as server:
        for name, status in (("MYBOX:80", 200), ("mybox", 200), ("yourbox", 400)):
            with connected(server.address, 5) as line:
                line.sendall(b"GET /health HTTP/1.1\r\nhost: %s\r\n\r\n" % name.encode())
                got = Reader(line).next()
                assert got is not None and got.status == status
