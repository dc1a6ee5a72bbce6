"""`key=a,b,c` words -> axes, and their product: one dictionary of settings per cell."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rag2 import yaml12
from rag2.registry import UserError


@dataclass(frozen=True, slots=True)
class Axis:
    """Keys that take one value together, and the values, each as the YAML text it was given in."""

    keys: tuple[str, ...]
    values: tuple[str, ...]


def parse(words: Sequence[str]) -> list[Axis]:
    """The axes of a command line, in its order; an axis of one value is fixed.

    Commas part values only outside of brackets, braces and quotes. Keys with a comma between them
    take the same value in every cell: `seed,world.seed=0,1`. Raises UserError for a word that is
    no key=value, for a missing value, and for a key or a value given twice.
    """
    axes: list[Axis] = []
    for word in words:
        names, equals, text = word.partition("=")
        keys = tuple(names.split(","))
        if not equals or not all(keys):
            raise UserError(
                f"malformed setting {word!r}: write key=a,b,c, as in seed=0,1,2 or steps=100"
            )
        for key in keys:
            if any(key in axis.keys for axis in axes) or keys.count(key) > 1:
                raise UserError(f"{key} is given twice; write all its values at once: {key}=a,b")
        axes.append(Axis(keys, _values(word, text)))
    return axes


def product(axes: Sequence[Axis]) -> Iterator[dict[str, str]]:
    """Key -> value for every cell; the last axis changes fastest."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield {key: value for axis, value in zip(axes, values, strict=True) for key in axis.keys}


def swept(axes: Sequence[Axis]) -> list[str]:
    """The keys that differ between cells."""
    return [key for axis in axes for key in axis.keys if len(axis.values) > 1]


def _values(word: str, text: str) -> tuple[str, ...]:
    """The texts between the commas that part values, read as YAML reads the items of a list."""
    if "," not in text:
        return (text,)
    try:
        items = yaml12.parse(f"[{text}]", word)
    except ValueError:
        items = []
    if not items or text.rstrip().endswith(","):
        raise UserError(
            f"malformed values in {word!r}: write key=a,b,c, with quotes around a value that "
            "holds a comma"
        )
    if len(items) == 1:
        return (text,)
    values = tuple(yaml12.render(item, flow=True) for item in items)
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{word!r} gives the value {value} twice")
    return values
