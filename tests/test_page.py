"""The page of `rag2 serve` in a real headless browser: questions, answers and how it looks."""

import math
from collections.abc import Iterator

import pytest

import reading
from asking import answered, ask, assert_contrast, delta, stubbed, texts, watched, write
from browser import Page, browse


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """One browser for all tests."""
    with browse() as page:
        yield page


@pytest.fixture
def page(tab: Page, towns: str) -> Iterator[Page]:
    """The page, just opened with the token; afterwards it asked nobody else, and nothing broke."""
    with watched(tab, towns) as page:
        yield page


def test_an_answer_streams_and_its_sources_come_with_their_posteriors(page: Page, towns: str):
    page.look(
        "(window.pieces = [], new MutationObserver(all => all.forEach(one =>"
        " one.addedNodes.forEach(node => pieces.push(node.textContent))))"
        ".observe(document.querySelector('.answer'), {childList: true}))"
    )
    assert ask(page, reading.question("Almby")) == "amber barrels"
    assert page.look("pieces.slice(0, 2).join('|').trim()") == "amber| barrels"
    assert texts(page, ".card .title")[0] == "Almby" and texts(page, ".card .id")[0] == "almby"
    shares = [float(share.removesuffix(" %")) for share in texts(page, ".card b")]
    assert shares == sorted(shares, reverse=True) and shares[0] > 99 and len(shares) == 2
    widths = page.look(
        "[...document.querySelectorAll('.card .bar')].map(b => b.style.getPropertyValue('--share'))"
    )
    assert [100 * float(width) for width in widths] == pytest.approx(shares, abs=0.06)
    assert "prior 100.0 %" in texts(page, ".card .foot")[0]
    assert texts(page, ".cite") == ["1"]
    page.click(".cite")
    assert page.look("document.activeElement.textContent") == "Almby"
    assert "2 passages" in texts(page, ".meta")[0] and "version" in texts(page, "#place")[0]
    assert page.look("location.href") == towns + "/"
    assert page.look("document.querySelector('.arm').getAttribute('aria-busy')") == "false"


def test_sources_are_in_the_order_of_their_posteriors(page: Page):
    posteriors, scores = [0.1, 0.6, 0.3], [2.0, 1.0, 1.8]
    citations = [
        {"document": f"d{i}", "title": "", "text": "t", "score": score, "posterior": posterior}
        for i, (posterior, score) in enumerate(zip(posteriors, scores, strict=True))
    ]
    stubbed(page, [delta(content="it"), delta(citations=citations, annotations=[{}, {}]), "[DONE]"])
    ask(page, "anything")
    assert texts(page, ".title") == ["d1", "d2", "d0"] and texts(page, ".cite") == ["1", "2"]
    assert texts(page, ".card b") == ["60.0 %", "30.0 %", "10.0 %"]
    shares = [math.exp(score / 0.1) for score in (1.0, 1.8, 2.0)]  # the system's temperature
    priors = [f"prior {100 * share / sum(shares):.1f} %" for share in shares]
    found = texts(page, ".card .foot")
    assert all(line.startswith(prior) for line, prior in zip(found, priors, strict=True))


def test_two_settings_answer_side_by_side_and_at_once(page: Page):
    page.click("#compare")
    first, second = texts(page, ".arm")
    assert "closed book" in second and "closed book" not in first
    assert ask(page, reading.question("Dalsund")) == "crimson glass"
    answers = texts(page, ".answer")
    assert answers[0].startswith("crimson glass") and answers[1] == reading.NOBODY
    sent = [address for address in page.requests if address.endswith("/chat/completions")]
    assert len(sent) == 2
    places = "[...document.querySelectorAll('.answer')].map(a => a.getBoundingClientRect().%s)"
    (left, right), (top, same) = page.look(places % "left"), page.look(places % "top")
    assert right > left + 300 and top == same
    assert page.look("document.querySelector('.arm.b select').disabled") is True
    write(page, ".arm.b input", "1")
    page.press("Enter")  # in a field of the settings it asks, too
    page.wait("document.querySelectorAll('.sources.b .card').length === 1")
    page.click("#compare")
    assert page.look("document.querySelector('.arm.b').offsetParent") is None


def test_passages_read_in_one_prompt_have_no_posterior(page: Page):
    page.look(
        "(s => (s.value = 'concat', s.dispatchEvent(new Event('input'))))"
        "(document.querySelector('.arm select'))"
    )
    assert "one prompt" in texts(page, ".settings")[0]
    ask(page, reading.question("Ekholm"))
    assert len(texts(page, ".card")) == 2 and set(texts(page, ".card b")) == {""}
    assert page.look("[...document.querySelectorAll('.card .bar')].every(bar => bar.hidden)")
    write(page, ".arm input", "0")
    assert ask(page, reading.question("Ekholm")) == reading.NOBODY
    assert page.look("document.querySelector('.sources').hidden")


