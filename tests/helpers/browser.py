"""A page opened in a real headless browser, driven over Chromium's DevTools protocol by two pipes.

What the browser reports is kept: requests it wanted to make, lines on its console, errors.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
# No sandbox: containers seldom allow one, and the only page opened is our own.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking"
    " --disable-component-update --no-first-run --remote-debugging-pipe"
).split()


def executable() -> str:
    """The browser of this machine; without one the test is skipped, in CI it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found:
        return found
    missing = f"no browser on PATH ({', '.join(NAMES)})"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


class Page:
    """One tab; `requests`, `complaints` grow while it is used."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._buffer, self._calls = write, read, b"", 0
        self._session: str | None = None
        self.requests: list[str] = []
        """addresses of everything asked for beyond the page itself"""
        self.complaints: list[str] = []
        """console lines, uncaught errors, what the Content-Security-Policy stopped"""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a file and wait until it and its script are done."""
        self.visit(path.absolute().as_uri() + fragment)

    def visit(self, address: str) -> None:
        """Load an address and wait until it and its script are done."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.protocol !== 'about:'")

    def look(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 10.0) -> None:
        """Until the expression is true."""
        until = time.monotonic() + seconds
        while not self.look(expression):
            assert time.monotonic() < until, f"never true: {expression}"

    def click(self, selector: str) -> None:
        """Press the mouse on the middle of an element, as a person would."""
        box = self.look(
            f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect().toJSON()))"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def type(self, text: str) -> None:
        """Into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """A key, such as `Tab` or `Enter`."""
        text = {"text": {"Enter": "\r"}.get(key, key)} if key in ("Enter", "/") else {}
        code = {"Enter": 13, "Tab": 9, "Escape": 27, "/": 191}[key]
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text
            )

    def resize(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Give the window another width, and the person another taste."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path, whole: bool = True) -> None:
        """The whole page, or what the window shows of it, as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A DevTools command and its answer."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._calls:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _receive(self, seconds: float = 20.0) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], seconds)
            assert ready, "the browser does not answer"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has died"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: str, facts: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent" and facts["type"] != "Document":
            self.requests.append(facts["request"]["url"])
        elif event == "Runtime.consoleAPICalled":
            self.complaints.append(f"{facts['type']}: {facts['args']}")
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(facts["exceptionDetails"]))
        elif event == "Log.entryAdded":
            self.complaints.append(facts["entry"]["text"])


@contextmanager
def browse() -> Iterator[Page]:
    """A browser with an empty profile, ended on leaving."""
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads commands from descriptor 3 and answers on 4.
        shell = f'exec "$0" "$@" 3<&{command_read} 4>&{answer_write}'
        process = subprocess.Popen(
            ["bash", "-c", shell, executable(), *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        try:
            yield Page(command_write, answer_read)
        finally:
            os.close(command_write)  # at the end of its commands the browser ends
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(answer_read)
