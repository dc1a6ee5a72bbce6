"""`rag2 train NAME` and `rag2 eval NAME`: the words go to the recipe as they are."""

import runpy
import sys
from collections.abc import Callable, Iterator

import typer

from rag2.cli.terminal import SETTINGS

# group -> recipe -> what it does, and an example of its use
RECIPES = {
    "train": {
        "pretrain": (
            "Train a base language model from scratch.",
            "configs/demo/pretrain.yaml steps=200 out=runs/base",
        ),
        "retriever": (
            "Warm-start the dual encoder by contrastive learning.",
            "configs/demo/retriever.yaml steps=100 out=runs/retriever",
        ),
        "finetune": (
            "Fine-tune the generator alone, fully or by adapter.",
            "configs/demo/finetune.yaml tuning.name=lora steps=20 out=runs/lora",
        ),
        "paraphrase": (
            "Let a causal LM reword documents, to fine-tune on.",
            "configs/demo/paraphrase.yaml count=10 out=runs/paraphrases",
        ),
        "logged": (
            "Let frozen RAG answer training questions, to fine-tune on what it said.",
            "configs/demo/logged.yaml confidence=0.8 out=runs/logged",
        ),
        "index": (
            "Encode a knowledge base, or one shard of it, and build its index.",
            "configs/demo/index.yaml out=runs/index",
        ),
        "joint": (
            "Train retriever and generator together.",
            "configs/demo/joint.yaml steps=60 refresh.every=15 out=runs/joint",
        ),
    },
    "eval": {
        "mc": (
            "Answer multiple-choice questions closed book.",
            "configs/demo/mc.yaml generator=runs/base/final/generator format=letters out=runs/mc",
        ),
        "compare": (
            "Answer the same questions with every arm.",
            "configs/demo/compare.yaml out=runs/compare",
        ),
        "methods": (
            "Compare fine-tuning methods, alone and with retrieval.",
            "configs/demo/methods.yaml out=runs/methods",
        ),
        "freshness": (
            "Change facts: update the knowledge base, or train again.",
            "configs/demo/freshness.yaml edits=50 out=runs/freshness",
        ),
        "open": (
            "Answer open questions in words, closed book and with retrieval.",
            "configs/hub/open_qwen3.yaml questions=q.jsonl kb=kb.sqlite out=runs/open",
        ),
        "recall": (
            "Measure how often the evidence is retrieved.",
            "configs/demo/recall.yaml retriever=runs/retriever/final/retriever out=runs/recall",
        ),
        "report": (
            "Write the report of a comparison again, from its files.",
            "configs/demo/report.yaml results=runs/compare",
        ),
        "robustness": (
            "Measure forgetting, abstention, style and faithfulness of every arm.",
            "configs/demo/robustness.yaml out=runs/robustness",
        ),
        "refresh": (
            "Time joint training with no re-index, a sync and an async one.",
            "configs/demo/refresh.yaml out=runs/refresh",
        ),
        "steps": (
            "Time one joint step in one pass and in two, and take its peak memory.",
            "configs/demo/steps.yaml out=runs/steps",
        ),
        "speed": (
            "Time the scoring of choices against lm-evaluation-harness.",
            "configs/demo/speed.yaml out=runs/speed",
        ),
        "backends": (
            "Measure build, search, memory and recall of every kind of index.",
            "configs/demo/backends.yaml sizes=[10000] out=runs/backends",
        ),
        "live": (
            "Time from a change of the knowledge base to the search that shows it.",
            "configs/demo/live.yaml out=runs/live",
        ),
        "serving": (
            "Compare rag2 serve with a naive server of the same checkpoint.",
            "configs/demo/serving.yaml export=exports/almanac out=runs/serving",
        ),
        "scaling": (
            "Measure what an index refresh costs, and plan it for larger corpora.",
            "configs/demo/scaling.yaml out=runs/scaling",
        ),
    },
}


def groups() -> Iterator[tuple[str, typer.Typer]]:
    """The commands of each group of recipes."""
    for group, recipes in RECIPES.items():
        commands = typer.Typer(help=f"Run a recipe of {group}/.", **SETTINGS)
        for name, (does, example) in recipes.items():
            commands.command(
                name,
                help=f"{does} Settings are key=value; --help lists them with their defaults.",
                add_help_option=False,
                context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
            )(_command(group, name, example))
        yield group, commands


def run_recipe(group: str, name: str, words: list[str]) -> None:
    """Run train/NAME.py or eval/NAME.py in this process, as `python FILE words...` would."""
    from rag2.config import recipe

    path = recipe(f"{group}/{name}.py")
    before = sys.argv
    sys.argv = [str(path), *words]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


def _command(group: str, name: str, example: str) -> Callable[[typer.Context], None]:
    """The command that hands its words over to a recipe."""

    def command(context: typer.Context) -> None:
        if {"-h", "--help"} & set(context.args):
            typer.echo(f"Example:\n  rag2 {group} {name} -c {example}\n")
        run_recipe(group, name, context.args)

    return command
