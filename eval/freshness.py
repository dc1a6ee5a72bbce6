"""Facts change: what a knowledge base takes in at once, and what training again is worth.

    rag2 eval freshness -c configs/demo/freshness.yaml out=runs/freshness
    rag2 eval freshness -c configs/demo/freshness.yaml arms=[frozen_rag] edits=50 \\
        tunings='{lora: {tuning: lora, steps: 60}}' out=runs/lora
    rag2 eval freshness kb=KB questions=FILE generators='{base: PATH}' retrievers='{warm: PATH}' \\
        arms=[frozen_rag] updates=DOCUMENTS.jsonl changed=QUESTIONS.jsonl out=runs/own
    rag2 eval freshness -c configs/factbook/freshness.yaml world.path=FACTBOOK out=runs/editions

Each arm answers before anything is done. Then the new documents go into a copy of the knowledge
base one by one, each durable and searchable before the next, and the arms that read chunks answer
again; and the base is trained again on the new corpus, once for each entry of `tunings`, and
answers closed book. With `editions` that is done for one after the other, each over what the one
before has left. docs/freshness.md says what is counted.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt
from rich.console import Console

from rag2 import artifact, config, lineup, pipeline, stages
from rag2.evaluation import arms, freshness, moving, place, revision, robustness, score, select
from rag2.evaluation.arms import Arm
from rag2.evaluation.environment import environment
from rag2.evaluation.freshness import NOTHING, UPDATE, Outcome
from rag2.evaluation.moving import Moving
from rag2.evaluation.questions import load_questions, split, with_choices
from rag2.evaluation.results import tidy
from rag2.evaluation.revision import Revision
from rag2.evaluation.select import Choice
from rag2.kb.store import KnowledgeBase
from rag2.lineup import LineupConfig
from rag2.registry import UserError
from rag2.retrieval import gold_chunks, recall
from rag2.sweep import table
from rag2.sweep.cell import Cell, Recipe, configuration, plan
from rag2.systems import TRAINED_BY, Systems
from rag2.training import distributed
from rag2.training.log import train_seconds
from rag2.types import Question
from rag2.worlds.factbook import Factbook
from rag2.worlds.factbook_revisions import revisions

CLOSED = Choice(0, 1.0, float("nan"))


class FreshnessConfig(LineupConfig):
    """Changed facts against arms: nothing done, the knowledge base updated, trained again."""

    out: str = "runs/freshness"
    arms: list[str] | None = Field(default=["ft", "frozen_rag", "joint"], min_length=1)
    """closed book, or over a dense retriever or BM25"""
    tunings: dict[str, dict[str, Any]] = {"full": {"tuning": "full"}, "lora": {"tuning": "lora"}}
    """row -> settings of `rag2 train finetune` on the new corpus, over `recipes`/finetune.yaml"""
    edits: PositiveInt = 100
    """test questions whose answer changes, where `updates` is not given; of each edition"""
    editions: list[str] = []
    """world factbook: the editions that come after its `newer`, taken in one after the other"""
    updates: str | None = None
    """JSONL of documents: new versions of some, or new ones"""
    changed: str | None = None
    """JSONL of questions about them: answer is the new one, metadata.stale the index of the old"""
    limit: int | None = Field(default=None, ge=1)
    """the first so many questions about what stays; null: all"""


def main(cfg: FreshnessConfig) -> dict[str, Any]:
    """Measure every row; writes freshness.json, .md and .png, and returns the first."""
    chosen = _check(cfg)
    place.check(cfg)
    later = editions(cfg)
    if not (cfg.kb and cfg.questions):
        pipeline.ensure(cfg, {"data"})
    path = cfg.questions or Path(cfg.home) / "data" / "questions.jsonl"
    questions = with_choices(load_questions(path), path)
    validation = [q for q in questions if q.split == "validation"]
    where = distributed.device(cfg.device)
    systems = Systems(lineup.parts(cfg), cfg.seed, cfg.prompt, questions, {}, cfg.dtype, where)
    lineup.check_depth(cfg, systems)
    names, _ = lineup.choose(cfg, [*chosen], chosen, systems, bool(validation))
    if needed := lineup.stages(cfg, [*names, *(["base"] if cfg.tunings else [])]):
        pipeline.ensure(cfg, needed)
    news = later or [revise(cfg, split(questions, "test"), systems)]
    news = [replace(revision, unchanged=revision.unchanged[: cfg.limit]) for revision in news]
    torch.set_num_threads(1)
    with place.claimed(cfg) as out:
        choices = choose(cfg, chosen, validation, systems)
        rows: list[list[Outcome]] = [[] for _ in news]  # of each revision
        for name, arm in chosen.items():
            asked = answer(name, arm, news, systems, choices[name], out)
            for told, found in zip(rows, asked, strict=True):
                told += found
        for told, found in zip(rows, retrained(cfg, news, systems, out), strict=True):
            told += found
        task = Path(cfg.questions).stem if cfg.questions else cfg.world and cfg.world.name
        results: dict[str, Any] = {
            "format": freshness.FORMAT,
            "task": task,
            "seed": cfg.seed,
            "revisions": [
                freshness.summary(told, revision, cfg.seed)
                for told, revision in zip(rows, news, strict=True)
            ],
            "environment": environment(),
        }
        artifact.replace(out / "freshness.md", freshness.markdown(results))
        (out / "freshness.png").write_bytes(freshness.picture(results))
        text = json.dumps(tidy(results), indent=2, ensure_ascii=False, allow_nan=False)
        artifact.replace(out / "freshness.json", text + "\n")
    Console().print(*freshness.terminal_tables(results))
    return results


def editions(cfg: FreshnessConfig) -> list[Revision]:
    """What each of `editions` changes after the one before it; nothing without any."""
    if not cfg.editions:
        return []
    assert isinstance(cfg.world, Factbook)
    return revision.dated(revisions(cfg.world, cfg.editions), cfg.edits)


def revise(cfg: FreshnessConfig, test: Sequence[Question], systems: Systems) -> Revision:
    """What changes: as the files say, or facts of the test questions."""
    if cfg.updates and cfg.changed:
        return revision.given(Path(cfg.updates), Path(cfg.changed), test)
    with KnowledgeBase(systems.parts.kb) as kb:
        documents = {document.id: document for document in kb.documents()}
    return revision.made(test, systems.gold, systems.chunks, documents, cfg.edits)


def copy(source: Path, path: Path) -> Path:
    """A fresh copy of a knowledge base; what an earlier run left there goes."""
    for end in ("", "-wal", "-shm", "-journal"):
        Path(f"{path}{end}").unlink(missing_ok=True)
    with KnowledgeBase(source) as kb:
        kb.copy(path)
    return path


def choose(
    cfg: FreshnessConfig,
    chosen: Mapping[str, Arm],
    validation: Sequence[Question],
    systems: Systems,
) -> dict[str, Choice]:
    """K, temperature and reading of each arm, by validation questions and the old corpus."""
    choices = {}
    for name, arm in chosen.items():
        if arm.retriever is None:
            choices[name] = CLOSED
            continue
        found = arms.retrieve(validation, systems.retriever(arm.retriever), max(cfg.ks))
        concat = cfg.ks if "concat" in cfg.readings else []
        with systems.reader(arm.generator) as reader:
            scores = arms.evaluate(validation, found, reader, concat=concat)
        choices[name] = select.choose(scores, score.answers(validation), cfg.ks, cfg.readings)
    return choices


def answer(
    name: str,
    arm: Arm,
    news: Sequence[Revision],
    systems: Systems,
    choice: Choice,
    out: Path,
) -> Iterator[list[Outcome]]:
    """What the arm answers to each revision before it and, if it reads chunks, after it."""
    searched = systems.retriever(arm.retriever)
    if searched is None:
        for told in news:
            yield [ask(name, arm, told, systems, choice, NOTHING)]
        return
    own, chunker = copy(systems.parts.kb, out / f"kb-{name}.sqlite"), systems.chunker()
    with moving.opened(own, searched) as base:
        for told in news:
            before = ask(name, arm, told, systems, choice, NOTHING, base)
            took = base.take_in(told, chunker)
            after = ask(name, arm, told, systems, choice, UPDATE, base)
            seconds = {"seconds": took.seconds, "document_seconds": took.document_seconds}
            yield [before, replace(after, **seconds)]


def ask(
    name: str,
    arm: Arm,
    news: Revision,
    systems: Systems,
    choice: Choice,
    done: str,
    base: Moving | None = None,
) -> Outcome:
    """The arm's picks, over what the knowledge base holds by now."""
    retriever = base.retriever if base and choice.k else None
    found = [arms.retrieve(q, retriever, choice.k) for q in (news.changed, news.unchanged)]
    chunks = base.chunks() if base else []
    with systems.reader(arm.generator) as reader:
        reader.by_id = {chunk.id: chunk for chunk in chunks}
        picks = [
            robustness.read(questions, seen, reader, choice).picks_Q
            for questions, seen in zip((news.changed, news.unchanged), found, strict=True)
        ]
    asked = Outcome(name, done, picks[0], picks[1], k=choice.k)
    if base is None or done == NOTHING:
        return asked
    gold = gold_chunks(news.changed, chunks)
    hits_Q = recall(found[0].ids_QK, [gold[q.id] for q in news.changed], choice.k)
    return replace(asked, found_Q=hits_Q > 0)


