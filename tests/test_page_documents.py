"""The page's drawer in a real headless browser: the cited place, and documents that change."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import reading
from asking import answered, ask, commanded, put, texts, visit, watched, write
from browser import Page, browse
from small_systems import TOKEN
from wire import asked

HOSTILE = '<script>window.broken = 1</script><img src=x onerror="window.broken = 1">&amp;'


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


def test_the_cited_characters_are_marked_in_the_document(page: Page, towns: str):
    # Characters beyond 16 bits: the server counts each once.
    before = "𝄞 " + "🐟 Fishermen from the north came here with boats and nets. " * 8
    after = "\n\n" + "🐟 In winter the harbour is closed by ice for many long weeks. " * 8
    whole = before + reading.text("silver", "lamps") + after
    put(towns, id="of/the sea?#1", title="Jarsund", text=whole)
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
    put(towns, id="of/the sea?#1", title="Jarsund", text="All is " + whole)
    page.click("dialog .close")
    page.click(f".card:nth-child({place + 1}) .show")
    page.wait("document.querySelector('.notice').textContent.includes('has changed')")
    assert page.look("document.querySelector('mark')") is None


def test_an_edited_document_changes_the_next_answer(page: Page, towns: str):
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
    with urllib.request.urlopen(towns + "/v1/documents/borvik", timeout=9) as response:
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


def test_markup_in_documents_questions_and_names_stays_text(page: Page, towns: str):
    put(towns, id=HOSTILE, title=f"Lund {HOSTILE}", text=f"{HOSTILE} Lund.")
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


def test_a_change_wants_the_token_and_says_so(tab: Page, towns: str):
    visit(tab, towns + "/")
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


def shown(address: str, id: str, namespace: str) -> str | None:
    """A document's text; None if there is no such document."""
    got = asked(address, "GET", f"/v1/documents/{id}?namespace={namespace}")
    return got.json["text"] if got.status == 200 else None


def test_a_namespace_is_asked_and_changed_alone(tab: Page, towns: str):
    body = {"id": "almby", "title": "Almby", "text": reading.text("golden", "salt")}
    put(towns, namespace="acme", **body)
    visit(tab, f"{towns}/#token={TOKEN}")
    assert ask(tab, reading.question("Almby")) == "amber barrels"
    tab.look("document.querySelector('#namespace select').value = 'acme'")
    assert ask(tab, reading.question("Almby")) == "golden salt"
    assert texts(tab, ".card .id") == ["almby"]
    tab.look("document.querySelector('#namespace select').value = ''")  # the answer stays
    tab.click(".card .edit")
    tab.wait("document.activeElement.name === 'text'")
    assert tab.look("document.activeElement.value") == reading.text("golden", "salt")
    write(tab, "[name=text]", reading.text("silver", "salt"))
    tab.click(".save")
    tab.wait("document.querySelector('.notice').textContent.startsWith('Saved')")
    assert shown(towns, "almby", "acme") == reading.text("silver", "salt")
    assert shown(towns, "almby", "") == reading.text("amber", "barrels")
    tab.click(".delete")
    tab.wait("document.querySelector('.delete').textContent === 'Really delete?'")
    tab.click(".delete")
    tab.wait("document.querySelector('.notice').textContent.startsWith('Deleted')")
    assert shown(towns, "almby", "acme") is None
    tab.press("Escape")
    assert ask(tab, reading.question("Almby")) == "amber barrels"


@pytest.mark.slow
def test_the_command_prints_the_address_of_a_page_that_has_the_token(tab: Page, tmp_path: Path):
    with commanded(reading.export(tmp_path)) as address:
        visit(tab, address)
        assert ask(tab, reading.question("Almby")) == "amber barrels"
        tab.click(".card .edit")
        tab.wait("document.activeElement.name === 'text'")
        write(tab, "[name=text]", reading.text("purple", "salt"))
        tab.click(".save")
        tab.wait("document.querySelector('.notice').textContent.startsWith('Saved')")
        tab.click(".again")
        tab.wait("document.querySelector('.answer').textContent.startsWith('purple salt')")
