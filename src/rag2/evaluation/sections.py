"""Numbers of results.json -> the report's sections: titled tables and notes, in one order for all.

`markdown` and `html` only write them down. A section, table or column whose numbers are not in
results.json is left out.
"""

from collections.abc import Iterator

from rag2.evaluation.columns import ARMS, COST, SCORES, Section, Table, table_of_arms
from rag2.evaluation.contrasts import CONTROLS
from rag2.evaluation.verdict import Results, interval, percent, points


def sections(results: Results) -> list[Section]:
    """Every section that results.json has numbers for."""
    made = (
        _arms(results),
        _readings(results),
        _by_k(results),
        _selection(results),
        _hybrids(results),
        _groups(results),
        _seeds(results),
        _paired(results),
        _grid(results),
        _scores(results),
        _intervals(results),
        _cost(results),
    )
    return [section for section in made if section]


def _arms(results: Results) -> Section:
    arms = results["arms"]
    controls = ", ".join(name for name in CONTROLS if name in arms) or "none"
    notes = [f"Intervals are Wilson's. Controls: {controls}."]
    if any(arm.get("control_accuracy") is not None for arm in arms.values()):
        notes.append(
            "The column control is the accuracy on questions the base answers without passages."
        )
    if any(arm.get("relative_gain") is not None for arm in arms.values()):
        notes.append("Relative gain is accuracy / accuracy of base - 1.")
    dropped = ", ".join(
        f"{name} {arm['dropped_chunks']}" for name, arm in arms.items() if arm.get("dropped_chunks")
    )
    if dropped:
        notes.append(
            f"Retrieved chunks that the prompt's budget had no room for, not read: {dropped}."
        )
    lacking: dict[str, list[str]] = {}
    for name, why in results.get("left_out", {}).items():
        lacking.setdefault(why.partition(":")[0], []).append(name)
    for why, names in lacking.items():
        notes.append(f"Left out for want of {why}: {', '.join(names)}.")
    return Section("Arms", (table_of_arms(results, ARMS, labels=4), " ".join(notes)))


def _readings(results: Results) -> Section | None:
    rows = tuple(
        (
            name,
            reading,
            percent(found["accuracy"]),
            interval(found["ci95"]),
            str(found["k"]),
            f"{found['temperature']:g}",
            percent(found["control_accuracy"]),
            percent(found["two_hop_accuracy"]),
        )
        for name, arm in results["arms"].items()
        for reading, found in (arm.get("readings") or {}).items()
        if len(arm["readings"]) > 1  # else it is the arm as it stands above
    )
    if not rows:
        return None
    header = ("arm", "reading", "accuracy", "95 % interval", "K", "temperature")
    header += ("control", "two-hop")
    note = "marginal reads each chunk alone and mixes the answers; concat reads all in one prompt."
    return Section("Ways of reading", (Table(header, rows, labels=2), note))


def _by_k(results: Results) -> Section | None:
    curves = {
        (name, reading): {point["k"]: point["accuracy"] for point in curve}
        for name, arm in results["arms"].items()
        for reading, curve in (arm.get("by_k") or {}).items()
    }
    ks = sorted({k for curve in curves.values() for k in curve})
    if not ks:
        return None
    rows = tuple((*key, *(percent(curve.get(k)) for k in ks)) for key, curve in curves.items())
    table = Table(("arm", "reading", *(f"K = {k}" for k in ks)), rows, labels=2)
    note = "Test accuracy at every K; the K that counts was chosen on validation questions."
    return Section("Accuracy against K", (table, note))


def _selection(results: Results) -> Section | None:
    selection = results["k_selection"]
    if not selection["chosen"]:
        return None
    rows = tuple(
        (
            name,
            selection["reading"][name],
            str(k),
            f"{selection['temperature'][name]:g}",
            percent(selection["accuracy"][name]),
            percent(results["arms"][name]["accuracy"]),
        )
        for name, k in selection["chosen"].items()
    )
    split = f"{selection['split']} accuracy"
    parts: list[Table | str] = [
        Table(("arm", "reading", "K chosen", "temperature", split, "test accuracy"), rows, labels=2)
    ]
    weights = {
        name: arm["parameters"]["dense_weight"]
        for name, arm in results["arms"].items()
        if "dense_weight" in (arm.get("parameters") or {})
    }
    if weights:
        told = "; ".join(f"{name} {weight:g}" for name, weight in weights.items())
        parts.append(f"Weight of the dense score against BM25's, chosen beside them: {told}.")
    if selection["oracle_test"]:
        oracle = "; ".join(
            f"{name} K = {k} ({percent(selection['oracle_test_accuracy'][name])})"
            for name, k in selection["oracle_test"].items()
        )
        parts.append(
            "Oracle, the best K, reading and temperature on the test answers and therefore no "
            f"result: {oracle}."
        )
    return Section("Choice of K", tuple(parts))


def _hybrids(results: Results) -> Section | None:
    """Two arms that answer as one: which, with what parameters, and how often chunks were read."""
    rows = tuple(
        (
            name,
            " + ".join(arm["members"]),
            ", ".join(f"{key} = {_value(v)}" for key, v in (arm.get("parameters") or {}).items())
            or "-",
            percent(arm["retrieved_share"]),
            percent(arm["control_retrieved_share"]),
            percent(results["k_selection"]["accuracy"].get(name)),
            percent(arm["accuracy"]),
        )
        for name, arm in results["arms"].items()
        if arm.get("members")
    )
    if not rows:
        return None
    header = ("arm", "members", "chosen", "retrieves", "on control")
    header += ("validation accuracy", "test accuracy")
    note = (
        "Members keep the reading, K and temperature of their own arms. An ensemble's weight is "
        "that of its first member; a router's threshold is in nats of log-likelihood or the unit "
        "of the retriever's scores, `-` if it never retrieves. retrieves: share of the questions "
        "for which chunks were read."
    )
    return Section("Hybrids", (Table(header, rows, labels=3), note))


