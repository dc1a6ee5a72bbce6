"""The page of `rag2 serve` in a real headless browser, over a system that answers what it reads."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import reading
from asking import (
    answered,
    ask,
    assert_contrast,
    commanded,
    delta,
    put,
    stubbed,
    texts,
    visit,
    write,
)
from browser import Page, browse
from rag2.answering.rag import Rag
from small_systems import TOKEN, served

HOSTILE = '<script>window.broken = 1</script><img src=x onerror="window.broken = 1">&amp;'


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A system that answers what it reads."""
    return reading.export(tmp_path_factory.mktemp("reading"))


@pytest.fixture(scope="module")
def server(export: Path) -> Iterator[str]:
    """The address of a server of it."""
    with Rag.from_pretrained(export) as rag, served(rag) as server:
        yield server.address


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """One browser for all tests."""
    with browse() as page:
        yield page


@pytest.fixture
def page(tab: Page, server: str) -> Iterator[Page]:
    """The page, just opened with the token; afterwards it asked nobody else, and nothing broke."""
    visit(tab, f"{server}/#token={TOKEN}")
    tab.requests.clear()
    tab.complaints.clear()
    yield tab
    assert tab.look("window.broken") is None and tab.complaints == []
    assert all(address.startswith(server) for address in tab.requests)


def test_an_answer_streams_and_its_sources_come_with_their_posteriors(page: Page, server: str):
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
    assert page.look("location.href") == server + "/"
    assert page.look("document.querySelector('.arm').getAttribute('aria-busy')") == "false"


def test_the_cited_characters_are_marked_in_the_document(page: Page, server: str):
    # Characters beyond 16 bits: the server counts each once.
    before = "𝄞 " + "🐟 Fishermen from the north came here with boats and nets. " * 8
    after = "\n\n" + "🐟 In winter the harbour is closed by ice for many long weeks. " * 8
    whole = before + reading.text("silver", "lamps") + after
    put(server, id="of/the sea?#1", title="Jarsund", text=whole)
    ask(page, "Did fishermen with boats and nets come to Jarsund?")
    cards = page.look(
        "[...document.querySelectorAll('.card')].map(c => c.querySelector('.passage').textContent)"
    )
    place = next(i for i, c in enumerate(cards) if c in whole and not c.startswith("𝄞"))
    page.resize(1280, 400)
    page.click(f".card:nth-child({place + 1}) .show")
    page.wait("document.querySelector('mark') !== null")
    assert page.look("document.querySelector('mark').textContent") == cards[place] != whole
    assert page.look("document.querySelector('.text').textContent") == whole
    box = page.look("document.querySelector('mark').getBoundingClientRect().toJSON()")
    assert 0 <= box["top"] and box["bottom"] <= 400, "the marked place is out of sight"
    put(server, id="of/the sea?#1", title="Jarsund", text="All is " + whole)
    page.click("dialog .close")
    page.click(f".card:nth-child({place + 1}) .show")
    page.wait("document.querySelector('.notice').textContent.includes('has changed')")
    assert page.look("document.querySelector('mark')") is None


def test_an_edited_document_changes_the_next_answer(page: Page, server: str):
    assert ask(page, reading.question("Borvik")) == "azure candles"
    page.click(".card .edit")
    page.wait("document.activeElement.name === 'text'")
    assert page.look("document.activeElement.value") == reading.text("azure", "candles")
    write(page, "textarea[name=text]", reading.text("scarlet", "glass"))
    page.click(".save")
    page.wait("document.querySelector('.notice').textContent.startsWith('Saved as version')")
    assert texts(page, "dialog .text") == [reading.text("scarlet", "glass")]
    page.press("Enter")  # the button that asks again has the focus
    page.wait("document.querySelector('.answer').textContent.startsWith('scarlet')")
    assert answered(page) == "scarlet glass"
    told = texts(page, "#history li")
    assert [line.split("\n")[1].split(" · ")[0] for line in told] == [
        "scarlet glass",
        "azure candles",
    ]
    page.click("#history li:last-child button")
    assert answered(page) == "azure candles" and "azure candles" in texts(page, ".passage")[0]
    with urllib.request.urlopen(server + "/v1/documents/borvik", timeout=9) as response:
        assert json.load(response)["metadata"] == {"kind": "town"}, "an edit lost the metadata"


def test_what_was_typed_outlives_the_drawer_and_a_document_is_made_found_and_deleted(page: Page):
    page.click("#documents")
    page.wait("document.querySelectorAll('dialog li').length >= 8")
    page.click(".new")
    write(page, "[name=id]", "kvarn")
    write(page, "[name=title]", "Kvarn")
    write(page, "[name=text]", reading.text("golden", "wool"))
    page.press("Escape")
    page.wait("!document.querySelector('dialog').open")
    page.click("#documents")
    page.click(".new")
    assert page.look("document.querySelector('[name=text]').value") == reading.text(
        "golden", "wool"
    )
    write(page, "[name=id]", "almby")
    page.click(".save")
    page.wait("document.querySelector('dialog .error').textContent.includes('almby already')")
    write(page, "[name=id]", "kvarn")
    page.click(".save")
    page.wait("document.querySelector('.notice').textContent.startsWith('Saved')")
    assert ["404" in line for line in page.complaints] == [True]  # is there such a document?
    page.complaints.clear()
    page.click("dialog .close")
    assert ask(page, reading.question("Kvarn")) == "golden wool"
    page.click("#documents")
    page.wait("!document.querySelector('.list').hidden")
    write(page, ".find input", "merchants of Kvarn")
    page.press("Enter")
    page.wait("document.querySelector('dialog li')?.dataset.id === 'kvarn'")
    page.click("dialog li button")
    page.wait("document.querySelector('mark') !== null")
    page.click(".delete")
    assert texts(page, ".delete") == ["Really delete?"]
    page.click(".delete")
    page.wait("document.querySelector('.notice').textContent.startsWith('Deleted kvarn')")
    page.click("dialog .close")
    assert ask(page, reading.question("Kvarn")) != "golden wool"


