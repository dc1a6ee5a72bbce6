"""Clients that leave, documents that change, neighbours in a batch: are answers still right?"""

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from wire import Got, Reader, asked, chat, connected, edited, events, exchange

LEAVES = ("queued", "reading", "writing", "any")


def leave(address: str, questions: list[str], count: int, seed: int) -> list[str]:
    """Clients that ask and are gone before the answer; what was wrong.

    Some leave at once, some after a random while, some after the first bytes of a stream.
    """

    def one(number: int) -> str:
        dice = random.Random(f"{seed} {number}")
        stream = dice.random() < 0.5
        more = {"stream": stream, "n": dice.choice((1, 1, 4)), "max_tokens": 40}
        options = {"temperature": 2.0, "seed": number}  # nothing likely: long answers
        try:
            with connected(address) as line:
                line.sendall(chat(dice.choice(questions), **more, **options))
                kind = dice.choice(LEAVES)
                if kind == "writing" and stream:
                    line.recv(10)
                elif kind != "queued":
                    time.sleep(dice.random() * (0.05 if kind == "reading" else 1.0))
        except OSError as error:
            return f"{number}: {type(error).__name__}"
        return ""

    with ThreadPoolExecutor(48) as pool:
        return [wrong for wrong in pool.map(one, range(count)) if wrong]


class Facts(threading.Thread):
    """Changes one document again and again, and remembers which text was right at which version."""

    def __init__(self, address: str, times: int, refresh: bool = True) -> None:
        super().__init__(daemon=True)
        self.address, self.times, self.refresh = address, times, refresh
        self.texts: dict[int, str] = {}
        self.swaps: list[int] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        """Edit, remember, refresh."""
        for number in range(self.times):
            text = f"The colour of Quellmar Beacon is shade {number}."
            body = {"documents": [{"id": "beacon", "text": text, "title": "Quellmar Beacon"}]}
            got = edited(self.address, "POST", "/v1/documents", body)
            if got.status != 200:
                self.wrong.append(f"edit {number}: {got.status} {got.body[:200]!r}")
                continue
            self.texts[got.json["rag2"]["version"]] = text
            if self.refresh:
                got = edited(self.address, "POST", "/v1/refresh")
                if got.status != 200:
                    self.wrong.append(f"refresh {number}: {got.status} {got.body[:200]!r}")
                    continue
                self.swaps.append(got.json["rag2"]["generation"])


class Watcher(threading.Thread):
    """Asks about that document all the while; what it was told must be right as of its version."""

    def __init__(self, address: str, facts: Facts, number: int) -> None:
        super().__init__(daemon=True)
        self.address, self.facts, self.number = address, facts, number
        self.seen: list[tuple[int, int, str]] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        """Ask in one of several ways, in turn, until the facts stop changing."""
        place, turn = (0, 0), self.number
        while self.facts.is_alive():
            turn += 1
            try:
                version, generation, text = (_told, _retrieved, _streamed)[turn % 3](self.address)
            except (AssertionError, KeyError, ValueError, OSError, TypeError) as error:
                self.wrong.append(f"{type(error).__name__}: {error}"[:300])
                continue
            if (version, generation) < place or generation < place[1]:
                self.wrong.append(f"g{generation} v{version} after g{place[1]} v{place[0]}")
            place = (version, generation)
            self.seen.append((version, generation, text))

    def check(self) -> None:
        """Note each text that was not the document's as of the version that it names."""
        known = sorted(self.facts.texts)
        for version, generation, text in self.seen:
            right = [v for v in known if v <= version]
            if right and text != self.facts.texts[right[-1]]:
                self.wrong.append(f"g{generation} v{version}: {text!r}")


QUESTION = "The colour of Quellmar Beacon is shade what?"


def _found(citations: list[dict[str, Any]]) -> str:
    return next((cited["text"] for cited in citations if cited["document"] == "beacon"), "nothing")


def _told(address: str) -> tuple[int, int, str]:
    got = exchange(address, chat(QUESTION, max_tokens=2))
    assert got is not None and got.status == 200, got
    place = got.json["rag2"]
    name = f"rag2-{place['export']}-g{place['generation']}-v{place['version']}"
    assert got.json["system_fingerprint"] == name
    cited = got.json["choices"][0]["message"]["citations"]
    return place["version"], place["generation"], _found(cited)


def _streamed(address: str) -> tuple[int, int, str]:
    got = exchange(address, chat(QUESTION, max_tokens=2, stream=True))
    assert got is not None and got.status == 200, got
    last = events(got)[-1]
    cited = last["choices"][0]["delta"]["citations"]
    return last["rag2"]["version"], last["rag2"]["generation"], _found(cited)


def _retrieved(address: str) -> tuple[int, int, str]:
    got = asked(address, "POST", "/v1/retrieve", {"query": QUESTION, "k": 4})
    assert got.status == 200, got
    place = got.json["rag2"]
    return place["version"], place["generation"], _found(got.json["results"])