def _value(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _groups(results: Results) -> Section | None:
    arms = results["arms"]
    labels = sorted(
        {
            (key, label)
            for arm in arms.values()
            for key, found in arm.get("groups", {}).items()
            for label in found
        }
    )
    two_hop = any(arm.get("two_hop_accuracy") is not None for arm in arms.values())
    if not labels and not two_hop:
        return None
    header = ("arm", *(f"{key}: {label}" for key, label in labels), *["two-hop"] * two_hop)
    rows = (
        (
            name,
            *(
                percent(arm.get("groups", {}).get(key, {}).get(label, {}).get("accuracy"))
                for key, label in labels
            ),
            *[percent(arm.get("two_hop_accuracy"))] * two_hop,
        )
        for name, arm in arms.items()
    )
    return Section("Accuracy by group", (Table(header, tuple(rows)),))


def _seeds(results: Results) -> Section | None:
    seeds = results.get("seeds")
    if not seeds:
        return None
    rows = (
        (name, *(percent(arms.get(name, {}).get("accuracy")) for arms in seeds.values()))
        for name in results["arms"]
    )
    table = Table(("arm", *(f"seed {seed}" for seed in seeds)), tuple(rows))
    return Section("Accuracy by seed", (table,))


def _paired(results: Results) -> Section | None:
    if not results["paired"]:
        return None
    rows = tuple(
        (
            row["a"],
            row["b"],
            points(row["difference"]),
            interval(row["ci95"], points),
            str(row["a_only"]),
            str(row["b_only"]),
            f"{row['mcnemar_p']:.2g}",
            f"{row['holm_p']:.2g}",
        )
        for row in results["paired"]
    )
    header = ("a", "b", "a - b", "95 % interval", "only a right", "only b right", "p", "p (Holm)")
    note = (
        "Differences in points of accuracy on the same questions; paired bootstrap interval; "
        "exact two-sided McNemar test; Holm over the rows of this table."
    )
    alike = "; ".join(
        f"{row['a']} and {row['b']} ({row['equal']})" for row in results["paired"] if row["equal"]
    )
    if alike:
        note += f" Alike but for the method: {alike}."
    return Section("Paired differences", (Table(header, rows, labels=2), note, *_within(results)))


def _within(results: Results) -> Iterator[Table | str]:
    """The paired differences again, inside each group of questions."""
    first = results["paired"][0].get("groups", {})
    labels = [(key, label) for key, found in first.items() for label in found]
    if labels:
        rows = tuple(
            (
                row["a"],
                row["b"],
                *(_contrast(row["groups"][key][label]) for key, label in labels),
            )
            for row in results["paired"]
        )
        yield Table(("a", "b", *(f"{key}: {label}" for key, label in labels)), rows, labels=2)
        yield "a - b with its interval and p, Holm over the groups of a key."


def _contrast(test: Results) -> str:
    where = interval(test["ci95"], points)
    return f"{points(test['difference'])} {where}, p = {test['holm_p']:.2g}"


def _grid(results: Results) -> Section | None:
    grid = results.get("grid_2x2")
    if not grid:
        return None
    rows = tuple(
        (row, *map(percent, values))
        for row, values in zip(grid["retriever"], grid["accuracy"], strict=True)
    )
    table = Table(("retriever", *(f"generator: {name}" for name in grid["generator"])), rows)
    effects = "; ".join(
        f"{name} {points(effect['difference'])} {interval(effect['ci95'], points)}"
        for name, effect in grid["effects"].items()
    )
    note = f"Effect of joint training in points: {effects}."
    return Section("Which half earned it", (table, note))


def _scores(results: Results) -> Section | None:
    table = table_of_arms(results, SCORES)
    if len(table.header) < 3:  # the arm and its accuracy, which stand above already
        return None
    note = "Accuracy if the pick goes by another score of the choices; the result is the first."
    return Section("Other scores", (table, note))


def _cost(results: Results) -> Section:
    note = (
        "Wall-clock seconds; training includes every stage an arm needs beyond the base. "
        "Evaluation: tokens and reading time of the prompts that the test questions are answered "
        "from, without those that only chose K, and without retrieval. Bytes to ship are what the "
        "base lacks; operations are counted by formula; a closed book takes a document in by its "
        "whole training again. docs/advice.md defines each."
    )
    return Section("Cost", (table_of_arms(results, COST), note))


def _intervals(results: Results) -> Section | None:
    """Wilson's intervals of the shares whose tables hold the figure alone."""
    arms = {name: arm.get("intervals") or {} for name, arm in results["arms"].items()}
    kept = [c for c in (*ARMS, *SCORES) if any(c.key in found for found in arms.values())]
    if not kept:
        return None
    rows = tuple(
        (name, *(interval(found[c.key]) if c.key in found else "-" for c in kept))
        for name, found in arms.items()
    )
    header = ("arm", *(column.title for column in kept))
    return Section("Intervals of the other shares", (Table(header, rows),))