def test_the_keyboard_is_enough(page: Page):
    page.look("document.activeElement.blur()")
    page.press("/")
    assert page.look("document.activeElement.id") == "question"
    page.type(reading.question("Farstad"))
    page.press("Enter")
    assert answered(page) == "indigo lamps"
    assert page.look("document.activeElement.id") == "question"
    visited = []
    while not page.look("document.activeElement.matches('.show')"):
        page.press("Tab")
        visited.append(page.look("document.activeElement.className || document.activeElement.id"))
        assert page.look("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert len(visited) < 12, visited
    page.press("Enter")
    page.wait("document.querySelector('mark') !== null")
    while not page.look("document.activeElement.matches('article .edit')"):
        page.press("Tab")
    page.press("Enter")
    assert page.look("document.activeElement.name") == "text"
    page.press("Escape")
    page.wait("!document.querySelector('dialog').open")
    assert page.look("document.activeElement.matches('.show')"), "the focus did not come back"


HALF, ENDED = delta(content="half an"), "The connection ended before the answer did."


@pytest.mark.parametrize(
    ("pieces", "status", "end", "line"),
    [
        (['{"error": {"message": "x"}}'], 429, "close", "The server is busy. Ask again in 7 s."),
        ([HALF], 200, "close", ENDED),
        ([HALF], 200, "break", ENDED),
        ([HALF, '{"error": {"message": "It died."}}'], 200, "close", "It died."),
    ],
)
def test_errors_are_a_readable_line_and_keep_what_was_said(
    page: Page, pieces: list[str], status: int, end: str, line: str
):
    stubbed(page, pieces, status, end)
    write(page, "#question", "anything")
    page.press("Enter")
    page.wait("document.querySelector('.arm .error').textContent !== ''")
    assert texts(page, ".arm .error") == [line, ""]
    assert texts(page, ".answer")[0] == ("half an" if status == 200 else "")
    page.look("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.press("Enter")
    page.wait("document.querySelector('.arm .error').textContent.includes('does not answer')")
    assert line in texts(page, "#history li")[1]


@pytest.mark.parametrize("way", ["Escape", "button", "another question"])
def test_an_answer_is_stopped_and_what_it_said_stays(page: Page, way: str):
    stubbed(page, [delta(content="once upon"), delta(content=" a time")], end="wait")
    write(page, "#question", "Tell me a story")
    page.press("Enter")
    page.wait("document.querySelector('.answer').textContent === 'once upon a time'")
    assert texts(page, "#go") == ["Stop"]
    if way == "Escape":
        page.press("Escape")
    elif way == "button":
        page.click("#go")
    else:
        stubbed(page, [delta(content="another")], end="wait")
        page.press("Enter")
        page.wait("document.querySelectorAll('#history li').length === 1")
        page.wait("document.querySelector('.answer').textContent === 'another'")
        assert page.look("document.querySelector('.arm').getAttribute('aria-busy')") == "true"
        assert texts(page, "#go") == ["Stop"]
        page.press("Escape")
    page.wait("document.querySelector('#go').textContent === 'Ask'")
    said = "another" if way == "another question" else "once upon a time"
    assert texts(page, ".answer")[0] == said and texts(page, ".meta")[0] == "stopped"


def test_nothing_moves_while_an_answer_comes(page: Page):
    ask(page, reading.question("Hamre"))
    places = (
        "['#ask', '.settings', '.answer', '.meta', '.sources', '.card']"
        ".map(s => document.querySelector(s).getBoundingClientRect().top)"
    )
    before = page.look(places)
    stubbed(page, [delta(content="once")], end="wait")
    page.press("Enter")
    page.wait("document.querySelector('.answer').textContent === 'once'")
    assert page.look(places) == before
    page.press("Escape")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_the_screen_and_its_letters_stand_out(page: Page, width: int, dark: bool):
    page.click("#compare")
    ask(page, reading.question("Isdal"))
    page.resize(width, dark=dark)
    assert page.look("document.documentElement.scrollWidth") <= width
    seen = ["body", ".soft", "#go", "#compare", ".title", ".card b", ".card .soft", ".card .plain"]
    assert_contrast(page, [*seen, ".cite", ".arm.b h2", "#history .soft", "#place", "#question"])
    page.click(".card .show")
    page.wait("document.querySelector('mark') !== null")
    assert_contrast(page, ["dialog h2", "dialog .soft", "mark", "article .edit", "dialog .close"])
    assert page.look("document.querySelector('dialog').scrollWidth") <= width
    page.click("article .edit")
    assert_contrast(page, ["[name=id]", "[name=text]", ".save", ".cancel", ".editor label"])


def test_who_wants_no_motion_gets_none(page: Page):
    stubbed(page, [], end="wait")
    write(page, "#question", "slowly")
    page.press("Enter")
    caret = "getComputedStyle(document.querySelector('.answer'), '::after').animationName"
    assert page.look(caret) == "blink"
    still = {"name": "prefers-reduced-motion", "value": "reduce"}
    page.call("Emulation.setEmulatedMedia", features=[still])
    assert page.look(caret) == "none"
    page.press("Escape")


def test_a_server_that_is_starting_is_waited_for(tab: Page, towns: str):
    once = (
        "const real = fetch; window.fetch = async () => (window.fetch = real, new Response("
        '\'{"error": {"message": "starting"}}\', {status: 503}))'
    )
    added = tab.call("Page.addScriptToEvaluateOnNewDocument", source=once)
    tab.visit(towns)
    tab.wait("document.querySelector('#failure').textContent.includes('not ready. starting')")
    tab.wait("document.querySelector('.arm') !== null")
    assert tab.look("document.querySelector('#failure').textContent") == ""
    tab.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])
