"""Fine-tuning methods beside each other: which rate each is given, and the table of all."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rag2.evaluation import canvas, stats
from rag2.evaluation.canvas import COLORS, Plot
from rag2.evaluation.columns import ARMS, COST, cell
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.verdict import Results, interval, percent, points

Kind = Literal["closed", "rag"]
TOLD = ("k", "control_accuracy", "unrelated_nats", "trained_parameters", "train_seconds")
TOLD += ("train_tokens", "peak_memory_bytes", "ship_bytes", "inference_flops", "document_seconds")
KINDS: dict[Kind, str] = {"closed": "base", "rag": "frozen_rag"}  # what a row is compared with
END = "^"  # behind a rate
COLUMNS = tuple(c for c in (*ARMS, *COST) if c.key in TOLD)


@dataclass(frozen=True, slots=True)
class Rate:
    """A peak learning rate, and the share of validation questions answered right at it."""

    lr: float
    closed: float
    rag: float


@dataclass(frozen=True, slots=True)
class Grid:
    """The rates at which a method could be trained."""

    rates: Sequence[Rate]

    def best(self, kind: Kind) -> float:
        """The rate with most right validation questions; ties: the smallest."""
        return max(self.rates, key=lambda rate: (getattr(rate, kind), -rate.lr)).lr

    def at_end(self, kind: Kind) -> bool:
        """Whether that is the first or the last of several rates: a wider grid may hold better."""
        ends = {choose(rate.lr for rate in self.rates) for choose in (min, max)}
        return len(self.rates) > 1 and self.best(kind) in ends

    @property
    def chosen(self) -> list[float]:
        """The rates that the other seeds are trained at."""
        return sorted({self.best(kind) for kind in KINDS})


def row_name(method: str, kind: Kind) -> str:
    """What results.json calls a method alone, and one in front of the retriever."""
    return method if kind == "closed" else f"{method}_rag"


def summary(arms: Mapping[str, ArmResult], grids: Mapping[str, Grid], seed: int) -> dict[str, Any]:
    """The block `methods` of results.json: the rates tried, and each row against its like.

    That is the base for a method alone and frozen RAG for one in front of the retriever. The
    differences are paired by question; p is McNemar's, adjusted for all rows (Holm 1979).
    """
    rows = [
        {
            "arm": row_name(name, kind),
            "lr": grid.best(kind),
            "lr_at_end": grid.at_end(kind),
            "against": against,
        }
        for kind, against in KINDS.items()
        for name, grid in grids.items()
    ]
    pairs = [(arms[str(row["arm"])].correct, arms[str(row["against"])].correct) for row in rows]
    tests = [stats.paired(a, b, seed=seed) for a, b in pairs]
    adjusted = stats.holm([test.mcnemar_p for test in tests])
    for row, test, p in zip(rows, tests, adjusted, strict=True):
        row |= {"difference": test.difference, "ci95": test.ci95}
        row |= {"mcnemar_p": test.mcnemar_p, "holm_p": p}
    tried = {name: [asdict(rate) for rate in grid.rates] for name, grid in grids.items()}
    asked = [question.id for question in arms["base"].questions]
    return {"rates": tried, "rows": rows, "shared_questions": len(set(asked)) < len(asked)}


def markdown(results: Results) -> str:
    """methods.md: a row a method, alone and with retrieval; then the rates that were tried."""
    arms, rows = results["arms"], {row["arm"]: row for row in results["methods"]["rows"]}
    header = ["method", "rate", "accuracy", "gain", "Holm p", *(c.title for c in COLUMNS)]
    lines = [header, ["---"] * len(header)]
    for name, arm in arms.items():
        row = rows.get(name)
        first = f"{percent(arm['accuracy'])} {interval(arm['ci95'])}"
        told = ["", first, "", ""]
        if row:
            gained = f"{points(row['difference'])} {interval(row['ci95'], points)}"
            rate = f"{row['lr']:g}{END if row['lr_at_end'] else ''}"
            told = [rate, first, gained, f"{row['holm_p']:.2g}"]
        lines.append([name, *told, *(cell(arm, column) for column in COLUMNS)])
    grid = [["method", "rate", "closed book", "with retrieval"], ["---"] * 4]
    for name, rates in results["methods"]["rates"].items():
        grid += [[name, f"{r['lr']:g}", percent(r["closed"]), percent(r["rag"])] for r in rates]
    seeds = ", ".join(results.get("seeds", [str(results["seed"])]))
    blocks = [
        f"# Fine-tuning methods on {results['task']}",
        f"{results['n']} test questions, seeds {seeds}. Gain: in points over base, with retrieval "
        "over frozen_rag, paired by question; p is McNemar's, adjusted for all rows.",
        *_shared(results),
        _table(lines),
        f"Validation questions answered right, on the first seed. {END} marks a chosen rate at an "
        "end of the grid: a wider one may hold a better.",
        _table(grid),
    ]
    return "\n\n".join(blocks) + "\n"


def _shared(results: Results) -> list[str]:
    if not results["methods"]["shared_questions"]:
        return []
    return [
        "The seeds ask the same questions, each of which counts once a seed: intervals and p tell "
        "of these questions under other training, not of other questions, for which they are too "
        "small."
    ]


def picture(results: Results) -> bytes:
    """methods.png: accuracy of every method alone and with retrieval, 95 % intervals."""
    with canvas.style():
        return canvas.draw(_plot(results)).png


def _plot(results: Results) -> Plot:
    arms = results["arms"]
    names = [*results["methods"]["rates"]]
    figure = canvas.figure(0.9 + 0.24 * (len(names) + 1))
    axes = figure.add_subplot()
    looks: dict[Kind, tuple[str, str, str]] = {
        "closed": ("closed book", COLORS["green"], "s"),
        "rag": ("with retrieval", COLORS["blue"], "o"),
    }
    for kind, (label, color, marker) in looks.items():
        shown = [KINDS[kind], *(row_name(name, kind) for name in names)]
        for place, arm in enumerate(arms[name] for name in shown):
            low, high = (100 * bound for bound in arm["ci95"])
            axes.plot([low, high], [place, place], color=color, linewidth=2)
            axes.plot(
                100 * arm["accuracy"],
                place,
                marker,
                color=color,
                label=label if not place else None,
            )
    axes.set_yticks(range(len(names) + 1), ["untrained", *names])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"accuracy in % of {results['n']} questions")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    return Plot("methods", "Fine-tuning methods, 95 % intervals (Wilson).", figure)


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
