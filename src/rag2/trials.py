"""One seed of a comparison of fine-tuning methods: its inputs, its runs, and how they do."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from rag2 import config, pipeline, stages
from rag2.evaluation import arms, score, select, trial
from rag2.evaluation import robustness_inputs as inputs
from rag2.evaluation.arms import Arm
from rag2.evaluation.methods import Grid, Rate
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.perplexity import perplexity
from rag2.evaluation.questions import load_questions, split, with_choices
from rag2.evaluation.score import Reading
from rag2.evaluation.trial import QuestionSets, Rules
from rag2.generator.prompt import Prompt
from rag2.registry import TABLES, UserError
from rag2.sweep import table
from rag2.sweep.cell import Cell, Recipe, configuration, plan
from rag2.systems import Parts, Systems
from rag2.training import distributed
from rag2.training.log import progress
from rag2.worlds.almanac import Almanac

logger = logging.getLogger(__name__)

MADE = ("data", "base", "retriever")  # the stages of a world that every method shares
OWN = ("base", "frozen")  # rows of the table that no method may be called by


class TrialsConfig(pipeline.Inputs):
    """What is compared, and on what."""

    methods: dict[str, dict[str, Any]] = Field(
        default={name: {"tuning": name} for name in TABLES["tuning"]}, min_length=1
    )
    """row of the table -> settings of `rag2 train finetune` that make it; default: every tuning"""
    settings: dict[str, Any] = {}
    """settings of `rag2 train finetune` for all of them, over `recipes`/finetune.yaml"""
    kb: str | None = None
    """knowledge base file"""
    questions: str | None = None
    """JSONL of questions"""
    control: str | None = None
    """JSONL of questions that need no chunk: what is forgotten"""
    unrelated: str | None = None
    """text or JSONL that is not about the corpus, and is to stay as likely as it was"""
    texts: int = Field(default=100, ge=1)
    """at most so many of those, evenly spread"""
    paraphrases: str | None = None
    """JSONL of rewordings, read where settings say paraphrases_per_document=1 or more"""
    generator: str | None = None
    """the base"""
    retriever: str | None = None
    ks: list[Annotated[int, Field(ge=0)]] = Field(default=list(select.KS), min_length=1)
    """numbers of chunks to choose from on validation; 0 is the closed book"""
    readings: list[Reading] = Field(default=["marginal"], min_length=1)
    prompt: Prompt = Prompt()
    limit: int | None = Field(default=None, ge=1)
    """the first so many test questions of each seed; null: all"""
    device: str = "cpu"
    """cpu, cuda or cuda:N"""

    @property
    def task(self) -> str:
        """What results.json calls the questions."""
        return (
            self.world.name if self.world and not self.questions else Path(str(self.questions)).stem
        )

    @field_validator("methods")
    @classmethod
    def _names_are_rows(cls, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, settings in given.items():
            if name in OWN or name.endswith("_rag") or not name.isidentifier():
                raise ValueError(
                    f"{name!r} cannot be a row: letters, digits and _, not {' or '.join(OWN)}, and "
                    "not ending in _rag"
                )
            _refuse_set_elsewhere(name, settings)
        return given

    @field_validator("settings")
    @classmethod
    def _settings_are_free(cls, given: dict[str, Any]) -> dict[str, Any]:
        _refuse_set_elsewhere("settings", given)
        return given


def _refuse_set_elsewhere(where: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting of a run that the comparison makes."""
    made = {"lr", "seed", "out", "device", "resume", "kb", "questions", "generator", "paraphrases"}
    for key in settings.keys() & {*made, *pipeline.Inputs.model_fields}:
        raise ValueError(f"{where}.{key} is the same for all methods: set it outside")


@dataclass(frozen=True, slots=True)
class Run:
    """A method at a rate: a cell of a sweep over train/finetune.py."""

    method: str
    lr: float
    cell: Cell

    @property
    def name(self) -> str:
        """What its generator is called among the others."""
        return f"{self.method}@{self.lr:g}"

    @property
    def generator(self) -> str:
        """Its weights, once it has been trained."""
        return str(self.cell.directory / "final" / "generator")


