"""The page's files: few lines, nobody else's, and no way to turn a text into markup."""

import re

from demos import ROOT

PAGE = ROOT / "src" / "rag2" / "serve" / "page"


def test_the_page_is_small_and_asks_for_its_own_files_only():
    files = {path.name: path.read_text("utf-8") for path in PAGE.iterdir()}
    assert sum(len(text.splitlines()) for text in files.values()) < 800
    for name, text in files.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
    assert "style=" not in files["index.html"] and " on" not in re.sub(
        r">[^<]*<", "", files["index.html"]
    )
