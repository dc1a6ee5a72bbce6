"""PDF files -> rows, by pypdf."""

from collections.abc import Iterator
from pathlib import Path

from rag2.kb.clean import is_blank
from rag2.kb.rows import Row
from rag2.kb.table import LIMIT, Malformed


def read_pdf(path: Path, name: str) -> Iterator[Row]:
    """The one document of a file, a blank line between pages; its id is `name`.

    Encrypted files are read if an empty password opens them.
    """
    import pypdf

    reader = pypdf.PdfReader(path)
    if reader.is_encrypted and not reader.decrypt(""):
        raise Malformed("encrypted, and an empty password does not open it")
    pages: list[str] = []
    length = 0
    for page in reader.pages:
        pages.append(page.extract_text())
        length += len(pages[-1])
        if length > LIMIT:
            raise Malformed(f"a text of more than {LIMIT:,} characters")
    text = "\n\n".join(pages)
    if is_blank(text):
        raise Malformed(f"no text in {len(pages)} pages; pictures of text are not read")
    title = reader.metadata.title if reader.metadata else None
    yield name, {"id": name, "title": title, "text": text}
