"""results.json -> what its numbers answer to the five questions of whoever has to choose an arm.

Every number is a cell of the table or a formula of cells, and goes with the answer; there is no
threshold here. What the table does not hold is said with the command that would measure it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rag2.evaluation.columns import significant
from rag2.evaluation.contrasts import CONTROLS
from rag2.evaluation.figures import Answer, Cells, Figure, Missing, three
from rag2.evaluation.verdict import Results, percent, points

FORMAT = "rag2.advice/1"
DAY = Figure(86400.0, "86400")
# What an arm pays besides being wrong; the front is over those that any arm has a number for.
COSTS = ("train_seconds", "ship_bytes", "inference_flops", "latency_ms.p50")


def advise(results: Results, compare: str, alpha: float | None = None) -> list[Answer]:
    """The five answers; `compare` is the command that made the table, without its last settings.

    `alpha` is the p value below which the reader calls two arms different; None: that is left open.
    """
    table = Table(results, compare)
    return [stability(table), resources(table), updates(table), verifiability(table)] + [
        performance(table, alpha)
    ]


class Table(Cells):
    """The arms that somebody might choose, by what they are."""

    def __init__(self, results: Results, compare: str) -> None:
        super().__init__(results)
        self.compare = compare
        self.names = [name for name in self.arms if name not in CONTROLS]
        read = [name for name in self.names if self._reads(self.arms[name])]
        self.readers = read
        """arms that answer from chunks"""
        closed = [name for name in self.names if name not in read]
        self.trained = [name for name in closed if self.arms[name].get("generator") != "base"]
        """closed books that training put something into"""
        self.untrained = [name for name in closed if name not in self.trained]

    @staticmethod
    def _reads(arm: Mapping[str, Any]) -> bool:
        # K is null where pooled seeds chose different ones; 0: validation preferred no chunk.
        return arm.get("retriever") is not None and arm.get("k") != 0

    def best(self, names: Sequence[str]) -> list[str]:
        """The arms by accuracy, best first; equal ones in the order of the table."""
        return sorted(names, key=lambda name: -self.arms[name]["accuracy"])

    def cell(self, arm: str, key: str) -> Figure:
        """A number that every arm has."""
        figure = self(arm, key)
        assert figure is not None, (arm, key)
        return figure

    def wants(self, what: str, *settings: str) -> Missing:
        """A gap that another comparison would fill."""
        return Missing(what, " ".join([self.compare, *settings, "out=NEW"]))

    def wants_arms(self, what: str, *names: str) -> Missing:
        """A gap that more arms would fill."""
        return self.wants(what, f"arms=[{','.join([*self.arms, *names])}]")

    def lacks(self, names: Sequence[str], key: str) -> list[Missing]:
        """A line for the arms that have no number under a key; none where all have one."""
        without = [name for name in names if name not in self.known(list(names), key)]
        if not without:
            return []
        setting = ["latency=20"] if key.startswith("latency_ms") else []
        return [self.wants(f"{key} of {', '.join(without)}", *setting)]


def stability(table: Table) -> Answer:
    """How many documents change until training again is the cheaper way to stay current."""
    answer = Answer("stability", "How stable is the knowledge?")
    reader, trained = (
        next((n for n in table.best(names) if table(n, "document_seconds")), None)
        for names in (table.readers, table.trained)
    )
    if not table.readers:
        answer.missing.append(table.wants_arms("an arm that retrieves", "frozen_rag"))
    elif reader is None:
        answer.missing += table.lacks(table.readers, "document_seconds")
    if not table.trained:
        answer.missing.append(table.wants_arms("an arm that only fine-tunes", "ft"))
    elif trained is None:
        answer.missing += table.lacks(table.trained, "document_seconds")
    if reader is None or trained is None:
        return answer
    takes, again = table.cell(reader, "document_seconds"), table.cell(trained, "document_seconds")
    shares = [answer.show(table.cell(n, "accuracy"), percent) for n in (reader, trained)]
    answer.sentences.append(
        f"{reader} takes in a new document in {answer.show(takes, three)} s; {trained} is trained "
        f"again for {answer.show(again, three)} s, for any number of documents (accuracy "
        f"{shares[0]} against {shares[1]})."
    )
    if again.value <= takes.value:
        answer.sentences.append(
            f"Training {trained} again takes no longer than one document takes {reader}."
        )
        return answer
    answer.sentences.append(
        f"{reader} is the cheaper one to keep current while fewer than "
        f"{answer.show(again / takes, three)} documents change between two trainings of {trained}."
    )
    answer.sentences += _paid_back(table, answer, reader, trained, again - takes)
    return answer


def _paid_back(table: Table, answer: Answer, reader: str, trained: str, saved: Figure) -> list[str]:
    first, other = table(reader, "train_seconds"), table(trained, "train_seconds")
    if first is None or other is None:
        answer.missing += table.lacks([reader, trained], "train_seconds")
        return []
    if first.value <= other.value:
        return [f"{reader} takes no longer to train than {trained} in the first place."]
    updates = answer.show((first - other) / saved, three)
    return [
        f"What {reader} takes longer to train at first ({answer.show(first, three)} s against "
        f"{answer.show(other, three)} s) is made up for by {updates} changes of one document."
    ]


def resources(table: Table) -> Answer:
    """What each arm costs, and which are beaten in accuracy and every cost by another."""
    answer = Answer("resources", "Which resources are there?")
    keys = [key for key in COSTS if table.known(table.names, key)]
    for key in COSTS:
        answer.missing += table.lacks(table.names, key)
    placed = [n for n in table.names if all(n in table.known(table.names, k) for k in keys)]
    if not keys or not placed:
        return answer
    beaten = {name: by for name in placed if (by := beater(table, name, placed, keys))}
    costs = [
        f"{name} {answer.show(table.cell(name, 'accuracy'), percent)} for "
        + ", ".join(_cost(answer, table.cell(name, key), key) for key in keys)
        for name in table.best(placed)
        if name not in beaten
    ]
    against = " and ".join([", ".join(keys[:-1]), keys[-1]] if len(keys) > 1 else keys)
    answer.sentences.append(f"No arm is better in accuracy, {against} at once than these:")
    answer.sentences.append(f"{'; '.join(costs)}.")
    for name, by in beaten.items():
        shown = answer.show(table.cell(name, "accuracy"), percent)
        answer.sentences.append(
            f"{name} ({shown}, "
            + ", ".join(_cost(answer, table.cell(name, key), key) for key in keys)
            + f") is nowhere better than {by} and somewhere worse."
        )
    return answer


def beater(table: Table, name: str, names: Sequence[str], keys: Sequence[str]) -> str | None:
    """The best arm that is at least as accurate, as cheap by every key, and not equal in all."""

    def goods(arm: str) -> list[float]:
        return [table.cell(arm, "accuracy").value, *(-table.cell(arm, k).value for k in keys)]

    own = goods(name)
    for other in table.best(names):
        theirs = goods(other)
        if theirs != own and all(b >= a for a, b in zip(own, theirs, strict=True)):
            return other
    return None


def _cost(answer: Answer, figure: Figure, key: str) -> str:
    forms = {
        "train_seconds": (three, "s of training"),
        "ship_bytes": (significant, "bytes to ship"),
        "inference_flops": (significant, "operations a question"),
        "latency_ms.p50": (three, "ms a question"),
    }
    form, unit = forms[key]
    return f"{answer.show(figure, form)} {unit}"


def updates(table: Table) -> Answer:
    """How long each arm is behind after one new document."""
    answer = Answer("updates", "How often is it updated?")
    able = [*table.readers, *table.trained]
    known = table.known(able, "document_seconds")
    answer.missing += table.lacks(able, "document_seconds")
    if not able:
        answer.missing.append(table.wants_arms("an arm that can learn", "ft", "frozen_rag"))
    order = sorted(known, key=lambda name: known[name].value)
    for names, how in (
        ([n for n in order if n in table.readers], "by adding it to the index"),
        ([n for n in order if n in table.trained], "by a whole run of training"),
    ):
        if names:
            told = ", ".join(_pace(answer, name, known[name]) for name in names)
            answer.sentences.append(f"A new document is known {how} after: {told}.")
    if table.untrained and answer.sentences:
        answer.sentences.append(f"{_listed(table.untrained)} cannot take one in.")
    return answer


def _pace(answer: Answer, name: str, seconds: Figure) -> str:
    shown = f"{name} {answer.show(seconds, three)} s"
    if not seconds.value:
        return shown
    return f"{shown} (at most {answer.show(DAY / seconds, three)} times a day)"


def verifiability(table: Table) -> Answer:
    """Which arms show what they answered from, and how often that holds the answer."""
    answer = Answer("verifiability", "Must answers be checked?")
    found = table.known(table.readers, "recall_at_k")
    if not table.readers:
        answer.missing.append(table.wants_arms("an arm that retrieves", "frozen_rag"))
    elif lacking := [name for name in table.readers if name not in found]:
        answer.missing.append(
            table.wants(f"recall_at_k of {', '.join(lacking)}", "questions=WITH_EVIDENCE.jsonl")
        )
    order = sorted(found, key=lambda name: -found[name].value)
    if order:
        told = "; ".join(_cited(table, answer, name, found[name]) for name in order)
        answer.sentences.append(
            f"The chunks that were read hold the answer's evidence in this share of questions: "
            f"{told}."
        )
    joined = [name for name in table.readers if table.arms[name].get("reading") == "concat"]
    if joined:
        answer.sentences.append(f"{_listed(joined)} cannot say which of its chunks counted.")
    closed = [*table.trained, *table.untrained]
    if closed:
        answer.sentences.append(f"Closed books cite nothing: {', '.join(closed)}.")
    return answer


def _cited(table: Table, answer: Answer, name: str, recall: Figure) -> str:
    shown = f"{name} {answer.show(recall, percent)}"
    k, first = table(name, "k"), table(name, "recall_at_1")
    inside = [f"K = {answer.show(k, three)}"] if k else []
    if first:
        inside.append(f"the first chunk {answer.show(first, percent)}")
    return f"{shown} ({', '.join(inside)})" if inside else shown


def performance(table: Table, alpha: float | None) -> Answer:
    """The most accurate arm, how sure its lead is, and what it does to what the base knew."""
    answer = Answer("performance", "Is accuracy what counts?")
    order = table.best(table.names)
    if len(order) < 2:
        answer.missing.append(table.wants_arms("a second arm", "frozen_rag"))
        if not order:
            return answer
    top = order[0]
    shown = answer.show(table.cell(top, "accuracy"), percent)
    answer.sentences.append(f"{top} answers most questions right, {shown}.")
    tests = {name: _test(table, top, name) for name in order[1:]}
    for name in order[1:2]:
        second, test = answer.show(table.cell(name, "accuracy"), percent), tests[name]
        gap = table.cell(top, "accuracy") - table.cell(name, "accuracy")
        lead = (
            f"{answer.show(gap, points)} points ahead of {name} ({second})"
            if gap.value
            else f"no more than {name} ({second})"
        )
        if test is None:
            answer.missing.append(table.wants(f"a paired test of {top} and {name}"))
            answer.sentences.append(f"That is {lead}.")
        else:
            p = answer.show(test, lambda value: f"{value:.2g}")
            answer.sentences.append(f"That is {lead}, paired test p = {p} (Holm).")
    if alpha is not None and tests:
        answer.sentences.append(_told_apart(answer, top, tests, alpha))
    answer.sentences += _forgotten(table, answer, order[:2])
    return answer


def _told_apart(answer: Answer, top: str, tests: Mapping[str, Figure | None], alpha: float) -> str:
    level = answer.show(Figure(alpha, "alpha"), lambda value: f"{value:g}")
    tied = [(name, test) for name, test in tests.items() if test and test.value >= alpha]
    if not tied:
        return f"At {level} no tested arm is level with it."
    named = ", ".join(f"{n} (p = {answer.show(t, lambda v: f'{v:.2g}')})" for n, t in tied)
    return f"At {level} these are not told apart from {top}: {named}."


def _test(table: Table, a: str, b: str) -> Figure | None:
    """The p value of a pair, adjusted for all pairs of the table."""
    pairwise = table.results.get("pairwise") or {"arms": []}
    if a not in pairwise["arms"] or b not in pairwise["arms"]:
        return None
    i, j = (pairwise["arms"].index(name) for name in (a, b))
    cells = frozenset({(a, "pairwise.holm_p"), (b, "pairwise.holm_p")})
    return Figure(pairwise["holm_p"][i][j], f"pairwise.holm_p.{i}.{j}", cells)


def _forgotten(table: Table, answer: Answer, names: Sequence[str]) -> list[str]:
    """The control questions, which the base answers without passages, beside the base's own."""
    known = table.known(list(names), "control_accuracy")
    answer.missing += [
        table.wants(f"control_accuracy of {name}", "control=QUESTIONS.jsonl")
        for name in names
        if name not in known
    ]
    told = [f"{name} {answer.show(figure, percent)}" for name, figure in known.items()]
    base = table("base", "control_accuracy") if "base" in table.arms else None
    if not told:
        return []
    if base is None:
        answer.missing.append(table.wants_arms("control_accuracy of base", "base"))
        return [f"On control questions: {', '.join(told)}."]
    others = [name for name in known if name != "base"]
    lost = ", ".join(
        f"{name} {answer.show(known[name] - base, points)} points against base" for name in others
    )
    kept = f" ({lost})" if lost else ""
    return [f"On control questions, base {answer.show(base, percent)}: {', '.join(told)}{kept}."]


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