def test_markup_in_documents_questions_and_names_stays_text(page: Page, server: str):
    put(server, id=HOSTILE, title=f"Lund {HOSTILE}", text=f"{HOSTILE} Lund.")
    asked = f"{HOSTILE} What do the merchants of Lund sell?"
    ask(page, asked)
    assert texts(page, ".title")[0] == f"Lund {HOSTILE}" and texts(page, ".id")[0] == HOSTILE
    assert HOSTILE in texts(page, ".passage")[0] and asked in texts(page, "#history li")[0]
    page.click(".card .show")
    page.wait("document.querySelector('mark') !== null")
    assert texts(page, "dialog .text") == [f"{HOSTILE} Lund."]
    page.click("article .edit")
    assert page.look("document.querySelector('[name=id]').value") == HOSTILE
    page.click(".back")
    page.wait("document.querySelectorAll('dialog li').length >= 8")
    assert any(HOSTILE in line for line in texts(page, "dialog li"))
    assert page.look("document.querySelectorAll('img, body script, iframe, svg').length") == 0


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


def test_a_change_wants_the_token_and_says_so(tab: Page, server: str):
    visit(tab, server + "/")
    tab.look("sessionStorage.clear()")
    ask(tab, reading.question("Granlo"))
    tab.click(".card .edit")
    tab.wait("document.activeElement.name === 'text'")
    write(tab, ".token input", "wrong")
    write(tab, "[name=text]", reading.text("azure", "salt"))
    tab.click(".save")
    tab.wait("document.querySelector('dialog .error').textContent.includes('token')")
    assert tab.look("document.activeElement.matches('.token input')")
    write(tab, ".token input", TOKEN)
    tab.click(".save")
    tab.wait("document.querySelector('.notice').textContent.startsWith('Saved')")
    tab.click(".again")
    tab.wait("document.querySelector('.answer').textContent.startsWith('azure')")
    tab.look("location.hash = '#token=another%2Bone'")
    tab.wait("location.hash === ''")
    assert tab.look("sessionStorage.getItem('rag2.token')") == "another+one"
    assert "another" not in tab.look("location.href")


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
        stubbed(page, [delta(content="another"), "[DONE]"])
        page.press("Enter")
    page.wait("document.querySelector('#go').textContent === 'Ask'")
    if way == "another question":
        page.wait("document.querySelectorAll('#history li').length === 2")
        assert texts(page, ".answer")[0] == "another"
    else:
        assert (
            texts(page, ".answer")[0] == "once upon a time" and texts(page, ".meta")[0] == "stopped"
        )


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


def test_a_namespace_is_asked_and_changed_alone(tab: Page, server: str):
    body = {"id": "almby", "title": "Almby", "text": reading.text("golden", "salt")}
    put(server, namespace="acme", **body)
    visit(tab, f"{server}/#token={TOKEN}")
    assert ask(tab, reading.question("Almby")) == "amber barrels"
    tab.look("document.querySelector('#namespace select').value = 'acme'")
    assert ask(tab, reading.question("Almby")) == "golden salt"
    assert texts(tab, ".card .id") == ["almby"]
    tab.click(".card .edit")
    tab.wait("document.activeElement.name === 'text'")
    assert tab.look("document.activeElement.value") == reading.text("golden", "salt")
    tab.click(".cancel")
    for _ in range(2):
        tab.click(".delete")
    tab.wait("document.querySelector('.notice').textContent.startsWith('Deleted')")
    assert texts(tab, "dialog li") == []
    tab.look("document.querySelector('#namespace select').value = ''")
    tab.press("Escape")
    assert ask(tab, reading.question("Almby")) == "amber barrels"


def test_a_server_that_is_starting_is_waited_for(tab: Page, server: str):
    once = (
        "const real = fetch; window.fetch = async () => (window.fetch = real, new Response("
        '\'{"error": {"message": "starting"}}\', {status: 503}))'
    )
    added = tab.call("Page.addScriptToEvaluateOnNewDocument", source=once)
    tab.visit(server)
    tab.wait("document.querySelector('#failure').textContent.includes('not ready. starting')")
    tab.wait("document.querySelector('.arm') !== null")
    assert tab.look("document.querySelector('#failure').textContent") == ""
    tab.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])


@pytest.mark.slow
def test_the_command_prints_an_address_that_opens_the_page_with_its_token(tab: Page, export: Path):
    with commanded(export) as address:
        visit(tab, address)
        assert ask(tab, reading.question("Almby")) == "amber barrels"
        tab.click(".card .edit")
        tab.wait("document.activeElement.name === 'text'")
        write(tab, "[name=text]", reading.text("purple", "salt"))
        tab.click(".save")
        tab.wait("document.querySelector('.notice').textContent.startsWith('Saved')")
        tab.click(".again")
        tab.wait("document.querySelector('.answer').textContent.startsWith('purple salt')")
