"""Which arms a recipe compares: what they are made of, and what somebody must give or make."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import Field

from rag2 import pipeline
from rag2.evaluation import arms, select
from rag2.evaluation.score import Reading
from rag2.evaluation.shots import Shots
from rag2.generator.prompt import Prompt
from rag2.registry import UserError, nearest
from rag2.retriever.encoder import EncoderConfig
from rag2.systems import TRAINED_BY, Parts, Systems, trained_retriever


class LineupConfig(pipeline.Inputs):
    """The arms, their parts, and how they read."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    arms: list[str] | None = Field(default=None, min_length=1)
    """null: every arm whose parts are given or made by the world; `staged`, which first answers a
    log of questions, only if it is named here or its generator is given"""
    kb: str | None = None
    """knowledge base file"""
    questions: str | None = None
    """JSONL of questions; those of split validation choose K"""
    control: str | None = None
    """JSONL of questions that the base answers by heart, reported apart"""
    generators: dict[str, str] = {}
    """base, ft, ... -> folder or hub id; those not named here are made by the world"""
    retrievers: dict[str, str] = {}
    """warm, joint -> encoder folder"""
    encoder: EncoderConfig | None = None
    """pretrained encoder that is the warm retriever where none is given"""
    ks: list[int] = Field(default=list(select.KS), min_length=1)
    """numbers of chunks to choose from on validation; 0 is the closed book"""
    readings: list[Reading] = Field(default=["marginal"], min_length=1)
    """marginal: each chunk alone, mixed by p(k|q); concat: the best k in one prompt. Of several,
    validation chooses, and all are reported"""
    shots: Shots = Shots()
    """worked examples before each question, from the training questions"""
    prompt: Prompt = Prompt()
    dtype: str = "float32"
    """of the generators"""
    device: str = "cpu"
    """cpu, cuda or cuda:N"""


def check(cfg: LineupConfig) -> None:
    """Raise UserError for names and numbers that cannot be, before anything is made."""
    if any(k < 0 for k in cfg.ks):
        raise UserError(f"ks={cfg.ks}: a number of chunks is 0 or more")
    for key, given, known in (
        ("generators", cfg.generators, arms.GENERATORS),
        ("retrievers", cfg.retrievers, tuple(TRAINED_BY)),
    ):
        for name in given:
            if name not in known:
                allowed = ", ".join(known)
                raise UserError(
                    f"{key}: unknown name {name!r}; allowed: {allowed}.{nearest(name, known)}"
                )
    if cfg.world is None and not (cfg.kb and cfg.questions and cfg.generators):
        raise UserError(
            "world is not given: set world=NAME, or kb=, questions= and generators= of your own"
        )


def check_depth(cfg: LineupConfig, systems: Systems) -> None:
    """Raise UserError where more chunks are asked for than the corpus has."""
    if max(cfg.ks) > len(systems.chunks):
        raise UserError(
            f"ks={cfg.ks}: K is larger than the corpus of {len(systems.chunks)} chunks; "
            f"allowed: 0 to {len(systems.chunks)}"
        )


def parts(cfg: LineupConfig) -> Parts:
    """Where every part is, or will be made."""
    made = Parts.of_home(Path(cfg.home)) if cfg.world else Parts(Path(), {}, {})
    return Parts(
        Path(cfg.kb) if cfg.kb else Path(cfg.home) / "data" / "kb.sqlite",
        {**made.generators, **cfg.generators},
        {**made.retrievers, **cfg.retrievers},
        None if "warm" in cfg.retrievers else cfg.encoder,
    )


def choose(
    cfg: LineupConfig,
    asked: Sequence[str] | None,
    known: Iterable[str],
    systems: Systems,
    validated: bool,
) -> tuple[list[str], dict[str, str]]:
    """The arms to run, by name, and what the others lack, where none was asked for by name.

    `asked` are those named, `known` those to choose from where none is; `validated` says whether
    there are validation questions. Raises UserError for an arm that was asked for and lacks a part,
    or them.
    """
    usual = [n for n in known if n not in arms.ON_REQUEST or n in cfg.generators]
    chosen, left_out = [], {}
    for name in usual if asked is None else asked:
        members = arms.members(name).values()
        lacking = next(filter(None, map(systems.lacks, members)), None)
        if any(a.retriever not in (None, "gold") for a in members) and not validated:
            lacking = "validation questions: K is chosen on those of split validation"
        if lacking and asked is not None:
            raise UserError(f"arm {name} lacks {lacking}")
        if lacking:
            left_out[name] = lacking
        else:
            chosen.append(name)
    if not chosen:
        raise UserError("there is no arm to run: give generators={base: PATH}, or a world")
    return chosen, left_out


def stages(cfg: LineupConfig, chosen: Sequence[str]) -> set[str]:
    """The stages of the world that make what the arms need and nobody gave."""
    if cfg.world is None:
        return set()
    single = arms.members(*chosen).values()
    trained = {trained_retriever(arm) for arm in single} - {None, *cfg.retrievers}
    if cfg.encoder:
        trained -= {"warm"}
    made = {arm.generator for arm in single} - cfg.generators.keys()
    return made | {TRAINED_BY[str(name)] for name in trained}
