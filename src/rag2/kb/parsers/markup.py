"""HTML -> plain text: the blocks on lines of their own, the cells of a table's row on one."""

from html.parser import HTMLParser

BLOCKS = frozenset(
    "address article aside blockquote body br caption dd div dl dt fieldset figcaption figure"
    " footer form h1 h2 h3 h4 h5 h6 header hr li main nav ol p pre section table tr ul".split()
)
APART = frozenset("h1 h2 h3 h4 h5 h6 p pre table ul ol".split())  # a blank line before
HIDDEN = frozenset("head noscript script style svg template title".split())


class Text(HTMLParser):
    """Collects what a page shows; `heading` is the level-one heading that begins it, if any."""

    def __init__(self) -> None:
        super().__init__()
        self.heading = ""
        self._pieces: list[str] = []
        self._hidden: list[str] = []
        self._cells = self._row = 0  # open cells, cells of the row so far
        self._first: int | None = None  # where the heading began that nothing came before

    def text(self) -> str:
        """All of it but the heading."""
        return "".join(self._pieces).strip()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in HIDDEN:
            self._hidden.append(tag)
        elif tag == "tr":
            self._row = 0
            if not "".join(self._pieces[-1:]).endswith("\n"):
                self._pieces.append("\n")
        elif tag in ("td", "th"):
            if self._row:
                self._pieces.append(" | ")
            self._row, self._cells = self._row + 1, self._cells + 1
        elif tag in BLOCKS:
            self._break(2 if tag in APART else 1)
            if tag == "li":
                self._pieces.append("- ")
            if tag == "h1" and not self.heading and not self.text():
                self._first = len(self._pieces)

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            if tag == self._hidden[-1]:
                self._hidden.pop()
        elif tag in ("td", "th"):
            self._cells = max(self._cells - 1, 0)
        elif tag == "h1" and self._first is not None:
            self.heading = "".join(self._pieces[self._first :])
            del self._pieces[self._first :]
            self._first = None
        elif tag in BLOCKS and tag not in ("br", "hr"):
            self._break(1)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._pieces.append(data)

    def _break(self, lines: int) -> None:
        if not self._cells:
            self._pieces.append("\n" * lines)
        elif self._pieces and not self._pieces[-1].endswith((" ", "\n")):
            self._pieces.append(" ")
