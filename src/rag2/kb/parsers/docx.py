"""Word files -> rows, by mammoth: text, lists, tables, notes; what was deleted is not read."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

from rag2.kb.parsers.markup import Text
from rag2.kb.rows import Row
from rag2.kb.table import LIMIT, Malformed

UNPACKED = 4 * LIMIT  # bytes of XML; zipfile reads no more of a member than it declares


def read_docx(path: Path, name: str) -> Iterator[Row]:
    """The one document of a file; a level-one heading at its top is its title, its id is `name`."""
    import mammoth

    try:
        with zipfile.ZipFile(path) as archive:
            parts = [
                part for part in archive.infolist() if part.filename.endswith((".xml", ".rels"))
            ]
    except zipfile.BadZipFile as error:
        raise Malformed(f"no Word file: {error}") from None
    if (size := sum(part.file_size for part in parts)) > UNPACKED:
        raise Malformed(f"unpacks to {size:,} bytes of XML; allowed: {UNPACKED:,}")
    with path.open("rb") as file:
        # No picture is unpacked, no linked file opened.
        pictures = mammoth.images.img_element(lambda image: {})
        page = mammoth.convert_to_html(file, convert_image=pictures, external_file_access=False)
    shown = Text()
    shown.feed(page.value)
    shown.close()
    title, text = (shown.heading, shown.text()) if shown.text() else ("", shown.heading)
    yield name, {"id": name, "title": title, "text": text}