def retrained(
    cfg: FreshnessConfig, news: Sequence[Revision], systems: Systems, out: Path
) -> Iterator[list[Outcome]]:
    """For each revision the base trained again on the new corpus in each way, closed book."""
    before = systems.parts.kb
    for told in news:
        path = copy(before, out / f"{told.name}.sqlite")
        with KnowledgeBase(path) as kb:
            kb.put(told.documents, systems.chunker())
            kb.remove(told.removed)
            kb.seal()
        before = path
        cells = {name: cell(cfg, name, systems, path, out) for name in cfg.tunings}
        train(cells, out)
        rows = []
        for name, made in cells.items():
            generators = {name: str(made.directory / "final" / "generator")}
            parts = replace(systems.parts, generators=generators)
            again = Systems(parts, cfg.seed, cfg.prompt, [], {}, cfg.dtype, systems.device)
            asked = ask("ft", Arm(name), told, again, CLOSED, name)
            rows.append(replace(asked, seconds=train_seconds(made.directory)))
        yield rows


def train(cells: Mapping[str, Cell], out: Path) -> None:
    """Run the cells that are not there yet."""
    todo = {name: cell for name, cell in cells.items() if not cell.is_done()}
    jobs = []
    for name, made in todo.items():
        made.begin(out / "stages")
        jobs.append(replace(made.job(), name=name, one_thread=True, result="final"))

    def done(name: str) -> None:
        todo[name].finish(*table.read(todo[name].directory, "finetune"))

    stages.run(jobs, 1, done)  # one at a time: they are timed


