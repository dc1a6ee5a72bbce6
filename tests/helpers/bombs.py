"""Files as people have them, and files made to break what parses them."""

import gzip
import io
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

NAMESPACE = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
OPEN = f'<w:document xmlns:w="{NAMESPACE}"><w:body>'.encode()
CLOSE = b"</w:body></w:document>"
PART = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
TYPES = (
    f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" ContentType='
    '"application/vnd.openxmlformats-package.relationships+xml"/>'
    f'<Override PartName="/word/document.xml" ContentType="{PART}"/></Types>'
)
RELATIONS = (
    f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r1" Type='
    '"http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"'
    ' Target="word/document.xml"/></Relationships>'
)


def docx_part(path: Path, parts: Iterable[bytes]) -> Path:
    """A Word file whose main part is made of `parts`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", TYPES)
        archive.writestr("_rels/.rels", RELATIONS)
        with archive.open("word/document.xml", "w") as file:
            for part in parts:
                file.write(part)
    return path


def paragraph(text: str, style: str = "") -> str:
    """One paragraph of a Word file."""
    chosen = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f"<w:p>{chosen}<w:r><w:t>{escape(text)}</w:t></w:r></w:p>"


def docx(path: Path, body: str) -> Path:
    """A Word file with a body in its own markup."""
    return docx_part(path, [OPEN, body.encode(), CLOSE])


def pdf(path: Path, *pages: bytes, filters: bytes = b"/FlateDecode", info: bytes = b"") -> Path:
    """A PDF file whose pages have the given content streams, encoded already."""
    count = len(pages)
    kids = b" ".join(b"%d 0 R" % (4 + 2 * n) for n in range(count))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, count),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for n, stream in enumerate(pages):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R"
            b" /Resources << /Font << /F1 3 0 R >> >> >>" % (5 + 2 * n)
        )
        head = b"<< /Length %d /Filter %s >>" % (len(stream), filters)
        objects.append(head + b"\nstream\n" + stream + b"\nendstream")
    objects.append(b"<< %s >>" % info)
    out = io.BytesIO()
    out.write(b"%PDF-1.4\n")
    places = []
    for number, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start, size = out.tell(), len(objects) + 1
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % size)
    out.write(b"".join(b"%010d 00000 n \n" % place for place in places))
    trailer = b"trailer << /Size %d /Root 1 0 R /Info %d 0 R >>\nstartxref\n%d\n%%%%EOF"
    out.write(trailer % (size, len(objects), start))
    path.write_bytes(out.getvalue())
    return path


def page(*lines: str) -> bytes:
    """The content stream of a page with lines of ASCII text."""
    shown = b"".join(b"(%s) Tj 0 -14 Td " % line.encode() for line in lines)
    return zlib.compress(b"BT /F1 12 Tf 72 700 Td " + shown + b"ET")


def repeated(data: bytes, times: int) -> bytes:
    """The zlib stream of data said so often, made in little memory."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(data) for _ in range(times)) + packer.flush()


def laughs() -> bytes:
    """The main part of a Word file that unpacks to 10 GB: ten entities, each ten of the last."""
    names = "abcdefghij"
    pairs = zip(names[1:], names, strict=False)
    entities = "".join(f'<!ENTITY {name} "{f"&{last};" * 10}">' for name, last in pairs)
    kinds = f'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "aaaaaaaaaa">{entities}]>'
    text = "<w:p><w:r><w:t>&j;</w:t></w:r></w:p>"
    return kinds.encode() + OPEN + text.encode() + CLOSE


def squeezed(path: Path, data: bytes, times: int) -> Path:
    """A gzip file of data said so often."""
    with gzip.open(path, "wb") as file:
        for _ in range(times):
            file.write(data)
    return path
