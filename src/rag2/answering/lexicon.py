"""An export -> what is to be known of its generator where another process runs it."""

from dataclasses import dataclass
from typing import Any, Self

from transformers import AutoConfig, AutoTokenizer

from rag2.answering.exported import Exported
from rag2.answering.schemas import BASE


@dataclass(frozen=True, slots=True)
class Lexicon:
    """How the generator cuts text, how much of it fits, and what ends one."""

    tokenizer: Any
    positions: int | None
    """the longest sequence, in tokens; None: no limit is known"""
    ends: tuple[str, ...]
    """end-of-text tokens, the usual one first; none: only stops end a text"""

    @classmethod
    def of(cls, tokenizer: Any, config: Any) -> Self:
        """Of a tokenizer and a model's configuration."""
        told = config.get_text_config()
        listed = told.eos_token_id
        ids = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
        known = dict.fromkeys(id for id in ids if id is not None)
        ends = tuple(tokenizer.convert_ids_to_tokens(id) for id in known)
        return cls(tokenizer, getattr(told, "max_position_embeddings", None), ends)

    @classmethod
    def read(cls, exported: Exported) -> Self:
        """From the export's generator/, whose weights are not looked at."""
        folder = exported.directory / "generator"
        base = folder / BASE if (folder / BASE).is_dir() else folder
        with exported.reading("generator"):
            options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
            return cls.of(tokenizer, AutoConfig.from_pretrained(str(base), **options))
