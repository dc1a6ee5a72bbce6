"""Dated editions of the World Factbook, read from facts or from the files of the public repository.

An edition is `<date>.jsonl.gz` or `<date>.jsonl`, a fact a line ({"file", "country", "path",
"text"}), or a folder `<date>/<region>/<code>.json` of nested sections, fields and subfields.
"""

import gzip
import html
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rag2.registry import UserError, nearest

FactPath = tuple[str, ...]  # section, field, subfields
NAME: FactPath = ("Government", "Country name", "conventional short form")


@dataclass
class Country:
    """One entity of an edition: its facts in the order of the file."""

    code: str
    name: str
    facts: dict[FactPath, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """One field of one country: a document whose text begins with the field's name."""

    id: str
    title: str
    lines: tuple[str, ...]
    paths: tuple[FactPath, ...]  # which fact a line after the first holds

    @property
    def text(self) -> str:
        """The field's name, then one subfield a line."""
        return "\n".join(self.lines)


def read(folder: Path, edition: str) -> dict[str, Country]:
    """The named countries of an edition, by two-letter code; raises UserError, one line."""
    countries: dict[str, Country] = {}
    for code, name, path, text in _facts(_find(folder, edition)):
        country = countries.setdefault(code, Country(code, name))
        country.facts.setdefault(path, _clean(text, path[-1]))
    named = {c.code: c for c in countries.values() if c.name and c.name.casefold() != "none"}
    if not named:
        raise UserError(f"edition {edition!r} in {str(folder)!r} holds no facts about a country")
    return named


def pages(country: Country, entry_words: int) -> tuple[list[Page], int]:
    """A document per section and field, and how many entries were cut to `entry_words` words.

    The Factbook prints some fields in two sections: a field whose text is a copy is left out.
    """
    grouped: dict[FactPath, list[FactPath]] = {}
    for path in country.facts:
        grouped.setdefault(path[:2], []).append(path)
    found, seen, cut = [], set(), 0
    for (section, name), paths in grouped.items():
        lines = [name]
        for path in paths:
            text = shorten(country.facts[path], entry_words)
            cut += text != country.facts[path]
            label = _label(path)
            lines.append(f"{label}: {text}" if label else text)
        if tuple(lines) not in seen:
            seen.add(tuple(lines))
            identity = f"{country.code}/{_slug(section)}/{_slug(name)}"
            found.append(Page(identity, country.name, tuple(lines), tuple(paths)))
    return found, cut


def shorten(text: str, words: int) -> str:
    """At most `words` words of a text, up to the end of a sentence if one ends in their half."""
    spans = [match.end() for match in re.finditer(r"\S+", text)]
    if len(spans) <= words:
        return text
    head = text[: spans[words - 1]]
    ends = [match.end(1) for match in re.finditer(r"([.;])(?=\s|$)", head)]
    if ends and ends[-1] > len(head) // 2:
        return head[: ends[-1]].rstrip(";")
    return head


def _find(folder: Path, edition: str) -> Path:
    """Where an edition lies in the folder."""
    if not folder.is_dir():
        raise UserError(f"world.path {str(folder)!r}: no such folder; it holds the dated editions")
    for name in (edition, f"{edition}.jsonl.gz", f"{edition}.jsonl"):
        if (folder / name).exists():
            return folder / name
    there = sorted(p.name for p in folder.iterdir() if p.is_dir() or ".jsonl" in p.name)
    raise UserError(
        f"edition {edition!r} not found in {str(folder)!r}; there are: "
        f"{', '.join(there) or 'none'}.{nearest(edition, there)}"
    )


def _facts(place: Path) -> Iterator[tuple[str, str, FactPath, str]]:
    """(code, country, path, text) of every fact, whatever the layout."""
    if place.is_dir():
        for file in sorted(place.glob("*/*.json")):
            tree = _parsed(file.read_bytes(), str(file))
            leaves = dict(_leaves(tree, ()))
            name = _plain(leaves.get(NAME, "")).split(" (")[0]
            yield from ((file.stem, name, path, text) for path, text in leaves.items())
        return
    with (gzip.open if place.suffix == ".gz" else open)(place, "rb") as file:
        try:
            rows = [(f"{place}, line {n}", line) for n, line in enumerate(file, 1)]
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{place} cannot be read: {error}") from None
    for where, line in rows:
        row = _parsed(line, where)
        try:
            code = Path(row["file"]).stem
            yield code, row["country"] or "", tuple(row["path"]), row["text"]
        except (KeyError, TypeError):
            raise UserError(f'{where}: not {{"file", "country", "path", "text"}}') from None


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def _leaves(node: Any, path: FactPath) -> Iterator[tuple[FactPath, str]]:
    """Every text below a node; the key "text" names its parent."""
    if isinstance(node, str) and len(path) >= 2:
        yield path, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, path if key == "text" else (*path, key))


def _plain(text: str) -> str:
    """The text without markup, in one line; a break in it becomes a slash."""
    text = re.sub(r"(?:\s*<(?:br|/?p)\b[^>]*>\s*)+", " / ", text, flags=re.IGNORECASE)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^>]*>", "", text)).replace(" ++ ", " / ")
    return " ".join(text.split()).strip("/ ")


def _clean(text: str, key: str) -> str:
    """The plain text of a fact without its own name in front ("arable land: 3.9%")."""
    text, name = _plain(text), key.split(": ")[-1]
    return text[len(name) + 2 :] if text.startswith(f"{name}: ") else text


def _label(path: FactPath) -> str:
    """What a document calls a fact below its field: "Exports 2021" under Exports is "2021"."""
    label = ", ".join(path[2:])
    if label.casefold().startswith(path[1].casefold() + " "):
        return label[len(path[1]) + 1 :]
    return label


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
