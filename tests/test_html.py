"""The report's page and its other forms: complete, safe with foreign texts, the same every time."""

import base64
import hashlib
import io
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import hostile
from rag2.evaluation import canvas, curves, files, latex, markdown, report
from rag2.evaluation.html import browser, html, spread
from rag2.evaluation.plots import pictures
from rag2.registry import UserError

ADDRESS = re.compile(r"(?:https?:)?//[\w.-]+")
NAMESPACE = re.compile(r'xmlns(:\w+)?="http://www\.w3\.org/[\w/]+"')


class Elements(HTMLParser):
    """Every start tag of a page with its attributes, and the text inside scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def outside(page: str) -> Iterator[str]:
    """Everything in a page that would be asked for over a network, or run when it should not."""
    for tag, attributes in Elements(page).tags:
        yield from (f"<{tag} {key}>" for key in attributes if key.startswith("on"))
        for key in {"src", "href", "xlink:href", "action", "data", "srcset"} & attributes.keys():
            if not (attributes[key] or "").startswith("#"):
                yield f"<{tag} {key}={attributes[key]}>"
        if tag in {"img", "iframe", "link", "base", "object", "embed", "form"} - {"form"}:
            yield f"<{tag}>"
    yield from re.findall(r"@import|url\((?!#)", page.split("</style>")[0])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """(results, page, its directory) of a small evaluation of hostile texts."""
    directory = tmp_path_factory.mktemp("report")
    results, path = hostile.write(directory, np.random.default_rng(0), n=24)
    return results, path.read_text(encoding="utf-8"), directory


def with_everything(results: dict[str, Any]) -> dict[str, Any]:
    """The results with every optional number."""
    results = json.loads(json.dumps(results))
    point = {"accuracy": 0.5, "ci95": [0.4, 0.6], "validation_accuracy": 0.5}
    for arm in results["arms"].values():
        arm |= {"acc_bytes": 0.1, "acc_mutual_info": 0.2, "debiased_accuracy": 0.3}
        arm |= {"relative_gain": 0.25, "eval_tokens": 1234, "peak_memory_bytes": 3 << 20}
    for name in ("frozen_rag", "joint"):
        curve = [{"k": k, **point} for k in (0, 1, 2)]
        results["arms"][name]["by_k"] = {"marginal": curve, "concat": curve[1:]}
        results["arms"][name]["readings"] = {
            reading: {"accuracy": 0.5, "ci95": [0.4, 0.6], "k": 1, "temperature": 2.0}
            | {"control_accuracy": 0.5, "two_hop_accuracy": None}
            for reading in ("marginal", "concat")
        }
    names = list(results["arms"])
    table = [[None if a == b else 0.01 for b in names] for a in names]
    return results | {"pairwise": {"arms": names, "holm_p": table, "difference": table}}


def test_the_page_asks_for_nothing_and_runs_one_script_only(written):
    _, page, _ = written
    assert not list(outside(page))
    # Whatever else looks like an address is text of the questions or names a format.
    texts = NAMESPACE.sub("", re.sub(r'<script id="data".*?</script>', "", page, flags=re.S))
    assert not ADDRESS.findall(texts)
    elements = Elements(page)
    data, script = elements.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for t, a in elements.tags if t == "meta" and "http-equiv" in a)
    assert policy and policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy
    assert json.loads(data)["questions"]


@pytest.mark.parametrize(
    "planted",
    [
        '<img src="https://example.invalid/x.png">',
        '<script src="//example.invalid/x.js"></script>',
        '<link rel="stylesheet" href="x.css">',
        "<p onclick=alert(1)>",
    ],
)
def test_a_planted_reference_is_noticed(written, planted: str):
    assert list(outside(written[1].replace("<main", f"{planted}<main", 1)))


def test_foreign_texts_come_out_as_text(written):
    results, page, _ = written
    elements = Elements(page)
    assert [tag for tag, _ in elements.tags].count("script") == 2
    assert "window.broken" not in elements.scripts[1]
    shown = json.loads(elements.scripts[0])
    asked = hostile.questions(24)
    assert [row["question"] for row in shown["questions"]] == [q.question for q in asked]
    assert [row["choices"] for row in shown["questions"]] == [list(q.choices) for q in asked]
    assert all(hostile.PASSAGES[int(c)] == text for c, text in shown["passages"].items())
    assert "&lt;/script&gt;&lt;script&gt;window.broken" in page  # the task's name, the groups
    assert "{{ 7 * 7 }}" in elements.scripts[0] and "49" not in results["task"]


def test_the_question_browser_has_every_arms_numbers(written):
    results, _, directory = written
    samples = files.read_samples(directory, results["arms"])
    shown = browser(samples, hostile.PASSAGES, limit=10)
    assert [row["number"] for row in shown["questions"]] == spread(24, 10)
    used = set()
    for row in shown["questions"]:
        for name, answer in zip(shown["arms"], row["arms"], strict=True):
            sample = samples[name][row["number"]]
            logp = [float(pair[0][0]) for pair in sample["resps"]]
            assert answer["logp"] == pytest.approx(logp, abs=1e-4)
            assert answer["pick"] == int(np.argmax(logp)) == sample["prediction"]
            assert answer["right"] == (answer["pick"] == row["answer"])
            assert [chunk for chunk, _, _ in answer["retrieved"]] == [
                item["chunk"] for item in sample["retrieved"]
            ]
            used |= {chunk for chunk, _, _ in answer["retrieved"]}
    assert set(shown["passages"]) == {str(chunk) for chunk in used}  # and no other passage


def test_the_page_tells_how_many_questions_it_holds(written):
    results, page, directory = written
    assert "24 of 24 questions." in page
    samples = files.read_samples(directory, results["arms"], limit=7)
    assert "7 of 24 questions, spread evenly" in html(results, samples, {}, {})
    assert "Single questions" not in html(results, {}, {}, {})


def test_questions_are_spread_evenly(dice):
    count, limit = dice.randint(1, 10_000), dice.randint(1, 300)
    rows = spread(count, limit)
    assert len(rows) == min(count, limit) and rows[0] == 0 and rows[-1] < count
    gaps = np.diff([*rows, count])
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


SECTIONS = {"Ways of reading", "Accuracy against K", "Training", "Paired differences"}
FIGURES = {"relative_gain", "by_k", "significance", "cost", "accuracy", "loss", "recall"}


def test_what_has_no_numbers_is_left_out_and_what_has_is_there(written):
    results, _, _ = written
    results = {key: value for key, value in results.items() if key != "pairwise"}
    plain = {n: arm | {"relative_gain": None} for n, arm in results["arms"].items()}
    results = results | {"arms": plain}
    bare = pictures(results, {})
    assert set(bare) == {"accuracy", "cost"}
    page = html(results, {}, {}, bare)
    assert {title for title in SECTIONS if f">{title}</h2>" in page} == {"Paired differences"}
    assert "relative gain" not in page and "peak memory" not in page
    full = with_everything(results)
    drawn = pictures(full, hostile.LOGS)
    assert set(drawn) == FIGURES
    page = html(full, {}, {}, drawn)
    assert all(f">{title}</h2>" in page for title in SECTIONS)
    assert page.count("<figure") == len(FIGURES) == page.count("<svg role=")
    for text in ("+25.0 %", "3 MiB", "1,234", "mutual information", "debiased", "concat"):
        assert f">{text}<" in page and f" {text} |" in markdown.markdown(full), text
    one = {**results, "arms": {"base": results["arms"]["base"]}, "paired": []}
    assert not pictures(one, {})


def test_a_diverged_loss_and_an_empty_log_do_not_stop_the_report():
    rows = [{"step": 0, "loss": float("nan")}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    with canvas.style():
        plot = curves.loss({"joint": rows, "empty": []})
        assert plot and [axes.get_title("left") for axes in plot.figure.axes[:1]] == ["joint"]
        assert np.asarray(plot.figure.axes[0].lines[0].get_xydata()).tolist() == [
            [1, 2.0],
            [2, 1.0],
        ]
        assert curves.loss({"joint": rows[:2]}) is None and curves.recall({"joint": rows}) is None


def test_a_long_loss_curve_keeps_its_mean_and_its_peaks(rng):
    values = rng.exponential(size=5 * curves.BINS + 3)
    with canvas.style():
        plot = curves.loss({"a": [{"step": n, "loss": v} for n, v in enumerate(values)]})
    assert plot
    axes = plot.figure.axes[0]
    line = np.asarray(axes.lines[0].get_ydata())
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert len(line) == curves.BINS and line.mean() == pytest.approx(values.mean(), rel=0.02)
    assert (band[:, 1].min(), band[:, 1].max()) == (values.min(), values.max())


@pytest.mark.parametrize("spread_of", [0.0, 0.02, 1.0])
def test_names_of_points_never_overlap(rng, spread_of: float):
    names = [f"arm_{'x' * (number % 9)}" for number in range(14)]
    x_N = (100 * np.exp(spread_of * rng.normal(size=14))).tolist()
    y_N = (70 + 10 * spread_of * rng.normal(size=14)).tolist()
    with canvas.style():
        figure = canvas.figure(3.6)
        axes = figure.add_subplot()
        axes.plot(x_N, y_N, "o")
        axes.set_xscale("log")
        axes.set_ylim(0, 105)
        canvas.label_points(figure, axes, x_N, y_N, names)
        figure.set_dpi(250)  # as for a PNG
        figure.draw_without_rendering()
        labels = [text for text in axes.texts if text.get_text()]
        boxes = [text.get_window_extent() for text in labels]
    assert sorted(text.get_text() for text in labels) == sorted(names)
    points = axes.transData.transform(np.column_stack([x_N, y_N]))
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    assert not [box for box in boxes if any(box.contains(*point) for point in points)]


@pytest.mark.parametrize("longest", [1.1, 3.0, 90.0, 1e6])
def test_the_axis_of_seconds_always_has_numbers(written, longest: float):
    results = json.loads(json.dumps(written[0]))
    for number, arm in enumerate(results["arms"].values()):
        arm |= {"train_seconds": 100.0 * longest ** (number / 2), "eval_seconds": 1.0}
    svg = pictures(results, {})["cost"].svg
    numbers = re.findall(r"<text[^>]*text-anchor: middle[^>]*>([^<]*)</text>", svg)
    assert 2 <= sum(text.replace(".", "").replace("e+", "").isdigit() for text in numbers) <= 12
    assert "$" not in svg


def test_equal_evaluations_give_equal_bytes(written, tmp_path):
    _, page, directory = written
    _, path = hostile.write(tmp_path, np.random.default_rng(0), n=24)
    assert path.read_text(encoding="utf-8") == page
    drawn = list((directory / "plots").iterdir())
    assert len(drawn) == 6
    for picture in drawn:
        assert (tmp_path / "plots" / picture.name).read_bytes() == picture.read_bytes()


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    def settings() -> dict[str, Any]:  # asking for the backend would import pyplot
        return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}

    before = settings()
    with canvas.style():
        assert settings()["text.color"] == canvas.INK != before["text.color"]
    assert settings() == before


def test_the_report_can_be_written_again_from_its_files(recipe, written, tmp_path):
    results, page, directory = written
    again_in = tmp_path / "copy"
    shutil.copytree(directory, again_in)
    for name in ("report.html", "report.md", "report.tex"):
        (again_in / name).unlink()
    (again_in / "plots" / "by_k.png").write_bytes(b"of an older report")
    for stage, rows in hostile.LOGS.items():
        (again_in / stage).mkdir()
        lines = [json.dumps(row) for row in rows]
        (again_in / stage / "log.jsonl").write_text("\n".join([*lines, '{"st']))  # cut off
    again(recipe, results=again_in)
    fresh, old = ((again_in / "report.html").read_text(), page)
    data, before = (json.loads(Elements(text).scripts[0]) for text in (fresh, old))
    assert data.pop("passages") == {} and before.pop("passages")  # there is no knowledge base
    assert data == before
    island = re.compile(r'<script id="data".*?</script>', re.S)
    assert island.sub("", fresh) == island.sub("", old)
    assert (again_in / "report.md").read_text() == markdown.markdown(results)
    assert (again_in / "report.tex").read_text() == latex.latex(results)
    drawn = {path.stem for path in (again_in / "plots").iterdir()}
    assert drawn == {"accuracy", "cost", "loss", "recall", "relative_gain", "significance"}


def test_passages_come_from_the_knowledge_base(home, chunks, dice):
    wanted = dice.sample(chunks, 3)
    rows = [{"retrieved": [{"chunk": chunk.id}]} for chunk in wanted]
    rows.append({"retrieved": [{"chunk": 10**9}]})  # removed since: left out
    found = files.read_passages(home / "data" / "kb.sqlite", {"joint": rows})
    assert found == {chunk.id: chunk.passage for chunk in wanted}


def again(recipe, **settings: object) -> None:
    module: ModuleType = recipe("eval/report.py")
    module.main(module.ReportConfig(**{key: str(value) for key, value in settings.items()}))


def test_what_is_no_evaluation_is_refused(recipe, written, tmp_path):
    _, _, directory = written
    with pytest.raises(UserError, match=r"not a directory\. Did you mean 'report"):
        again(recipe, results=directory.with_name(directory.name[:-1] + "X"))
    with pytest.raises(UserError, match="there is no results.json in it"):
        again(recipe, results=tmp_path)
    path = tmp_path / "results.json"
    for text, complaint in (
        ("{", "is not JSON"),
        ("[]", "has format 'None'; this version reads 'rag2.results/1'"),
        ('{"format": "rag2.results/9"}', "has format 'rag2.results/9'"),
        ('{"format": "rag2.results/1", "n": 1}', "is incomplete: no arms, environment"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=complaint):
            again(recipe, results=tmp_path)
    with pytest.raises(UserError, match="knowledge base 'nowhere' does not exist"):
        again(recipe, results=directory, kb="nowhere")
    with pytest.raises(UserError, match="logs='nowhere' is not a directory"):
        again(recipe, results=directory, logs="nowhere")


def test_arms_that_answered_other_questions_are_not_put_side_by_side(written, tmp_path):
    results, _, directory = written
    for name in results["arms"]:
        lines = (directory / f"samples_{name}.jsonl").read_text().splitlines(keepends=True)
        kept = lines[1:] if name == "joint" else lines
        (tmp_path / f"samples_{name}.jsonl").write_text("".join(kept))
    with pytest.raises(UserError, match="samples_joint.jsonl answers other questions than"):
        files.read_samples(tmp_path, results["arms"])
    (tmp_path / "samples_joint.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="samples_joint.jsonl holds a line that is no sample"):
        files.read_samples(tmp_path, results["arms"])


def test_the_tables_of_other_programs_survive_foreign_names(written):
    name = json.dumps("a|b_c & 5% \\x{}\n#~^$")
    results = json.loads(json.dumps(written[0]).replace('"base"', name))
    text = latex.latex(results)
    assert r"a|b\_c \& 5\% \textbackslash{}x\{\} \#\textasciitilde{}\textasciicircum{}\$ &" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == 3
    assert all(re.sub(r"\\[&%]", "", line).count(" & ") == 3 for line in body)
    best = max(arm["accuracy"] for arm in results["arms"].values())
    assert text.count(r"\textbf{") == sum(a["accuracy"] == best for a in results["arms"].values())
    for block in markdown.markdown(results).split("\n\n"):
        if block.startswith("|"):
            bars = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(bars) == 1, block


def test_the_terminal_table_is_readable_on_eighty_columns(written):
    results = json.loads(json.dumps(written[0]))
    results["arms"]["ft_paraphrase"] = results["arms"]["joint"] | {"train_seconds": 123456.7}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.terminal_table(results))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    rows = {line.split()[1]: line for line in lines if line.startswith("│")}
    assert set(rows) == set(results["arms"])  # one line an arm: nothing wraps
    assert "123456.7" in rows["ft_paraphrase"] and "50.0 %" in rows["joint"]
