"""Editions of the Factbook with twelve invented countries, in the files of the public one."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = list[str]("Arvo Belk Corun Dask Emmer Fal Gorm Hesk Ivar Jolm Kend Lusk".split())
HELD: dict[str, Any] = {
    "test_countries": 3,
    "validation_countries": 2,
    "min_values": 6,
    "min_distinct": 0.1,
}


def nested(rng: random.Random, name: str, year: int) -> dict:
    """One country file of the public repository.

    Every number differs between the editions, except the death rate of every other country.
    """

    def leaf(text: str) -> dict:
        return {"text": text}

    def size(low: int, high: int) -> str:
        return f"{rng.randrange(low, high)}.{rng.randrange(10)}{year % 10}"

    same = random.Random(name) if NAMES.index(name) % 2 else rng
    deaths = f"{same.randrange(2, 20)}.{same.randrange(10)}7 deaths/1,000 population"
    idle: Any = leaf(f"{size(1, 30)}% (2019 est.)")
    if year > 2021:
        idle = {"Unemployment rate 2021": leaf(f"{size(1, 30)}% (2021 est.)")}
    story = " ".join(f"In its year {n} {name} grew by a town." for n in range(40))
    return {
        "Introduction": {"Background": leaf(f"<p>{story}</p>")},
        "Geography": {
            "Land use": {"agricultural land: arable land": leaf("arable land: 3.9% (2018 est.)")},
        },
        "People and Society": {
            "Population": leaf(f"{rng.randrange(10, 999)},{year % 1000:03} ({year} est.)"),
            "Median age": {
                "total": leaf(f"{size(15, 50)} years ({year} est.)"),
                "male": leaf(f"{size(15, 50)} years"),
            },
            "Birth rate": leaf(f"{size(5, 40)} births/1,000&nbsp;population"),
            "Death rate": leaf(deaths),
        },
        "Economy": {"Unemployment rate": idle},
        "Government": {
            "Country name": {"conventional short form": leaf(name)},
            "Capital": {"name": leaf(f"{name} City<br>"), "note": f"<b>note</b> - {year}"},
            "Executive branch": {"chief of state": leaf(f"President Q{year} {name} (since 2001)")},
        },
    }


def write_editions(root: Path, rng: random.Random, dates: Sequence[str]) -> None:
    """The editions as folders of country files, with fresh numbers."""
    for edition in dates:
        (root / edition / "europe").mkdir(parents=True)
        made = {name: nested(rng, name, int(edition[:4])) for name in NAMES}
        for name, other in zip(NAMES, NAMES[1:] + NAMES[:1], strict=True):
            ages = made[other]["People and Society"]["Median age"]["total"]["text"].split(" (")[0]
            made[name]["People and Society"]["Median age"]["note"] = f"in {other} it is {ages}"
        for name, facts in made.items():
            file = root / edition / "europe" / f"{name[:2].lower()}.json"
            file.write_text(json.dumps(facts), encoding="utf-8")


def rows(directory: Path, name: str) -> list[dict]:
    """The rows of a world's file."""
    lines = (directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
