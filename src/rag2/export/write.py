"""A source -> the committed export directory."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from rag2 import __version__, artifact
from rag2.answering import contents
from rag2.answering.exported import KIND, Meta
from rag2.answering.settings import Settings
from rag2.export import card, folders
from rag2.export.source import Source
from rag2.registry import UserError, nearest
from rag2.retriever.encoder import DualEncoder, EncoderConfig

Say = Callable[[str], None]


def write(
    source: Source,
    out: Path,
    *,
    adapters: folders.Adapters = "merge",
    index: str = "flat",
    encoder: EncoderConfig | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Commit `out`: generator/ retriever/ index/ kb.sqlite prompt.json README.md manifest.json.

    `encoder` says how to read a retriever that is none of rag2's; `say` hears what is being done.
    Returns the manifest's meta. Raises UserError when `out` is there or a part cannot be exported;
    then nothing is left.
    """
    if index not in contents.LOCAL:
        allowed = ", ".join(contents.LOCAL)
        raise UserError(
            f"--index {index!r}; allowed in an export: {allowed}.{nearest(index, contents.LOCAL)}"
        )
    meta: dict[str, Any] = {}
    with artifact.committing(out, kind=KIND, meta=meta) as staging:
        say("copying the knowledge base")  # first: what is missing shows before the long work
        version, content = folders.write_kb(source.kb, staging)
        say("writing the retriever")
        loaded = DualEncoder.build(encoder) if encoder else DualEncoder.load(source.retriever)
        fingerprint = folders.write_retriever(loaded.eval(), staging / "retriever")
        say("writing the generator")
        generator = folders.write_generator(source.generator, staging / "generator", adapters)

        def told(done: int, total: int) -> None:
            say(f"encoding chunks: {done} of {total}")

        # From the folder just written: what is in the index is what anybody who loads it computes.
        written = DualEncoder.load(staging / "retriever").eval()
        assert written.fingerprint() == fingerprint, "the retriever reads back as another one"
        folders.write_index(written, staging, index, source.steps, told)
        settings = Settings.model_validate(source.settings)
        folders.write_json(staging / "prompt.json", settings.model_dump(mode="json"))
        names = ("torch", "transformers")
        made = Meta(
            encoder=fingerprint,
            generator=generator,
            kb_hash=content,
            kb_version=version,
            parents=source.parents,
            versions={"rag2": __version__} | {name: metadata.version(name) for name in names},
        )
        meta |= made.model_dump(mode="json")
        text = card.text(source, written, staging, made)
        (staging / "README.md").write_text(text, encoding="utf-8")
        mode = (staging / "README.md").stat().st_mode  # safetensors are for their owner alone
        for path in staging.rglob("*.safetensors"):
            path.chmod(mode)
        contents.check(staging)  # what a reader would refuse is not committed
    return meta
