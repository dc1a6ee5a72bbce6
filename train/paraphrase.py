"""A knowledge base + any causal LM -> rewordings of its documents, for finetune's paraphrases=.

rag2 train paraphrase kb=kb.sqlite generator=Qwen/Qwen3-0.6B count=10 out=runs/paraphrases
rag2 train paraphrase kb=kb.sqlite generator=runs/base/final/generator temperature=1 device=cuda
rag2 train finetune kb=kb.sqlite generator=MODEL paraphrases=runs/paraphrases/paraphrases.jsonl

What is drawn is kept in drafts.jsonl: the same command goes on where it was cut off, and a larger
count or another filter draws only what is missing.
"""

import json
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from rich.console import Console

from rag2 import artifact, config, pipeline
from rag2.generator.load import Generator
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.training import distributed
from rag2.training.log import progress
from rag2.training.paraphrase import PROMPT, Drafts, accepted, alone, draw, plan
from rag2.training.rewording import Filter


class ParaphraseConfig(pipeline.Inputs):
    """Rewordings of documents by a causal LM."""

    out: str = "runs/paraphrases"
    seed: int = Field(default=0, ge=0, lt=2**63)
    kb: str | None = None
    """knowledge base file"""
    generator: str | None = None
    """any causal LM: a folder or a name on the hub"""
    device: str = "cpu"
    """cpu, cuda or cuda:N"""
    dtype: str = "float32"
    """of the generator"""
    count: PositiveInt = 4
    """rewordings to draw of each document"""
    temperature: PositiveFloat = 0.8
    prompt: str = PROMPT
    """what the model continues; {title} and {text} stand for the document's"""
    filter: Filter = Filter()
    batch_size: PositiveInt = 16
    """rewordings that are drawn, and then saved, at once"""

    @field_validator("prompt")
    @classmethod
    def _has_text(cls, prompt: str) -> str:
        if "{text}" not in prompt:
            raise ValueError("the prompt must hold {text}, where the document goes")
        return prompt


def main(cfg: ParaphraseConfig) -> dict[str, int]:
    """Write paraphrases.jsonl; returns how many rewordings were accepted and rejected."""
    cfg = pipeline.resolve(cfg)
    assert cfg.kb and cfg.generator
    with KnowledgeBase(Path(cfg.kb)) as kb:
        documents = list(kb.documents())
    if not documents:
        raise UserError(f"{cfg.kb}: the knowledge base is empty")
    generator = Generator.load(cfg.generator, cfg.dtype, distributed.device(cfg.device))
    fingerprint = generator.fingerprint()
    drafts = plan(documents, cfg.count, cfg.prompt, cfg.temperature, cfg.seed, fingerprint)
    out = Path(cfg.out)
    with alone(out):
        artifact.replace(out / "config.yaml", config.dump(cfg))
        done = Drafts(out / "drafts.jsonl")
        with progress("paraphrase", len(drafts)) as advance:
            draw(generator, drafts, done, cfg.temperature, cfg.batch_size, advance)
        rows, rejected = accepted(drafts, done, cfg.filter)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if lines:
            artifact.replace(out / "paraphrases.jsonl", "".join(lines))
        else:  # nor leave those of another filter
            (out / "paraphrases.jsonl").unlink(missing_ok=True)
        figures = {"accepted": len(rows), "rejected": rejected.total()}
        text = json.dumps(figures | {"reasons": dict(rejected)}, indent=2) + "\n"
        artifact.replace(out / "paraphrase.json", text)
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
    told = f"{len(rows)} accepted + {rejected.total()} rejected = {len(drafts)}"
    told += f" ({reasons})" * bool(reasons)
    if not rows:
        raise UserError(f"{told}: no rewording is good; try another generator, prompt or filter")
    Console().print(told, markup=False, highlight=False, soft_wrap=True)
    return figures


if __name__ == "__main__":
    config.run(main, ParaphraseConfig)