def cell(cfg: FreshnessConfig, name: str, systems: Systems, kb: Path, out: Path) -> Cell:
    """The run of train/finetune.py that trains the base again."""
    base = systems.parts.generators["base"]
    recipe, made = _finetune(cfg, name, {"kb": str(kb), "generator": base})
    return plan(recipe, made, {"tuning": name}, out, {})


def _finetune(cfg: FreshnessConfig, name: str, given: Mapping[str, Any]) -> tuple[Recipe, Any]:
    """train/finetune.py and its configuration; UserError for a mistake in `tunings`."""
    script = config.recipe("train/finetune.py")
    recipe = Recipe("train", "finetune", script, configuration(script))
    yaml = config.find(f"{cfg.recipes}/finetune.yaml")
    changes = {**cfg.tunings[name], **given, "seed": cfg.seed, "device": cfg.device, "world": None}
    words = config.overrides(config.read(yaml), changes)
    try:
        return recipe, config.load(recipe.cls, str(yaml), words)
    except UserError as error:
        raise UserError(f"tunings.{name}: {error}") from None


def _check(cfg: FreshnessConfig) -> dict[str, Arm]:
    """The arms by name; UserError for what cannot be, before anything is made."""
    lineup.check(cfg)
    chosen = {name: arms.arm(name) for name in cfg.arms or ()}
    for name, arm in chosen.items():
        if arm.retriever not in (None, "bm25", *TRAINED_BY):
            raise UserError(
                f"arms: {name} reads by {arm.retriever}; allowed: closed book, and what reads by "
                f"{', '.join(TRAINED_BY)} or bm25"
            )
    if bool(cfg.updates) != bool(cfg.changed) or not (cfg.updates or cfg.world):
        raise UserError("updates=DOCUMENTS and changed=QUESTIONS go together, or take a world")
    if cfg.editions and cfg.updates:
        raise UserError("editions and updates both say what changes: give one of them")
    if cfg.editions and not isinstance(cfg.world, Factbook):
        raise UserError(f"editions={cfg.editions}: world factbook alone has dated editions")
    made = {"seed", "device", "out", "resume", "kb", "generator", "world"}
    for name, settings in cfg.tunings.items():
        if not name.isidentifier() or name in (NOTHING, UPDATE):
            raise UserError(f"tunings: {name!r} cannot be a row: letters, digits and _")
        for key in settings.keys() & made:
            raise UserError(f"tunings.{name}.{key} is the same for all: set it outside")
        _finetune(cfg, name, {})
    return chosen


if __name__ == "__main__":
    config.run(main, FreshnessConfig)
