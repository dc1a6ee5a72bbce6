"""What a person does with the page of a server, and what there is to see."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser import Page
from demos import ROOT, SOURCES
from small_systems import TOKEN

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/#token=\S+")


@contextmanager
def commanded(export: Path) -> Iterator[str]:
    """The address that `rag2 serve` prints in a process of its own, which then ends well."""
    command = [sys.executable, "-m", "rag2", "serve", str(export), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": SOURCES}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        try:
            yield next(filter(None, map(ADDRESS.search, process.stdout)))[0]
        finally:
            process.terminate()
    assert process.returncode == 0


def visit(tab: Page, address: str) -> None:
    """Open it in a wide window and wait for the settings."""
    tab.resize(1280)
    tab.visit(address)
    tab.wait("document.querySelector('.arm') !== null")


@contextmanager
def watched(tab: Page, server: str) -> Iterator[Page]:
    """The page with the token; by the end it has asked nobody else, and nothing has broken."""
    visit(tab, f"{server}/#token={TOKEN}")
    tab.requests.clear()
    tab.complaints.clear()
    yield tab
    assert tab.look("window.broken") is None and tab.complaints == []
    assert all(address.startswith(server) for address in tab.requests)


def texts(page: Page, selector: str) -> list[str]:
    """What is to be read in each of these elements."""
    return page.look(
        f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText)"
    )


def write(page: Page, selector: str, text: str) -> None:
    """Replace what a field holds by typing."""
    page.look(f"document.querySelector({json.dumps(selector)}).select()")
    page.look(f"document.querySelector({json.dumps(selector)}).focus()")
    page.type(text)


def ask(page: Page, question: str) -> str:
    """Type a question, press Enter; the answer of the first arm."""
    write(page, "#question", question)
    page.press("Enter")
    return answered(page)


def answered(page: Page) -> str:
    page.wait("document.querySelector('.answer').textContent !== ''")
    page.wait("document.querySelector('#go').textContent === 'Ask'")
    # Without the numbers of its sources.
    return page.look("document.querySelector('.answer').firstChild.textContent")


def put(server: str, namespace: str = "", **document: Any) -> None:
    """A document by the API."""
    body = json.dumps({"documents": [document], "namespace": namespace}).encode()
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    urllib.request.urlopen(
        urllib.request.Request(server + "/v1/documents", body, headers), timeout=9
    )


def stubbed(page: Page, pieces: list[str], status: int = 200, end: str = "close") -> None:
    """Let requests be answered with these events, and then: `close`, `wait` on, or `break` off."""
    body = json.dumps("".join(f"data: {piece}\n\n" for piece in pieces))
    ends = {"wait": "signal.onabort = () => it.error(signal.reason)", "close": "it.close()"}
    end = ends.get(end, "setTimeout(() => it.error(new TypeError('network error')))")
    page.look(
        f"window.fetch = async (path, {{signal}}) => new Response(new ReadableStream({{start(it) {{"
        f" it.enqueue(new TextEncoder().encode({body})); {end}; }}}}),"
        f" {{status: {status}, headers: {{'Retry-After': '7'}}}})"
    )


def delta(**fields: Any) -> str:
    """A piece of a streamed answer."""
    return json.dumps({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})


def assert_contrast(page: Page, selectors: list[str]) -> None:
    """Letters stand out by 4.5 to 1 (WCAG 2, level AA)."""
    for selector in selectors:
        assert page.look(CONTRAST % json.dumps(selector)) >= 4.5, selector


# The contrast ratio of an element's letters (WCAG 2, 1.4.3) against the layers behind them.
CONTRAST = """(selector => {
  const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const layers = [];
  for (let e = document.querySelector(selector); e; e = e.parentElement) layers.push(e);
  const mixed = ink => {
    paint.fillStyle = getComputedStyle(document.body).backgroundColor;
    paint.fillRect(0, 0, 1, 1);
    for (const e of layers.toReversed()) {
      paint.fillStyle = getComputedStyle(e).backgroundColor;
      paint.fillRect(0, 0, 1, 1);
    }
    if (ink) paint.fillStyle = getComputedStyle(layers[0]).color, paint.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [ink, paper] = [mixed(true), mixed(false)];
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
})(%s)"""
