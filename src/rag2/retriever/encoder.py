"""Questions and chunks -> embeddings whose inner product, times `scale`, is the score s(x, z).

Shapes: B questions, N chunks, L tokens, H hidden, D embedding (D = H: nothing projects).
"""

import copy
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from einops import rearrange
from pydantic import Field, StrictBool, StrictInt, ValidationError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rag2.config import Config
from rag2.registry import UserError
from rag2.retriever.network import load_tokenizer, load_tower, scratch
from rag2_kernels import masked_mean_pool

Side = Literal["question", "chunk"]
FORMAT = "rag2.encoder/1"
FILE = "rag2_encoder.json"
MAX_SCALE = 100.0
DTYPES = {"float32": torch.float32, "float64": torch.float64}
PIECE = 48  # chunks of one forward in training: enough to fill a core, or a GPU at 256 tokens each
SHAPE = {"hidden", "layers", "heads", "intermediate", "max_positions"}
PROBE = "The 2nd Cafe-goer's naive question: ÉCLAIR, 1,024 kg?"
TOKENIZED = 1024  # texts tokenized at once: the tokenizer's own records of them are large
logger = logging.getLogger(__name__)


class EncoderConfig(Config):
    """Which network embeds, how its token states become one vector, and how texts are prepared.

    Prefixes of known families: e5 `"query: "` and `"passage: "`; bge (English) `"Represent this
    sentence for searching relevant passages: "` for questions only, with `pooling: cls`.
    """

    model: str | None = None
    """Folder or hub id of a Hugging Face encoder; null: a small BERT with random weights."""
    towers: Literal["shared", "two"] = "shared"
    """One network for questions and chunks, or two that start as copies of each other."""
    pooling: Literal["mean", "cls"] = "mean"
    normalize: StrictBool = True
    """Embeddings of length 1, so that scores are cosines."""
    temperature: float = Field(default=0.05, ge=1 / MAX_SCALE, allow_inf_nan=False)
    """Of p(z|x) = softmax(inner product / temperature), at the start."""
    learn_temperature: StrictBool = True
    question_prefix: str = ""
    chunk_prefix: str = ""
    max_question_tokens: StrictInt = Field(default=64, ge=4)
    max_chunk_tokens: StrictInt = Field(default=256, ge=4)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """null: the checkpoint's own, and 0 for random weights."""
    hidden: StrictInt = Field(default=128, ge=1)
    """This and the next four: shape of the network when `model` is null."""
    layers: StrictInt = Field(default=2, ge=1)
    heads: StrictInt = Field(default=2, ge=1)
    intermediate: StrictInt = Field(default=512, ge=1)
    max_positions: StrictInt = Field(default=512, ge=4)


