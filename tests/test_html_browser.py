"""The report's page in a real headless browser: its script runs, and nothing else happens."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import hostile
from browser import Page, browse, executable

N = 230  # more than the page holds


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """report.html of an evaluation of hostile texts."""
    directory = tmp_path_factory.mktemp("report")
    return hostile.write(directory, np.random.default_rng(0), N)[1]


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """One browser for all tests."""
    with browse() as page:
        yield page


@pytest.fixture
def page(tab: Page, report: Path) -> Iterator[Page]:
    """The report, just opened; afterwards it has asked for nothing and complained of nothing."""
    tab.requests.clear()
    tab.complaints.clear()
    tab.resize(1280)
    tab.open(report)
    yield tab
    assert tab.look("window.broken") is None
    assert (tab.requests, tab.complaints) == ([], [])


def listed(page: Page) -> list[int]:
    links = page.look("[...document.querySelectorAll('#list a')].map(a => a.hash)")
    return [int(link.removeprefix("#q=")) for link in links]


def shown(page: Page) -> str:
    return page.look("document.querySelector('#question h3').textContent")


def choose(page: Page, name: str, label: str) -> None:
    """Pick an option of a select, and tell the page as the browser would."""
    found = page.look(
        f"(s => {{ const o = [...s.options].find(o => o.text === {json.dumps(label)});"
        f" s.value = o.value; s.dispatchEvent(new Event('input')); return o.text; }})"
        f"(document.getElementById('{name}'))"
    )
    assert found == label


def test_the_list_is_filled_and_a_click_shows_its_question(page: Page):
    asked = [question.question for question in hostile.questions(N)]
    rows = listed(page)
    assert len(rows) == 200 and rows == sorted(rows) and shown(page) == asked[0]
    page.click("#list li:nth-child(3) a")
    page.wait("location.hash !== ''")
    page.wait(f"document.querySelector('#question').dataset.number === '{rows[2]}'")
    assert shown(page) == asked[rows[2]]
    assert page.look("document.querySelectorAll('[aria-current]').length") == 1
    page.click(".pager a:last-child")
    page.wait(f"document.querySelector('#question').dataset.number === '{rows[3]}'")


def test_the_keyboard_is_enough(page: Page):
    first, second, *_ = listed(page)
    asked = [question.question for question in hostile.questions(N)]
    assert shown(page) == asked[first]
    page.look("document.getElementById('disagree').focus()")
    page.press("Tab")  # to the list, which scrolls
    while page.look("document.activeElement.hash") is None:
        page.press("Tab")
    page.press("Tab")
    assert page.look("document.activeElement.hash") == f"#q={second}"
    page.press("Enter")
    page.wait(f"document.querySelector('#question').dataset.number === '{second}'")
    assert shown(page) == asked[second]


def test_an_address_names_a_question(page: Page, report: Path):
    number = listed(page)[-1]
    page.open(report, f"#q={number}")
    assert shown(page) == hostile.questions(N)[number].question
    missing = next(iter(set(range(N)) - set(listed(page))))
    page.open(report, f"#q={missing}")
    assert f"Question {missing} is not in this page" in page.look("document.body.innerText")


def test_search_and_filters_narrow_the_list(page: Page):
    questions = hostile.questions(N)
    everything = listed(page)
    page.click("#search")
    page.type("question QUOTES braces")
    fitting = [n for n in everything if "quotes" in str(questions[n])]
    assert listed(page) == fitting and shown(page) == questions[fitting[0]].question
    assert 0 < len(fitting) < len(everything)
    page.look("document.getElementById('search').value = ''")
    choose(page, "group", "wording: unseen")
    unseen = [n for n in everything if n % 2]
    assert listed(page) == unseen
    choose(page, "right", "joint")
    choose(page, "wrong", "base")
    data = page.look("JSON.parse(document.getElementById('data').textContent)")
    arms = data["arms"]
    right = {
        (row["number"], name): answer["right"]
        for row in data["questions"]
        for name, answer in zip(arms, row["arms"], strict=True)
    }
    fitting = [n for n in unseen if right[n, "joint"] and not right[n, "base"]]
    assert listed(page) == fitting and 0 < len(fitting) < len(unseen)
    assert page.look("document.getElementById('count').textContent").startswith(
        f"{len(fitting)} of 200"
    )
    for name, label in (("group", "any"), ("right", "any arm"), ("wrong", "any arm")):
        choose(page, name, label)
    page.click("#disagree")
    picks = {row["number"]: {a["pick"] for a in row["arms"]} for row in data["questions"]}
    assert listed(page) == [n for n in everything if len(picks[n]) > 1]
    page.click("#search")
    page.type("no question has this")
    assert listed(page) == []


def test_a_question_shows_every_arms_numbers_and_passages_as_text(page: Page):
    first = page.look("JSON.parse(document.getElementById('data').textContent)")["questions"][0]
    rows = page.look(
        "[...document.querySelectorAll('#question tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert [row[0] for row in rows] == ["base", "frozen_rag", "joint"]
    for answer, (_, *cells) in zip(first["arms"], rows, strict=True):
        assert [f"{logp:.2f}".replace("-", "−") for logp in answer["logp"]] == [
            cell.split()[0] for cell in cells
        ]
        assert [i for i, cell in enumerate(cells) if "●" in cell] == [answer["pick"]]
    opened = "document.querySelectorAll('#question details[open] .passage')"
    passages = page.look(f"[...{opened}].map(p => p.textContent)")
    assert passages == [hostile.PASSAGES[chunk] for chunk, _, _ in first["arms"][2]["retrieved"]]
    weights = page.look("document.querySelector('#question details[open] .weights').textContent")
    _, score, posterior = first["arms"][2]["retrieved"][0]
    assert f"score {score:.2f}".replace("-", "−") in weights
    assert f"posterior {posterior:.3f}" in weights


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_no_wider_than_the_screen_and_its_letters_stand_out(
    page: Page, width: int, dark: bool
):
    page.resize(width, dark=dark)
    assert page.look("document.documentElement.scrollWidth") <= width
    for selector in ("body", "td", ".note", "figcaption", "figure text", "nav a"):
        assert page.look(CONTRAST % json.dumps(selector)) >= 4.5, selector


# The contrast ratio of an element's letters against the page (WCAG 2, 1.4.3).
CONTRAST = """(selector => {
  const light = css => {
    const [r, g, b] = css.match(/[\\d.]+/g).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = getComputedStyle(document.querySelector(selector));
  const ink = light(selector.endsWith(" text") ? style.fill : style.color);
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
})(%s)"""


def test_a_planted_script_is_stopped_and_a_planted_request_noticed(
    tab: Page, report: Path, tmp_path: Path
):
    page = report.read_text(encoding="utf-8")
    planted = tmp_path / "planted.html"
    planted.write_text(page.replace("<main", "<script>window.broken = 1</script><main", 1))
    tab.complaints.clear()
    tab.open(planted)
    assert tab.look("window.broken") is None and "Content Security Policy" in str(tab.complaints)
    picture = '<img src="http://127.0.0.1:9/x.png"><script>console.log(broken)</script><main'
    planted.write_text(page.replace("Content-Security-Policy", "none").replace("<main", picture, 1))
    tab.requests.clear()
    tab.complaints.clear()
    tab.open(planted)
    assert tab.requests == ["http://127.0.0.1:9/x.png"]
    assert "broken is not defined" in str(tab.complaints)


def test_without_a_browser_the_tests_are_skipped_but_fail_in_ci(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no browser on PATH"):
        executable()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no browser on PATH"):
        executable()
