"""What `rag2 eval scaling` found -> its four tables for the terminal."""

from typing import Any

from rich import box
from rich.table import Table


def tables(results: dict[str, Any]) -> list[Table]:
    """Rates of encoding, builds of indexes, plans for corpora, simulated policies."""
    return [encoding(results), building(results), plans(results), simulation(results)]


def encoding(results: dict[str, Any]) -> Table:
    """Each encoder's rate, by the clock and by the CPU's seconds."""
    title = "encoding, one device; /CPU s: chunks for each second of CPU time"
    columns = ["encoder", "M weights", "tokens", "chunks/s", "range", "tokens/s", "/CPU s"]
    return _table(
        title,
        columns,
        [
            [
                row["shape"],
                f"{row['parameters'] / 1e6:.1f}",
                f"{row['tokens_per_chunk']}",
                f"{row['chunks_per_second']:.1f}",
                "{:.1f}-{:.1f}".format(*row["range"]),
                f"{row['tokens_per_second']:.0f}",
                f"{row['cpu_chunks_per_second']:.1f}",
            ]
            for row in results["encode"]
        ],
    )


def building(results: dict[str, Any]) -> Table:
    """Each index's builds, what the smaller ones forecast for the largest, and its bytes."""
    disk, settings = results["disk"], results["settings"]
    title = (
        f"building indexes of {settings['shapes'][-1]['hidden']} dimensions, seconds by the "
        f"{settings['clock']} clock; a generation is committed at "
        f"{disk['commit_per_second'] / 1e6:.0f} and read at "
        f"{disk['read_per_second'] / 1e6:.0f} MB/s"
    )
    clock = f"{settings['clock']}_seconds"
    sizes = results["index"][0][clock]
    return _table(
        title,
        ["index", *(f"s for {n}" for n in sizes), "forecast / s", "fixed s", "bytes each"],
        [
            [
                row["index"],
                *(f"{s:.2f}" for s in row[clock].values()),
                f"{row['largest_predicted_over_measured']:.2f}",
                f"{row['fixed_seconds']:.2f}",
                f"{row['bytes_per_vector']:.0f}",
            ]
            for row in results["index"]
        ],
    )


def plans(results: dict[str, Any]) -> Table:
    """A refresh of each corpus behind each index, and the devices for each bound on the age."""
    settings = results["settings"]
    title = (
        "one refresh on one device; devices that keep the index at most so many steps old at "
        f"{settings['step_seconds']:g} s a step"
    )
    parts = ("encode", "read", "build", "commit", "swap")
    return _table(
        title,
        ["chunks", "index", "GB", *parts, *(f"≤ {age}" for age in settings["ages"])],
        [
            [
                f"{row['corpus'] / 1e6:g} M",
                row["index"],
                _short(row["bytes"]["generation"] / 1e9),
                *(duration(row["seconds"][part]) for part in parts),
                *(f"{b['devices']:,}" if b["devices"] else "-" for b in row["bounds"]),
            ]
            for row in results["corpora"]
        ],
    )


def simulation(results: dict[str, Any]) -> Table:
    """Age and time lost by policy and by how long the worker takes."""
    settings = results["settings"]
    return _table(
        f"simulated: every={settings['every']} lag={settings['lag']}",
        ["worker / lag", "policy", "mean age", "oldest", "time lost"],
        [
            [
                f"{row['worker_over_lag']:g}",
                row["policy"],
                f"{row['mean_age']:.1f}",
                f"{row['oldest']}",
                f"{row['lost']:.1%}",
            ]
            for row in results["simulated"]
        ],
    )


def duration(seconds: float) -> str:
    """In the largest unit that leaves a number of 1 or more."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{_short(seconds / size)} {unit}"
    return f"{_short(seconds)} s"


def _short(number: float) -> str:
    return f"{number:.1f}" if number < 10 else f"{number:,.0f}"


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    shown = Table(title=title, box=box.SIMPLE, padding=0, pad_edge=False)  # ten columns in 80
    for column in columns:
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(*row)
    return shown
