"""HTTP as bytes on a socket: what is sent is exactly what a test says."""

import json
import socket
from dataclasses import dataclass
from typing import Any

import h11

TOKEN = "a-token-of-tests"


@dataclass(slots=True)
class Got:
    """A response, whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def request(
    method: str, target: str, body: Any = None, headers: dict[str, str] | None = None
) -> bytes:
    """The bytes of a request; `body` is JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    told = {
        "host": "localhost",
        "content-type": "application/json",
        "content-length": str(len(data)),
    }
    lines = [f"{name}: {value}" for name, value in (told | (headers or {})).items() if value]
    return "\r\n".join([f"{method} {target} HTTP/1.1", *lines, "", ""]).encode() + data


def chat(question: str, **more: Any) -> bytes:
    """A question as a chat request."""
    messages = [{"role": "user", "content": question}]
    return request("POST", "/v1/chat/completions", {"messages": messages, **more})


def connected(address: str, seconds: float = 30, receive: int | None = None) -> socket.socket:
    """A connection to http://host:port; `receive` is the size of its receive buffer, in bytes."""
    host, port = address.removeprefix("http://").split(":")
    wire = socket.socket()
    if receive:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    wire.settimeout(seconds)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        wire.connect((host, int(port)))
    except OSError:
        wire.close()
        raise
    return wire


class Reader:
    """Responses of one connection, one after another."""

    def __init__(self, wire: socket.socket) -> None:
        self.wire, self.rest = wire, b""

    def next(self, method: str = "POST") -> Got | None:
        """The next one; None if the connection ends before it begins.

        Raises h11.RemoteProtocolError for one that is no HTTP or is cut, TimeoutError.
        """
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=method, target="/", headers=[("host", "localhost")]))
        client.send(h11.EndOfMessage())
        if self.rest:
            client.receive_data(self.rest)
        got: Got | None = None
        while True:
            event = client.next_event()
            if event is h11.NEED_DATA:
                try:
                    data = self.wire.recv(1 << 16)
                except ConnectionError:
                    data = b""
                if not data and got is None and not client.trailing_data[0]:
                    return None
                client.receive_data(data)
            elif isinstance(event, h11.Response):
                headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
                got = Got(event.status_code, headers, b"")
            elif isinstance(event, h11.Data):
                assert got
                got.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self.rest = client.trailing_data[0]
                return got


def exchange(address: str, data: bytes, seconds: float = 30) -> Got | None:
    """One request on a connection of its own, and its response."""
    method = data.split(b" ", 1)[0].decode("latin-1")
    with connected(address, seconds) as wire:
        try:
            wire.sendall(data)
        except ConnectionError:
            pass  # it may have answered before it was closed
        return Reader(wire).next(method if method == "HEAD" else "POST")


def asked(address: str, method: str, target: str, body: Any = None, **headers: str) -> Got:
    """The same, where there must be a response."""
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    got = exchange(address, request(method, target, body, told))
    assert got is not None, f"{method} {target}: no response"
    return got


def edited(address: str, method: str, target: str, body: Any = None) -> Got:
    """A change of documents, with the token."""
    return asked(address, method, target, body, authorization=f"Bearer {TOKEN}")


def events(got: Got) -> list[dict[str, Any]]:
    """What a stream told; it must have ended as streams do."""
    *told, done, rest = got.body.split(b"\n\n")
    assert done == b"data: [DONE]" and not rest, got.body[-300:]
    return [json.loads(event.removeprefix(b"data: ")) for event in told]


def check_error(got: Got) -> None:
    """AssertionError for an error that is not in OpenAI's shape."""
    assert got.headers.get("content-type") == "application/json", got
    error = got.json["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code"))
    assert error["param"] is None or isinstance(error["param"], str)
