"""A source -> README.md, a Hugging Face model card: what it is, how good, how made, how used."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from rag2 import hub, yaml12
from rag2.answering.exported import Meta
from rag2.export.source import ARM, Source
from rag2.retriever.encoder import DualEncoder

# Of a run's settings those that are paths of the machine, or of the job around it.
LEFT_OUT = {"out", "home", "recipes", "jobs", "world", "stage", "resume", "log_with"}
PATHS = {"kb", "questions", "generator", "retriever"}


def text(source: Source, encoder: DualEncoder, staging: Path, meta: Meta) -> str:
    """The card; nothing in it depends on the clock or on where the run lay."""
    parts = [f"---\n{_data(source).to_yaml()}\n---", "# A retriever and a generator by rag2"]
    parts += [_what(source), _results(source), _answers(source)]
    parts += [_made(source, meta), _load(encoder, staging), _limits(encoder, staging)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _data(source: Source) -> ModelCardData:
    """The card's metadata, with the accuracies that are known."""
    found: dict[str, Any] = {}
    if results := source.results:
        found["model_name"] = ARM
        found["eval_results"] = [
            EvalResult(
                task_type="question-answering",
                dataset_type=_word(results["task"]),
                dataset_name=_line(results["task"]),
                dataset_split="test",
                metric_type="accuracy",
                metric_name="accuracy",
                metric_value=results["arms"][ARM]["accuracy"],
            )
        ]
    tags = ["retrieval-augmented-generation", "rag2", "sentence-transformers", "text-generation"]
    return ModelCardData(library_name="rag2", pipeline_tag="text-generation", tags=tags, **found)


def _what(source: Source) -> str:
    how = (
        "They were trained together, end to end, on questions whose evidence is in the documents "
        "of `kb.sqlite` (`-log sum_k p(z_k|x) p(y|x,z_k)`, Lewis et al. 2020)."
        if source.config
        else "They come from elsewhere; rag2 put them together and built the index."
    )
    return f"""A dual-encoder retriever `p(z|x)` and a causal language model `p(y|x,z)`. {how}

| part | what it is |
|---|---|
| `generator/` | the language model, a plain Hugging Face folder |
| `retriever/` | the encoder of questions and chunks, for rag2 and sentence-transformers |
| `index/` | every live chunk of `kb.sqlite`, encoded with this retriever when it was exported |
| `kb.sqlite` | the documents and their chunks; `tokenizer/` is what counted their tokens |
| `prompt.json` | how an answer is made: prompt, reading, k, temperature |
| `manifest.json` | size and SHA-256 of every file; rag2 loads nothing that differs |"""


def _results(source: Source) -> str:
    """The table of all arms, as the comparison that was given says."""
    if not source.results:
        return "## Results\n\nNo comparison was given when this was exported."
    results = source.results
    lines = [
        f"## Results\n\n{_line(results['task'])}: {results['n']} test questions, seed "
        f"{results['seed']}, accuracy with its 95 % interval ({results['interval']}).",
        "",
        "| arm | accuracy | 95 % | k | recall@1 |",
        "|---|---|---|---|---|",
    ]
    for name, arm in results["arms"].items():
        low, high = arm["ci95"]
        shown = f"**{_code(name)}** (this one)" if name == ARM else _code(name)
        recall = arm.get("recall_at_1")
        found = "" if recall is None else f"{recall:.3f}"
        lines.append(
            f"| {shown} | {arm['accuracy']:.3f} | {low:.3f} - {high:.3f} | {arm['k']} | {found} |"
        )
    pairs = [pair for pair in results.get("paired", ()) if pair.get("a") == ARM]
    if pairs:
        lines += ["", "Differences on the same questions (McNemar's test):", ""]
    for pair in pairs:
        low, high = pair["ci95"]
        lines.append(
            f"- {_code(ARM)} - {_code(pair['b'])}: {pair['difference']:+.3f} "
            f"({low:+.3f} to {high:+.3f}), p = {pair['mcnemar_p']:.2g}"
        )
    return "\n".join(lines)