class Trials:
    """The methods on one world, or with one seed of training where the data are given."""

    def __init__(self, cfg: TrialsConfig, seed: int, out: Path) -> None:
        """Check every setting; nothing is made yet."""
        self.cfg, self.seed, self.out = cfg, seed, out
        path = config.recipe("train/finetune.py")
        self.recipe = Recipe("train", "finetune", path, configuration(path))
        for method in cfg.methods:
            self._load(method, 1.0, {})

    def make(self) -> None:
        """The world's data, base and retriever, where they are not given or there already."""
        cfg = self.cfg
        if cfg.world is not None:
            home = self.out / f"seed-{self.seed}"
            world = cfg.world.model_copy(update={"seed": self.seed})
            cfg = cfg.model_copy(update={"world": world})
            pipeline.share(cfg, home, self.out / "stages", MADE)
            cfg = cfg.model_copy(update={"home": str(home)})
            pipeline.ensure(cfg, MADE)
            given = {"control": cfg.control or str(home / "data" / "control.jsonl")}
            given["paraphrases"] = cfg.paraphrases or str(pipeline.locate(home, "paraphrases"))
            cfg = cfg.model_copy(update=given)
        self.cfg = cfg = pipeline.resolve(cfg)
        assert cfg.kb and cfg.questions and cfg.generator and cfg.retriever
        for method in cfg.methods:
            if self._rewordings(method) and not cfg.paraphrases:
                raise UserError(f"methods.{method} learns from paraphrases: set paraphrases=FILE")
        self.sets = _sets(cfg)
        if max(cfg.ks) > (chunks := len(self._systems([]).chunks)):
            raise UserError(f"ks={cfg.ks}: the corpus has {chunks} chunks")
        self.texts = []
        if cfg.unrelated:
            self.texts = inputs.texts("unrelated", Path(cfg.unrelated), cfg.texts)
        elif isinstance(cfg.world, Almanac):
            self.texts = [f"{r['title']}\n{r['text']}" for r in cfg.world.unrelated(cfg.texts)]

    def train(self, rates: Mapping[str, Sequence[float]]) -> list[Run]:
        """A run of every method at each of its rates; the rates at which one failed are told."""
        digests: dict[str, str] = {}
        runs = [
            Run(method, lr, self._cell(method, lr, digests))
            for method, lrs in rates.items()
            for lr in lrs
        ]
        todo = {run.name: run for run in runs if not run.cell.is_done()}
        failed: dict[str, str] = {}

        def done(name: str) -> None:
            cell = todo[name].cell
            cell.finish(*table.read(cell.directory, "finetune"))

        jobs = []
        for name, run in todo.items():
            run.cell.begin(self.out / "stages")
            jobs.append(replace(run.cell.job(), name=name, one_thread=True, result="final"))
        stages.run(
            jobs, self.cfg.jobs, done, lambda name, error: failed.update({name: error.reason})
        )
        for name, reason in failed.items():
            logger.warning("seed %d, %s: %s", self.seed, name, reason)
        return [run for run in runs if run.name not in failed]

    def grade(self, runs: Sequence[Run]) -> dict[str, Grid]:
        """Right validation questions of every run, closed book and with retrieval.

        What no rate could train is left out. Raises UserError without validation questions, and
        where no method is left.
        """
        asked = self.sets.validation
        if not asked:
            raise UserError(f"{self.cfg.questions}: no validation questions: they choose the rate")
        answers_Q = score.answers(asked)
        systems = self._systems(runs)
        found = arms.retrieve(asked, systems.retriever("warm"), max(self.cfg.ks))
        concat = self.cfg.ks if "concat" in self.cfg.readings else []

        def rate(run: Run) -> Rate | None:
            try:
                with systems.reader(run.name) as reader:
                    scores = arms.evaluate(asked, found, reader, advance, concat)
            except UserError as error:  # its log-likelihoods are no numbers
                logger.warning("seed %d, %s: %s", self.seed, run.name, error)
                return None
            with_chunks = select.choose(scores, answers_Q, self.cfg.ks, self.cfg.readings)
            closed = float(np.mean(score.predict(scores.closed_QC) == answers_Q))
            return Rate(run.lr, closed, with_chunks.validation_accuracy)

        with (
            progress("validation", total=len(runs) * len(asked)) as advance,
            ThreadPoolExecutor(self.cfg.jobs) as threads,
        ):
            rates = list(threads.map(rate, runs))
        grids = {
            method: Grid(
                [r for run, r in zip(runs, rates, strict=True) if r and run.method == method]
            )
            for method in self.cfg.methods
        }
        left = {method: grid for method, grid in grids.items() if grid.rates}
        if not left:
            raise UserError("methods: training failed for all of them at every rate of lrs")
        return left

    def test(self, runs: Sequence[Run], grids: Mapping[str, Grid]) -> dict[str, ArmResult]:
        """The base and every method at its chosen rates, closed book and with retrieval."""
        systems = self._systems(runs)
        names = {(run.method, run.lr): run.name for run in runs}
        wanted = {"base": Arm("base"), "frozen_rag": Arm("base", "warm")}
        for method, grid in grids.items():
            for name, lr, retriever in (
                (method, grid.best("closed"), None),
                (f"{method}_rag", grid.best("rag"), "warm"),
            ):
                if (method, lr) not in names:
                    raise UserError(f"methods.{method}: seed {self.seed} failed at lr={lr:g}")
                wanted[name] = Arm(names[method, lr], retriever)
        rules = Rules(self.cfg.ks, self.cfg.readings)
        found = {
            retriever: trial.search(
                Arm("base", retriever), systems.retriever(retriever), self.sets, rules
            )
            for retriever in (None, "warm")
        }

        def run(generator: str) -> dict[str, ArmResult]:
            done, nats = {}, None
            with systems.reader(generator) as reader:
                if self.texts:
                    nats = perplexity(reader.generator, self.texts).per_token
                for name, arm in wanted.items():
                    if arm.generator == generator:
                        at = found[arm.retriever]
                        result = trial.run(
                            name, arm, self.sets, at, reader, rules, systems.gold, advance
                        ).result
                        done[name] = replace(result, unrelated_nats=nats)
            return done

        generators = sorted({arm.generator for arm in wanted.values()})
        with (
            progress("test", total=len(wanted) * len(self.sets.all())) as advance,
            ThreadPoolExecutor(self.cfg.jobs) as threads,
        ):
            done = {n: r for part in threads.map(run, generators) for n, r in part.items()}
        # Not beside other evaluations: taking in a document is timed.
        costs = {n: systems.cost(a) | systems.serving([a], done[n]) for n, a in wanted.items()}
        return {name: replace(done[name], **costs[name]) for name in wanted}

    def _load(self, method: str, lr: float, given: Mapping[str, Any]) -> Any:
        """The configuration of train/finetune.py; UserError for a mistake in it."""
        path = config.find(f"{self.cfg.recipes}/finetune.yaml")
        changes = {**self.cfg.settings, **self.cfg.methods[method], **given}
        changes |= {"lr": lr, "seed": self.seed, "device": self.cfg.device, "world": None}
        words = config.overrides(config.read(path), changes)
        try:
            return config.load(self.recipe.cls, str(path), words)
        except UserError as error:
            raise UserError(f"methods.{method}: {error}") from None

    def _cell(self, method: str, lr: float, digests: dict[str, str]) -> Cell:
        """Where the run lies, by all that decides its result."""
        given = {name: getattr(self.cfg, name) for name in ("kb", "questions", "generator")}
        if self._rewordings(method):
            given["paraphrases"] = self.cfg.paraphrases
        cfg = self._load(method, lr, given)
        label = {"seed": str(self.seed), "method": method, "lr": f"{lr:g}"}
        return plan(self.recipe, cfg, label, self.out, digests)

    def _rewordings(self, method: str) -> int:
        """Rewordings of each document that the method learns from beside it."""
        settings = {**self.cfg.settings, **self.cfg.methods[method]}
        return settings.get("paraphrases_per_document") or 0

    def _systems(self, runs: Sequence[Run]) -> Systems:
        cfg = self.cfg
        made = {"base": str(cfg.generator), **{run.name: run.generator for run in runs}}
        parts = Parts(Path(str(cfg.kb)), made, {"warm": str(cfg.retriever)})
        where = distributed.device(cfg.device)
        return Systems(parts, self.seed, cfg.prompt, self.sets.all(), {}, "float32", where)


def _sets(cfg: TrialsConfig) -> QuestionSets:
    """The questions by what they are for."""
    path = str(cfg.questions)
    questions = with_choices(load_questions(path), path)
    return QuestionSets(
        train=[],
        validation=[q for q in questions if q.split == "validation"],
        test=split(questions, "test")[: cfg.limit],
        control=with_choices(load_questions(cfg.control), cfg.control) if cfg.control else [],
        two_hop=[],
    )
