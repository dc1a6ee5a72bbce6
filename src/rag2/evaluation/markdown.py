"""Numbers of results.json -> report.md."""

from collections.abc import Iterable, Iterator, Sequence

from rag2.evaluation.results import CONTROLS
from rag2.evaluation.verdict import Results, interval, percent, points, verdict

COLUMNS = (
    "arm",
    "retriever",
    "generator",
    "reading",
    "accuracy",
    "95 % interval",
    "K",
    "recall@1",
    "recall@K",
    "control",
    "train s",
    "eval s",
    "trained parameters",
)


def markdown(results: Results) -> str:
    """The report as Markdown: verdict, arms, paired differences, the 2x2 table, choice of K."""
    seeds = " + ".join(results.get("seeds", [str(results["seed"])]))
    sections = [
        f"# Evaluation on {results['task']}",
        f"{results['n']} test questions, seed {seeds}. **{verdict(results)}**",
        "## Arms",
        _table(COLUMNS, (cells(name, arm) for name, arm in results["arms"].items())),
        "Intervals are Wilson's. Controls: "
        + (", ".join(name for name in CONTROLS if name in results["arms"]) or "none")
        + ". The column control is the accuracy on questions the base answers without passages.",
        *_dropped_section(results),
        *_metrics_section(results),
        *_reading_section(results),
        *_group_sections(results),
        *_seed_section(results),
        *_paired_section(results),
        *_grid_section(results),
        *_selection_section(results),
    ]
    return "\n\n".join(sections) + "\n"


def cells(name: str, arm: Results) -> list[str]:
    """The row of one arm under COLUMNS."""
    return [
        name,
        arm["retriever"] or "-",
        arm["generator"],
        arm["reading"],
        percent(arm["accuracy"]),
        interval(arm["ci95"]),
        "-" if arm["k"] is None else str(arm["k"]),
        percent(arm["recall_at_1"]),
        percent(arm["recall_at_k"]),
        percent(arm["control_accuracy"]),
        "-" if arm["train_seconds"] is None else f"{arm['train_seconds']:.1f}",
        f"{arm['eval_seconds']:.1f}",
        "-" if arm["trained_parameters"] is None else f"{arm['trained_parameters']:,}",
    ]


def _dropped_section(results: Results) -> Iterator[str]:
    dropped = {name: arm["dropped_chunks"] for name, arm in results["arms"].items()}
    found = ", ".join(f"{name} {count}" for name, count in dropped.items() if count)
    if found:
        yield f"Retrieved chunks that the prompt's budget had no room for, not read: {found}."


def _metrics_section(results: Results) -> Iterator[str]:
    columns = {
        "acc_norm": "per character",
        "acc_bytes": "per byte",
        "acc_mutual_info": "mutual information",
        "debiased_accuracy": "places taken in turns",
    }
    arms = results["arms"]
    shown = [key for key in columns if any(arm[key] is not None for arm in arms.values())]
    yield "## Other measures"
    yield _table(
        ("arm", "relative gain", *shown),
        (
            [name, _gain(arm["relative_gain"]), *(percent(arm[key]) for key in shown)]
            for name, arm in arms.items()
        ),
    )
    yield (
        "Relative gain is accuracy / base accuracy - 1. The choice with the highest log-likelihood "
        + "; ".join(f"{columns[key]}: {key}" for key in shown)
        + "."
    )


def _gain(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.1f} %"


def _reading_section(results: Results) -> Iterator[str]:
    rows = [
        (name, reading, found)
        for name, arm in results["arms"].items()
        if len(arm["readings"]) > 1
        for reading, found in arm["readings"].items()
    ]
    if rows:
        yield "## Readings"
        yield _table(
            ("arm", "reading", "K", "accuracy", "95 % interval", "control", "two-hop"),
            (
                [
                    name,
                    reading,
                    str(found["k"]),
                    percent(found["accuracy"]),
                    interval(found["ci95"]),
                    percent(found["control_accuracy"]),
                    percent(found["two_hop_accuracy"]),
                ]
                for name, reading, found in rows
            ),
        )
        yield (
            "Each chunk alone and mixed (marginal), or the best K in one prompt (concat); K chosen "
            "on validation for each."
        )