def _answers(source: Source) -> str:
    chosen = (
        "chosen on validation questions"
        if source.chosen
        else "**not chosen on validation questions**: k is what training used, or was given by hand"
    )
    settings = source.settings
    return (
        f"## How it answers\n\nk = {settings.k} chunks, temperature {settings.temperature:g} of "
        f"p(z|x), reading `{settings.reading}`: {chosen}."
    )


def _made(source: Source, meta: Meta) -> str:
    """Config, command, seed, versions and what it descends from."""
    versions = ", ".join(f"{name} {version}" for name, version in meta.versions.items())
    lines = [f"## How it was made\n\nWith {versions}."]
    if source.config:
        kept = {key: value for key, value in source.config.items() if key not in LEFT_OUT}
        kept |= {key: Path(str(kept[key])).name for key in PATHS & kept.keys() if kept[key]}
        lines.append(
            "`rag2 train joint -c config.yaml`, then `rag2 export`; config.yaml was (of paths the "
            f"last part):\n\n```yaml\n{yaml12.render(kept).rstrip()}\n```"
        )
    rows = {
        "retriever": meta.encoder,
        "generator": meta.generator,
        "content of kb.sqlite": meta.kb_hash,
        **{f"parent: {name}": seal for name, seal in meta.parents.items()},
    }
    lines.append("| SHA-256 of | |\n|---|---|\n" + _rows(rows))
    return "\n\n".join(lines)


def _load(encoder: DualEncoder, staging: Path) -> str:
    adapter = any((staging / "generator" / name).is_file() for name in hub.ADAPTERS)
    generator = "generator/base" if adapter else "generator"
    note = "  # the base; the adapter is for rag2 or PEFT" if adapter else ""
    return f"""## How to load it

```
rag2 serve PATH          rag2 ask PATH "question"
```

```python
from rag2.answering.exported import Exported
system = Exported.open("PATH")  # every byte verified
generator, retriever, generation = system.generator(), system.retriever(), system.generation()

from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("PATH/{generator}"){note}
tokenizer = AutoTokenizer.from_pretrained("PATH/{generator}")

from sentence_transformers import SentenceTransformer
encoder = SentenceTransformer("PATH/retriever")  # no code is fetched or run
questions = encoder.encode_query(["..."])
chunks = encoder.encode_document(["title\\ntext"])
scores = {encoder.scale.item():.6g} * questions @ chunks.T  # the logits of p(z|x)
```"""


def _limits(encoder: DualEncoder, staging: Path) -> str:
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in _limit_lines(encoder, staging))


def _limit_lines(encoder: DualEncoder, staging: Path) -> Iterator[str]:
    config = encoder.config
    yield "It answers from `kb.sqlite`; what is not in there it can only know from its weights."
    yield (
        f"Questions are cut after {config.max_question_tokens} tokens, chunks after "
        f"{config.max_chunk_tokens}."
    )
    if config.towers == "two":
        yield "The retriever has two towers: sentence-transformers reads it from version 5 on."
    elif config.max_question_tokens != config.max_chunk_tokens:
        longest = max(config.max_question_tokens, config.max_chunk_tokens)
        yield f"sentence-transformers knows one limit for both, {longest} tokens."
    name = json.loads((staging / "index" / "index.json").read_text("utf-8"))["backend"]["name"]
    if name in ("ivf", "hnsw"):
        yield f"The index ({name}) is approximate: the best chunks may be missed."


def _rows(rows: Mapping[str, str]) -> str:
    return "\n".join(f"| {name} | `{value}` |" for name, value in rows.items())


def _line(text: Any) -> str:
    """Text as part of a line of Markdown: no markup, no second line."""
    kept = "".join(c if c.isprintable() and c not in "|<>`[]*_\\" else " " for c in str(text))
    return " ".join(kept.split())[:200]


def _code(name: Any) -> str:
    """A name as it is written in a file."""
    kept = "".join(c for c in str(name) if c.isprintable() and c not in "|<>`")
    return f"`{kept[:80]}`"


def _word(text: Any) -> str:
    return "-".join(_line(text).lower().split()) or "questions"
