"""results.json -> what its numbers answer to the five questions of whoever has to choose an arm.

Every number is a cell of the table or a formula of cells, and goes with the answer; there is no
threshold here. What the table does not hold is said with the command that would measure it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rag2.evaluation.columns import significant, three
from rag2.evaluation.contrasts import CONTROLS
from rag2.evaluation.figures import Answer, Cells, Figure, Missing
from rag2.evaluation.verdict import Results, percent, points
from rag2.registry import UserError

FORMAT = "rag2.advice/1"
DAY = Figure(86400.0, "86400")
# What an arm pays besides being wrong: to train, to ship, to run. By the clock two arms that do the
# same differ a little, so that latency, and memory, are told and no reason to be on the front.
COSTS = ("train_seconds", "ship_bytes", "inference_flops")
BESIDE = ("peak_memory_bytes", "latency_ms.p50")
FORMS: dict[str, tuple[Callable[[float], str], str]] = {
    "train_seconds": (three, "s of training"),
    "ship_bytes": (lambda count: significant(count, "B"), "to ship"),
    "inference_flops": (lambda count: significant(count, "FLOP"), "a question"),
    "peak_memory_bytes": (lambda count: significant(count, "B"), "of memory to train"),
    "latency_ms.p50": (three, "ms a question"),
}


def advise(results: Results, compare: str, alpha: float | None = None) -> list[Answer]:
    """The five answers; `compare` is the command that made the table, without its last settings.

    `alpha` is the p value below which the reader calls two arms different; None: that is left open.
    Raises UserError where there is no arm to choose, or one without an accuracy.
    """
    table = Table(results, compare)
    if not table.names:
        raise UserError(f"there is no arm to choose: only controls ({', '.join(table.arms)})")
    for name in table.names:
        if table(name, "accuracy") is None:
            raise UserError(f"arm {name} has no accuracy")
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
        whose = "any arm" if set(without) == set(self.names) else ", ".join(without)
        return [self.wants(f"{key} of {whose}", *setting)]


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
    right, other = (
        answer.show(table.cell(name, "accuracy"), percent) for name in (reader, trained)
    )
    answer.sentences.append(
        f"{reader} (accuracy {right}) takes in a new document in {answer.show(takes, three)} s; "
        f"{trained} ({other}) is trained again for {answer.show(again, three)} s, however many "
        "documents changed."
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
    for key in (*COSTS, "latency_ms.p50"):
        answer.missing += table.lacks(table.names, key)
    placed = [n for n in table.names if all(n in table.known(table.names, k) for k in keys)]
    if not keys or not placed:
        return answer
    beaten = {name: by for name in placed if (by := beater(table, name, placed, keys))}
    front = [name for name in table.best(placed) if name not in beaten]
    answer.sentences.append(
        f"None is at least as good as one of these in accuracy, {_listed(keys)} and better in "
        "one of them: "
        + "; ".join(_costs(table, answer, name, (*keys, *BESIDE)) for name in front)
        + "."
    )
    for by in dict.fromkeys(beaten.values()):
        worse = [_costs(table, answer, name, keys) for name in beaten if beaten[name] == by]
        answer.sentences.append(f"{by} is as good as these or better in all: {'; '.join(worse)}.")
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


def _costs(table: Table, answer: Answer, name: str, keys: Sequence[str]) -> str:
    shown = [f"{name} {answer.show(table.cell(name, 'accuracy'), percent)}"]
    for key in keys:
        figure, (form, unit) = table(name, key), FORMS[key]
        if figure is not None:
            shown.append(f"{answer.show(figure, form)} {unit}")
    return ", ".join(shown)


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
        (table.readers, "A new document can be found after"),
        (table.trained, "Into these it gets by a whole run of training alone"),
    ):
        told = [_pace(answer, name, known[name]) for name in order if name in names]
        if told:
            answer.sentences.append(f"{how}: {', '.join(told)}.")
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
    tests = {name: _test(table, top, name) for name in order[1:]}
    answer.sentences.append(f"{top} answers most questions right, {shown}{'.' * (not tests)}")
    for name in order[1:2]:
        answer.sentences[-1] += _lead(table, answer, top, name, tests[name])
    if alpha is not None and tests:
        answer.sentences.append(_told_apart(answer, top, tests, alpha))
    answer.sentences += _forgotten(table, answer, order[:2])
    return answer


def _lead(table: Table, answer: Answer, top: str, name: str, test: Figure | None) -> str:
    """How far the best arm is ahead of the next one, and how likely that is by chance."""
    second = table.cell(name, "accuracy")
    gap = table.cell(top, "accuracy") - second
    shown = answer.show(second, percent)
    lead = (
        f"{answer.show(gap, lambda share: f'{100 * share:.1f}')} points more than {name} ({shown})"
        if gap.value
        else f"no more than {name} ({shown})"
    )
    if test is None:
        answer.missing.append(table.wants(f"a paired test of {top} and {name}"))
        return f", {lead}."
    return f", {lead}; paired test, adjusted for all pairs: p = {answer.show(test, _p)}."


def _p(value: float) -> str:
    return f"{value:.2g}"


def _told_apart(answer: Answer, top: str, tests: Mapping[str, Figure | None], alpha: float) -> str:
    level = answer.show(Figure(alpha, "alpha"), lambda value: f"{value:g}")
    tied = [(name, test) for name, test in tests.items() if test and test.value >= alpha]
    if not tied:
        return f"At {level} no tested arm is level with it."
    named = ", ".join(f"{n} (p = {answer.show(t, _p)})" for n, t in tied)
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