def _group_sections(results: Results) -> Iterator[str]:
    arms = results["arms"]
    keys = sorted({key for arm in arms.values() for key in arm["groups"]})
    labels = [
        (key, label)
        for key in keys
        for label in sorted({item for arm in arms.values() for item in arm["groups"].get(key, {})})
    ]
    two_hop = any(arm["two_hop_accuracy"] is not None for arm in arms.values())
    if not labels and not two_hop:
        return
    yield "## Accuracy by group"
    header = ["arm", *(f"{key}: {label}" for key, label in labels), *["two-hop"] * two_hop]
    rows = (
        [name]
        + [
            percent(arm["groups"].get(key, {}).get(label, {}).get("accuracy"))
            for key, label in labels
        ]
        + [percent(arm["two_hop_accuracy"])] * two_hop
        for name, arm in arms.items()
    )
    yield _table(header, rows)


def _seed_section(results: Results) -> Iterator[str]:
    seeds = results.get("seeds")
    if not seeds:
        return
    yield "## Accuracy by seed"
    yield _table(
        ("arm", *(f"seed {seed}" for seed in seeds)),
        (
            [name, *(percent(arms.get(name, {}).get("accuracy")) for arms in seeds.values())]
            for name in results["arms"]
        ),
    )


def _paired_section(results: Results) -> Iterator[str]:
    if not results["paired"]:
        return
    yield "## Paired differences"
    yield _table(
        ("a", "b", "a - b", "95 % interval", "only a right", "only b right", "p", "p (Holm)"),
        (
            [
                row["a"],
                row["b"],
                points(row["difference"]),
                interval(row["ci95"], points),
                str(row["a_only"]),
                str(row["b_only"]),
                f"{row['mcnemar_p']:.2g}",
                f"{row['holm_p']:.2g}",
            ]
            for row in results["paired"]
        ),
    )
    yield (
        "Differences in points of accuracy on the same questions; paired bootstrap interval; "
        "exact two-sided McNemar test; Holm over the rows of this table."
    )
    equal = [
        f"{row['a']} and {row['b']} ({row['equal']})" for row in results["paired"] if row["equal"]
    ]
    if equal:
        yield "Alike but for the method: " + "; ".join(equal) + "."
    labels = [
        (key, label) for key, found in results["paired"][0]["groups"].items() for label in found
    ]
    if labels:
        yield "### By group"
        yield _table(
            ("a", "b", *(f"{key}: {label}" for key, label in labels)),
            (
                [
                    row["a"],
                    row["b"],
                    *(_contrast(row["groups"][key][label]) for key, label in labels),
                ]
                for row in results["paired"]
            ),
        )
        yield "a - b with its interval and p (Holm over the groups of a key) in each group."


def _contrast(test: Results) -> str:
    where = interval(test["ci95"], points)
    return f"{points(test['difference'])} {where}, p = {test['holm_p']:.2g}"


def _grid_section(results: Results) -> Iterator[str]:
    grid = results.get("grid_2x2")
    if not grid:
        return
    yield "## Which half earned it"
    yield _table(
        ("retriever", *(f"generator: {name}" for name in grid["generator"])),
        (
            [row, *map(percent, values)]
            for row, values in zip(grid["retriever"], grid["accuracy"], strict=True)
        ),
    )
    effects = (
        f"{name} {points(effect['difference'])} {interval(effect['ci95'], points)}"
        for name, effect in grid["effects"].items()
    )
    yield "Effect of joint training in points: " + "; ".join(effects) + "."


def _selection_section(results: Results) -> Iterator[str]:
    selection = results["k_selection"]
    if not selection["chosen"]:
        return
    yield "## Choice of K"
    yield _table(
        (
            *("arm", "reading", "K chosen", "temperature"),
            *(f"{selection['split']} accuracy", "test accuracy"),
        ),
        (
            [
                name,
                selection["reading"][name],
                str(k),
                f"{selection['temperature'][name]:g}",
                percent(selection["accuracy"][name]),
                percent(results["arms"][name]["accuracy"]),
            ]
            for name, k in selection["chosen"].items()
        ),
    )
    if selection["oracle_test"]:
        oracle = (
            f"{name} K = {k} ({percent(selection['oracle_test_accuracy'][name])})"
            for name, k in selection["oracle_test"].items()
        )
        text = "; ".join(oracle)
        yield f"Oracle, chosen on the test answers and therefore no result: {text}."


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
