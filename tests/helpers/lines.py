"""A cheap chunker."""

from rag2.types import Document


class Lines:
    """A chunk for each line."""

    fingerprint = "lines"

    def model_dump_json(self) -> str:
        """What is stored beside the chunks."""
        return '{"name": "lines"}'

    def __call__(self, document: Document) -> list[tuple[int, int]]:
        """(start, end) of each line that is not empty."""
        spans, start = [], 0
        for line in document.text.split("\n"):
            if line:
                spans.append((start, start + len(line)))
            start += len(line) + 1
        return spans


def documents(count: int, prefix: str = "d") -> list[Document]:
    """Each with two lines that no other has."""
    return [Document(f"{prefix}{n}", f"{prefix} one {n}\n{prefix} two {n}") for n in range(count)]
