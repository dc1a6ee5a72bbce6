"""HTML pages -> rows: the main text by trafilatura, without menus, footers and markup."""

import re
from collections.abc import Iterator
from pathlib import Path

from rag2.kb.parsers.markup import Text
from rag2.kb.plain import file_bytes
from rag2.kb.rows import Row
from rag2.kb.table import Malformed, decode

CHARSET = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?\s*([\w.:-]{1,40})""", re.IGNORECASE)


def read_html(path: Path, name: str) -> Iterator[Row]:
    """The one document of a page; <title> is its title, its id is `name`.

    A page in which trafilatura finds no main text, such as one of a few words, gives all that it
    shows.
    """
    import trafilatura
    from trafilatura.settings import use_config

    config = use_config()
    config.set("DEFAULT", "MIN_EXTRACTED_SIZE", "1")  # below it, menus and all come back
    page = _page(file_bytes(path))
    tree = trafilatura.load_html(page)
    title = "" if tree is None else tree.findtext(".//title") or ""
    text = trafilatura.extract(page, include_comments=False, config=config)
    if not text:
        shown = Text()
        shown.feed(page)
        shown.close()
        text = f"{shown.heading}\n\n{shown.text()}"
    yield name, {"id": name, "title": title, "text": text}


def _page(data: bytes) -> str:
    """The text of a page, as its byte order mark says, or its <meta charset>, or in UTF-8."""
    declared = CHARSET.search(data[:4096])
    if declared and not data.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        encoding = declared[1].decode()
        try:
            return data.decode("utf-8" if encoding.lower().startswith("utf-16") else encoding)
        except (LookupError, UnicodeDecodeError):
            raise Malformed(f"is not in {encoding}, which it says it is in") from None
    return decode(data)