class DualEncoder(nn.Module):
    """Two views of one embedding space: `encode_questions` and `encode_chunks`.

    Batches are padded to their longest text, rounded up to a multiple of 8 (few distinct shapes,
    full tensor cores); padding is masked, so an embedding does not depend on its batch.
    `truncated` counts the texts of each side that were cut at their limit.
    """

    def __init__(
        self,
        config: EncoderConfig,
        tokenizer: PreTrainedTokenizerBase,
        towers: dict[str, PreTrainedModel],
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.towers = nn.ModuleDict(towers)
        network = next(iter(towers.values())).config
        positions = getattr(network, "max_position_embeddings", 1 << 30)
        self.dimension: int = network.hidden_size
        """D, the length of an embedding."""
        self.max_tokens: int = min(positions, tokenizer.model_max_length)
        """The longest input the networks take, in tokens."""
        # One element, not zero dimensions: FSDP2 cannot shard a scalar parameter.
        start = torch.tensor([-math.log(config.temperature)])
        self.log_scale = nn.Parameter(start, requires_grad=config.learn_temperature)
        self.truncated: Counter[str] = Counter()
        if not isinstance(tokenizer.pad_token_id, int):
            raise UserError(f"the tokenizer of encoder {config.model!r} has no padding token")
        self._pad_id = tokenizer.pad_token_id
        for key in ("max_question_tokens", "max_chunk_tokens"):
            if getattr(config, key) > self.max_tokens:
                raise UserError(
                    f"{key}={getattr(config, key)} is more than the {self.max_tokens} positions "
                    f"of encoder {config.model or 'from scratch'!r}"
                )

    @classmethod
    def build(cls, config: EncoderConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Self:
        """A new encoder: the checkpoint that `config.model` names, or random weights.

        Random weights need a `tokenizer`. Raises UserError when the checkpoint cannot be read.
        """
        if config.model is None:
            if tokenizer is None:
                raise UserError("encoder.model is null: an encoder from scratch needs a tokenizer")
            tower = scratch(
                tokenizer,
                **config.model_dump(include=SHAPE),
                dropout=config.dropout or 0.0,
            )
        else:
            tower = load_tower(config.model, config.dropout)
            tokenizer = tokenizer or load_tokenizer(config.model)
        if config.towers == "shared":
            return cls(config, tokenizer, {"shared": tower})
        # Copies, also of random weights: equal towers score word overlap from the first step on.
        return cls(config, tokenizer, {"question": tower, "chunk": copy.deepcopy(tower)})

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """The encoder that `save` wrote, on the CPU in float32, or float64 if it was saved so.

        Raises UserError when the folder is incomplete or its parts do not fit together.
        """
        root = Path(directory)
        try:
            saved = json.loads((root / FILE).read_text(encoding="utf-8"))
            config = EncoderConfig.model_validate(saved["config"])
            recorded, log_scale = (saved["format"], saved["dimension"]), float(saved["log_scale"])
            dtype = DTYPES[saved.get("dtype", "float32")]
        except (OSError, KeyError, TypeError, ValueError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{root} holds no rag2 encoder ({FILE}: {reason})") from None
        folders = _folders(root, config.towers)
        towers = {
            name: load_tower(str(path), config.dropout, dtype) for name, path in folders.items()
        }
        for name, tower in towers.items():
            found = (FORMAT, tower.config.hidden_size)
            if recorded != found:
                raise UserError(f"{folders[name]} is {found}, but {FILE} says {recorded}")
        tokenizer = load_tokenizer(str(next(iter(folders.values()))))
        encoder = cls(config, tokenizer, towers).to(dtype)
        with torch.no_grad():
            encoder.log_scale.fill_(log_scale)
        return encoder

    def save(self, directory: str | Path) -> None:
        """Write plain Hugging Face folders (safetensors) plus rag2_encoder.json.

        A shared tower lies in `directory` itself, two towers in `question/` and `chunk/`.
        Adapters are merged into what is written.
        """
        root = Path(directory)
        towers = self.merged().towers
        for name, folder in _folders(root, self.config.towers).items():
            tower: Any = towers[name]
            tower.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        record = {
            "format": FORMAT,
            "dimension": self.dimension,
            "log_scale": self.log_scale.item(),  # a float's repr gives back every bit
            "dtype": "float64" if self.log_scale.dtype == torch.float64 else "float32",
            "config": self.config.model_dump(mode="json"),
        }
        (root / FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def map_towers(self, change: Callable[[nn.Module], nn.Module]) -> None:
        """Replace every network by `change(network)`, as in `map_towers(LoRA(rank=8).apply)`."""
        for name, tower in self.towers.items():
            self.towers[name] = change(tower)

    def merged(self) -> "DualEncoder":
        """The same embeddings from plain networks: itself, or a copy with the adapters merged."""
        if all(isinstance(tower, PreTrainedModel) for tower in self.towers.values()):
            return self
        plain = copy.deepcopy(self)
        plain.map_towers(lambda tower: getattr(tower, "tuning").merge(tower))  # noqa: B009
        return plain

    @property
    def question_tower(self) -> nn.Module:
        """The network that embeds questions."""
        return self.towers["shared" if self.config.towers == "shared" else "question"]

    @property
    def chunk_tower(self) -> nn.Module:
        """The network that embeds chunks; the question tower itself when shared."""
        return self.towers["shared" if self.config.towers == "shared" else "chunk"]

    @property
    def scale(self) -> Tensor:
        """1 / temperature, a scalar of at most 100 (as in CLIP: beyond, training is unstable).

        The cap passes the gradient through, so that a scale at the limit can come back.
        """
        limit = math.log(MAX_SCALE) - 1e-6  # so that rounding in exp stays below
        excess = (self.log_scale - limit).clamp(min=0).detach()
        return (self.log_scale - excess).exp()[0]

    def forward(
        self, questions: Sequence[str], chunks: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(queries_BD, chunks_ND, scale): one call, because DDP sees only calls of `forward`."""
        return self.encode_questions(questions), self.encode_chunks(chunks), self.scale

    def encode_questions(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B, D] of questions, as `embed` makes them, with gradient."""
        return self.embed(self.tokenize(texts, "question"), "question")

    def encode_chunks(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [N, D] of chunk passages, as `embed` makes them, with gradient.

        Chunks of similar length share a forward of `PIECE` rows, which saves the padding that one
        long chunk would bring to all.
        """
        rows = self.tokenize(texts, "chunk")
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        pieces = [order[start : start + PIECE] for start in range(0, len(order), PIECE)] or [[]]
        embedded = [self.embed([rows[row] for row in piece], "chunk") for piece in pieces]
        back_N = torch.tensor(order, dtype=torch.long, device=self.log_scale.device).argsort()
        return torch.cat(embedded).index_select(0, back_N)

    def tokenize(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        """Token ids of each text behind the prefix of its side, cut (and counted) at its limit."""
        if not texts:
            return []
        question = side == "question"
        prefix = self.config.question_prefix if question else self.config.chunk_prefix
        limit = self.config.max_question_tokens if question else self.config.max_chunk_tokens
        rows = []
        for start in range(0, len(texts), TOKENIZED):
            prepared = [prefix + text for text in texts[start : start + TOKENIZED]]
            encoded = self.tokenizer(prepared, truncation=True, max_length=limit)
            cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings or [])
            if cut and not self.truncated[side]:
                logger.warning("%s texts longer than %d tokens are cut", side, limit)
            self.truncated[side] += cut
            # A tokenizer without special tokens makes nothing of "": a padding token stands for it.
            rows += [row or [self._pad_id] for row in encoded.input_ids]
        return rows

    def embed(self, rows: Sequence[Sequence[int]], side: Side) -> Tensor:
        """Embeddings [B, D] of token id rows, pooled in float32, with gradient.

        A float64 encoder pools in float64, and that is what its embeddings are.
        """
        if not rows:
            return self.log_scale.new_zeros(0, self.dimension)
        ids_BL, mask_BL = self._pad(rows)
        tower = self.question_tower if side == "question" else self.chunk_tower
        hidden_BLH = tower(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        if self.config.pooling == "cls":
            mask_BL = torch.zeros_like(mask_BL).index_fill_(1, mask_BL.new_zeros(1), 1)
        return masked_mean_pool(hidden_BLH, mask_BL, normalize=self.config.normalize)

    def fingerprint(self) -> str:
        """SHA-256 of all that decides an embedding or a score: settings, vocabulary and weights.

        Where the weights once came from (`model`) is left out: a moved folder is the same encoder.
        Adapters count as merged, which is how the encoder is saved.
        """
        where = {"model", "dropout", "temperature", "learn_temperature"}
        network = self.chunk_tower.config
        keys = ("model_type", "num_attention_heads", "hidden_act", "hidden_activation")
        facts = {
            "config": self.config.model_dump(mode="json", exclude=where | SHAPE),
            "network": {key: getattr(network, key, None) for key in keys},
            "vocabulary": sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1]),
            "probe": self.tokenizer(PROBE)["input_ids"],
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, tensor in sorted(self.merged().state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            raw = tensor.detach().cpu().contiguous()
            digest.update(raw.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """ids_BL and mask_BL on the encoder's device."""
        device, pad = self.log_scale.device, self._pad_id
        lengths_B = torch.tensor([len(row) for row in rows])
        longest = int(lengths_B.max())
        width = min(math.ceil(longest / 8) * 8, max(longest, self.max_tokens))
        ids_BL = pad_sequence([torch.tensor(row) for row in rows], True, pad)
        ids_BL = nn.functional.pad(ids_BL, (0, width - longest), value=pad)
        mask_BL = torch.arange(width) < rearrange(lengths_B, "b -> b 1")
        return ids_BL.to(device), mask_BL.long().to(device)


def _folders(root: Path, towers: str) -> dict[str, Path]:
    """Where each tower of an encoder directory lies."""
    names = ("question", "chunk")
    return {"shared": root} if towers == "shared" else {name: root / name for name in names}
