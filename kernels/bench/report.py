"""The table of results as Markdown: targets beside what was measured, then one table an operation.

python kernels/bench/report.py runs/gpu-bench/bench.csv
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from table import SIZES, Row, read

SHOWN = {
    "provider": "provider",
    "p50": "ms (p20 to p80)",
    "of_plain": "of plain",
    "peak_mib": "MiB",
    "tflops": "TFLOP/s",
    "share_of_floor": "of floor",
    "error": "error",
    "allowed": "allowed",
    "match": "match",
    "twice_equal": "twice equal",
    "note": "note",
}


def write(rows: list[Row], path: Path) -> None:
    """The whole report."""
    devices = sorted({row["device"] for row in rows})
    parts = [f"# Benchmark of rag2_kernels\n\nOn: {'; '.join(devices)}. ms: p50 (p20 to p80)."]
    parts.append(
        "MiB: peak above the inputs, without the gradients. Of floor: the time that an H200 needs "
        "at least, by bytes and operations, over the time measured."
    )
    wrong = wrong_rows(rows)
    parts.append(f"Wrong rows of rag2: {len(wrong)}.")
    parts += [f"- {line(row)}" for row in wrong]
    if targets := [row for row in rows if row["target_ms"] or row["target_mib"]]:
        parts.append("## Targets\n\n" + _targets(targets))
    for op in dict.fromkeys(row["op"] for row in rows):
        parts.append(f"## {op}")
        mine = [row for row in rows if row["op"] == op]
        for shape in dict.fromkeys(shape_of(row) for row in mine):
            parts.append(f"{shape}\n\n" + _table([r for r in mine if shape_of(r) == shape]))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def shape_of(row: Row) -> str:
    """`B 16, K 16, bf16, forward+backward, f 1`."""
    sizes = [f"{letter} {int(row[letter]):,}" for letter in SIZES if row[letter]]
    return ", ".join([*sizes, row["dtype"], row["pass"], f"f {row['f']}"])


def line(row: Row) -> str:
    """A row in one line, for a terminal."""
    told = [f"{row['op']} [{shape_of(row)}] {row['provider']}:"]
    if row["p50_ms"]:
        told.append(f"{row['p50_ms']} ms")
    if row["error"]:
        told.append(f"error {row['error']} of {row['allowed']}")
    told += [f"{name} False" for name in ("match", "twice_equal") if row[name] == "False"]
    return " ".join([*told, row["note"]]).strip()


def wrong_rows(rows: Iterable[Row]) -> list[Row]:
    """Those of rag2 that do not match, are not equal twice, or failed."""
    return [
        row
        for row in rows
        if row["provider"].startswith("rag2")
        and ("False" in (row["match"], row["twice_equal"]) or row["note"].startswith("failed"))
    ]


def _targets(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        for unit, measured in (("ms", "p50_ms"), ("mib", "peak_mib")):
            wanted, got = row[f"target_{unit}"], row[measured]
            if wanted:
                met = ("yes" if float(got) <= float(wanted) else "no") if got else row["note"]
                unit_name = "MiB" if unit == "mib" else unit
                told = (f"<= {float(wanted):g} {unit_name}", got, met)
                lines.append([row["op"], shape_of(row), row["provider"], *told])
    return _markdown(["op", "shape", "provider", "target", "measured", "met"], lines)


def _table(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        times = f"{row['p50_ms']} ({row['p20_ms']} to {row['p80_ms']})" if row["p50_ms"] else ""
        cells.append([times if name == "p50" else row[name] for name in SHOWN])
    full = [at for at in range(len(SHOWN)) if any(row[at] for row in cells)]
    titles = list(SHOWN.values())
    return _markdown([titles[at] for at in full], [[row[at] for at in full] for row in cells])


def _markdown(titles: list[str], cells: list[list[str]]) -> str:
    bars = [titles, ["---"] * len(titles), *cells]
    return "\n".join("| " + " | ".join(c.replace("|", "/") for c in row) + " |" for row in bars)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write(read(source), source.with_suffix(".md"))