def swapped(address: str, times: int, clients: int) -> dict[str, Any]:
    """Figures of so many edits, each with a new generation, under the questions of clients."""
    facts = Facts(address, times)
    watchers = [Watcher(address, facts, number) for number in range(clients)]
    began = time.monotonic()
    for thread in (facts, *watchers):
        thread.start()
    facts.join()
    for watcher in watchers:
        watcher.join(60)
        watcher.check()
    wrong = [*facts.wrong, *(wrong for watcher in watchers for wrong in watcher.wrong)]
    found = sum(text != "nothing" for watcher in watchers for _, _, text in watcher.seen)
    return {
        "swaps": len(set(facts.swaps)), "answers": sum(len(w.seen) for w in watchers),
        "answers_with_the_document": found, "wrong": len(wrong), "first": wrong[:5],
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def mixed(questions: list[str], dice: random.Random) -> bytes:
    """A request of any kind, whose answer is determined by it."""
    drawn = {"temperature": dice.choice((0.7, 1.3)), "seed": dice.randrange(1000), "top_p": 0.9}
    options = {"k": dice.choice((0, 1, 2, 4, 7)), "reading": dice.choice(("marginal", "token"))}
    if dice.random() < 0.3:
        options["reading"] = "concat"
    return chat(
        dice.choice(questions),
        rag2=options,
        max_tokens=dice.choice((1, 3, 8, 16)),
        **(drawn if dice.random() < 0.4 else {}),
        n=dice.choice((1, 1, 1, 2)),
    )


def texts(got: Got | None) -> list[str]:
    """The answers of a response; AssertionError if there are none."""
    assert got is not None and got.status == 200, got
    return [choice["message"]["content"] for choice in got.json["choices"]]


def patiently(ask: Callable[[], Got | None]) -> Got | None:
    """Ask again while there is no room."""
    got = ask()
    for _ in range(400):
        if got is None or got.status != 429:
            break
        time.sleep(0.05)
        got = ask()
    return got


def neighbours(
    address: str, questions: list[str], kinds: int, count: int, seed: int, clients: int = 24
) -> dict[str, Any]:
    """`kinds` requests asked alone, then `count` of them among one another; what differed."""
    dice = random.Random(seed)
    requests = [mixed(questions, dice) for _ in range(kinds)]
    with connected(address, 60) as line:
        reader, alone = Reader(line), list[list[str]]()
        for data in requests:
            line.sendall(data)
            alone.append(texts(reader.next()))
    order = [dice.randrange(kinds) for _ in range(count)]
    local, opened = threading.local(), list[socket.socket]()

    def one(at: int) -> str:
        if not hasattr(local, "line"):
            local.line = connected(address, 90)
            opened.append(local.line)
            local.reader = Reader(local.line)

        def ask() -> Got | None:
            local.line.sendall(requests[at])
            return local.reader.next()

        try:
            found = texts(patiently(ask))
        except AssertionError as error:
            return str(error)[:200]
        return "" if found == alone[at] else json.dumps([alone[at], found])

    with ThreadPoolExecutor(clients) as pool:
        differ = [wrong for wrong in pool.map(one, order) if wrong]
    for line in opened:
        line.close()
    return {"kinds": kinds, "answers": count, "differ": len(differ), "first": differ[:3]}


POISONS = ("poison of search", "poison of reading", "poison of steps")


def poisoned(address: str, questions: list[str], count: int, seed: int) -> dict[str, Any]:
    """Good questions, each tenth one bad: the good are answered as alone, the bad get 500."""
    dice = random.Random(seed)
    good = [chat(question, max_tokens=4) for question in dice.sample(questions, 20)]
    alone = [texts(exchange(address, data)) for data in good]

    def one(number: int) -> str:
        at = number % len(good)
        poison = chat(f"{POISONS[number // 10 % 3]} number {number}?", temperature=2.0, seed=number)
        got = patiently(lambda: exchange(address, good[at] if number % 10 else poison))
        if number % 10:
            return "" if texts(got) == alone[at] else f"{number}: {got}"[:200]
        # A text that ends at its first token has no second one to fail at.
        fine = got is not None and got.status in (500, 200) and b"poison" not in got.body[:200]
        return "" if fine else f"poison {number}: {got}"[:200]

    with ThreadPoolExecutor(20) as pool:
        wrong = [text for text in pool.map(one, range(count)) if text]
    return {"requests": count, "poisoned": count // 10, "differ": len(wrong), "first": wrong[:3]}


@contextlib.contextmanager
def loaded(address: str, make: Callable[[int], bytes], clients: int) -> Any:
    """Clients that ask for as long as the block runs; gives what each request got, in order.

    An item is (begun, status or 0, whole, body): 0 is a connection that ended before a response.
    """
    over, got = threading.Event(), list[tuple[float, int, bool, bytes]]()

    def client(number: int) -> None:
        turn = number
        while not over.is_set():
            turn += clients
            began = time.monotonic()
            try:
                with connected(address, 60) as line:
                    line.sendall(make(turn))
                    got.append((began, *_whole(line)))
            except OSError:
                got.append((began, 0, False, b""))
                time.sleep(0.02)

    threads = [threading.Thread(target=client, args=(n,), daemon=True) for n in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield got
    finally:
        over.set()
        for thread in threads:
            thread.join(60)


def _whole(line: Any) -> tuple[int, bool, bytes]:
    """Status, whether the response came to its end, and its body."""
    import h11

    data, seen = b"", b""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="POST", target="/", headers=[("host", "localhost")]))
    client.send(h11.EndOfMessage())
    status = 0
    while True:
        event = client.next_event()
        if event is h11.NEED_DATA:
            try:
                data = line.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                return status, False, seen
            client.receive_data(data)
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            seen += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            streamed = seen.startswith(b"data: ")
            whole = not streamed or seen.endswith(b"data: [DONE]\n\n")
            return status, whole, seen
