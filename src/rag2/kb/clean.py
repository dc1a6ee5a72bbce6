"""Raw text -> cleaned text: the form that is stored, cut and searched."""

import re
import unicodedata

import regex

# What Unicode counts as a line break (UAX #14, classes BK, CR, LF and NL).
NEWLINES = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# C0 and C1 controls that break no line, but tab, and byte order marks: no reader ever sees them.
CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")
# Runs behind a visible character; the indentation of a list or of code stays.
SPACES = re.compile(r"(?<=\S)[^\S\n]+")
# Text has a few at most (UAX #15 allows 30 in a stream); sorting long runs takes their square.
MARKS = regex.compile(r"\p{M}{64}")
BLANK_LINES = re.compile(r"\n{3,}")


def clean(text: str) -> str:
    """Text in Unicode NFC, its white space collapsed, without controls; clean twice = clean once.

    Line breaks become line feeds, at most one blank line in a row; runs of spaces inside a line
    become one space; spaces at line ends and blank lines at both ends go.
    """
    text = CONTROLS.sub("", NEWLINES.sub("\n", text))
    text = unicodedata.normalize("NFC", text)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return BLANK_LINES.sub("\n\n", SPACES.sub(" ", text)).strip()


def clean_line(text: str) -> str:
    """Cleaned text on a single line, as titles and ids are."""
    return " ".join(clean(text).split())


def is_overmarked(text: str) -> bool:
    """Whether `clean` would take too long: a long run of marks, controls between them apart."""
    return MARKS.search(CONTROLS.sub("", text)) is not None


def is_blank(text: str) -> bool:
    """Whether nothing in the text is visible: white space and format characters only."""
    return not any(character.isprintable() and character != " " for character in text)
