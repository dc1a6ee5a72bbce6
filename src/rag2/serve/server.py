"""`rag2 serve`: listen first, load, answer, and on SIGTERM finish what was accepted."""

import asyncio
import gc
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import uvicorn

from rag2.answering.remote import System
from rag2.registry import UserError
from rag2.serve.app import build
from rag2.serve.limits import Limits
from rag2.serve.protocol import protocol
from rag2.serve.refusal import Refusal
from rag2.serve.serving import Serving

logger = logging.getLogger(__name__)
PATIENCE = 5  # seconds for connections to close once all is answered


class Server(uvicorn.Server):
    """One process; its port is open while the system is loaded, and /ready says so."""

    def __init__(self, serving: Serving, load: Callable[[], System], host: str, port: int) -> None:
        """Raises UserError for an address that cannot be listened on."""
        self.serving, self.load = serving, load
        self.socket = _listen(host, port)
        self.failed: UserError | None = None
        self.broken = False
        """whether the engine failed"""
        self._rag: System | None = None
        config = uvicorn.Config(
            build(serving),
            http=protocol(serving.limits, Refusal(serving)),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=serving.limits.header_bytes,
            timeout_keep_alive=max(1, round(serving.limits.read_seconds)),
            timeout_graceful_shutdown=PATIENCE,
        )
        super().__init__(config)

    @property
    def address(self) -> str:
        """http://host:port as it was bound."""
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: an engine that answers no more ends the process."""
        engine = self.serving.running
        if engine is not None and engine.failure and not self.should_exit:
            logger.critical("%s: the server ends", engine.failure)
            self.serving.abandon()
            self.broken = self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal drains; the second ends at once."""
        if self.serving.draining:
            self.force_exit = self.should_exit = True
            return
        self.serving.draining = True
        threading.Thread(target=self._drain, daemon=True).start()

    def answer(self, when_ready: Callable[[], None]) -> None:
        """Serve until a signal ends it.

        Raises UserError for a system that cannot be loaded, and SystemExit, 1, for an engine that
        crashed or hangs, so that a supervisor starts the server again.
        """
        threading.Thread(target=self._load, args=(when_ready,), daemon=True).start()
        try:
            with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
                runner.run(self.serve(sockets=[self.socket]))
        finally:
            if self._rag is not None and not self.broken:
                self._rag.close()
        if self.broken:
            raise SystemExit(1)
        if self.failed is not None:
            raise self.failed

    def _load(self, when_ready: Callable[[], None]) -> None:
        try:
            self._rag = self.load()
            self.serving.start(self._rag)
        except UserError as error:
            self.failed = error
        except Exception as error:
            logger.exception("the system cannot be loaded")
            self.failed = UserError(f"the system cannot be loaded: {error}")
        if self.failed is not None:
            self.serving.failure = str(self.failed)
            self.should_exit = True
            return
        when_ready()

    def _drain(self) -> None:
        if not self.serving.drain():
            logger.error("not all that was accepted could be answered in time")
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Named, or asyncio leaves Nagle's algorithm on: 40 ms more a request.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.set_inheritable(True)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listening


def settled(system: System) -> System:
    """The same; what is loaded by now is kept for good, in a process that only serves.

    A full collection would walk through it, a million objects: .4 s in which nothing is read.
    """
    gc.collect()
    gc.freeze()
    return system


def token_for(given: str | None) -> str:
    """The token that changes take; a random one where none is given."""
    if given is not None and (not given.isascii() or not given.isprintable() or len(given) < 8):
        raise UserError("--token: 8 or more printable ASCII characters")
    return given or secrets.token_urlsafe(24)


def hosts_of(host: str, allowed: Sequence[str]) -> list[str]:
    """The names, in lower case, that requests may give a server on this host; none: any.

    On a loopback address, however it is written, its own. Raises UserError for no address at all.
    """
    try:
        found = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(f"--host {host!r}: {error.strerror or error}") from None
    bound = ip_address(found.partition("%")[0])
    inner = getattr(bound, "ipv4_mapped", None) or bound
    own = []
    if inner.is_loopback:
        own = ["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host]
    names = [*own, *allowed] if own or allowed else []
    return list(dict.fromkeys(name.lower() for name in names))


def serve(
    load: Callable[[], System],
    name: str,
    host: str,
    port: int,
    token: str | None,
    allowed: Sequence[str] = (),
) -> None:
    """Answer until a signal ends it, and the process with it. Raises UserError as `Server` does."""
    made = token_for(token)
    serving = Serving(Limits(hosts=hosts_of(host, allowed)), name, made)
    server = Server(serving, lambda: settled(load()), host, port)

    def tell() -> None:
        shown = server.address if token else f"{server.address}/#token={made}"
        with suppress(BrokenPipeError):
            print(f"ready: {shown}", flush=True)  # noqa: T201 (the command's output)

    code = 0
    try:
        server.answer(tell)
    except SystemExit as ended:
        code = int(ended.code or 0)
    # All is closed: to free the libraries takes seconds more, and a thread may hang for ever.
    logging.shutdown()
    os._exit(code)
