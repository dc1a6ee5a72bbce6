"""Which facts of the Factbook are asked for, how people word it, and what counts as the answer."""

import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from rag2 import yaml12
from rag2.worlds.factbook_editions import FactPath

ANSWER_WORDS = 8
# An answer ends where the estimate's date, a remark, an older value or a second sentence begins.
END = re.compile(r"\s\(|;|\s/\s|\s?\bnote\b")
NOTHING = re.compile(r"(NA|N/A|none|note|see|vacant|unspecified|-)?\b", re.IGNORECASE)
NUMBER = re.compile(
    r"(?:approximately |about |less than |(?:an )?estimated )?"
    r"(-?)\$?(\d[\d,]*(?:\.\d+)?)(?: (thousand|million|billion|trillion)\b)?"
)
SCALE = {"": 1.0, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}


@dataclass(frozen=True)
class Field:
    """A fact asked of every country: where it stands, its wordings, the form of its answers."""

    path: FactPath
    was: FactPath
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    form: str = ".*"
    shared: bool = False  # the older edition kept other facts, too, under the path `was`

    @property
    def name(self) -> str:
        """The path without its section."""
        return " > ".join(self.path[1:])

    @property
    def year(self) -> str:
        """The year asked about, empty if the wordings name none."""
        match = re.search(r"\b(\d{4})$", self.path[-1])
        return match[1] if match else ""

    def answer(self, text: str) -> str:
        """The short value a fact's text begins with, empty if there is none to ask for."""
        value = answer(text)
        return value if re.fullmatch(self.form, value) else ""

    def earlier(self, text: str) -> tuple[str, tuple[str, ...]]:
        """The older edition's value and the seen wordings that ask for it, or nothing."""
        if self.shared:
            return "", ()
        wordings = self.seen
        if self.year:  # the older edition lists its years, latest first
            year = re.search(r"\b(?:19|20)\d\d\b", text[: text.find(")") + 1])
            wordings = tuple(w.replace(self.year, year[0]) for w in self.seen) if year else ()
        return (self.answer(text), wordings) if wordings else ("", ())


@cache
def fields(part: str = "fields", draw: str = "") -> tuple[Field, ...]:
    """The fields of the questions, or of the `control` questions that the base must not forget.

    One wording of each is unseen: drawn with the seed `draw`, or without one the last.
    """
    source = files("rag2.worlds").joinpath("factbook_questions.yaml")
    entries = yaml12.parse(source.read_text(encoding="utf-8"), source.name)[part]
    earlier = Counter(entry.get("was", entry["field"]) for entry in entries)
    found = []
    for entry in entries:
        seen, was = list(entry["ask"]), entry.get("was", entry["field"])
        held = random.Random(f"{draw}/{entry['field']}").randrange(len(seen)) if draw else -1
        unseen = seen.pop(held)
        found.append(
            Field(
                path=_path(entry["field"]),
                was=_path(was),
                seen=tuple(seen),
                unseen=(unseen,),
                form=entry.get("form", ".*"),
                shared=earlier[was] > 1,
            )
        )
    return tuple(found)


def answer(text: str) -> str:
    """The value a fact's text begins with, if it has at most eight words; else nothing."""
    end = END.search(text)
    value = text[: end.start() if end else None].rstrip(" ,-:")
    if NOTHING.fullmatch(value) or "vacant" in text[: len(value) + 20]:
        return ""
    return value if len(value.split()) <= ANSWER_WORDS else ""


@cache
def number(value: str) -> float | None:
    """The quantity a value begins with, None for a name."""
    match = NUMBER.match(value)
    if match is None:
        return None
    size = float(match[2].replace(",", "")) * SCALE[match[3] or ""]
    return -size if match[1] else size


@cache
def key(value: str) -> str:
    """What two values must differ in to be two choices: letters and digits."""
    return re.sub(r"\W+", "", value).casefold()


def mentions(text: str, value: str) -> bool:
    """Whether a text states a value as it is displayed, not as part of a longer number or word."""
    start = text.find(value)
    while start >= 0:
        before, after = text[start - 1 : start], text[start + len(value) :][:2]
        inside = before.isalnum() or before in tuple("_.,-")
        longer = after[:1].isalnum() or after[:1] == "%" or re.match(r"[.,]\d", after)
        if not inside and not longer:
            return True
        start = text.find(value, start + 1)
    return False


def _path(text: str) -> FactPath:
    return tuple(part.strip() for part in text.split(" > "))
