"""folder, hub id or nothing at all -> a causal LM with its tokenizer, and back to a folder."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rag2 import hub
from rag2.generator.induction import looking_back
from rag2.registry import UserError, lookup, nearest

FORMAT = "rag2.adapter/1"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(slots=True)
class Generator:
    """A causal LM `p(y|x,z)` and its tokenizer."""

    model: Any  # PreTrainedModel, or what a tuning method wrapped around one
    tokenizer: Any

    @classmethod
    def load(
        cls, path: str | Path, dtype: str = "float32", device: str | torch.device = "cpu"
    ) -> Self:
        """Load a Hugging Face folder or hub id in evaluation mode; code in it is never run.

        The folder of an adapter is loaded on the base it names, the adapter's weights in float32.
        The pad token falls back to eos. Raises UserError for a path without a model, one that lacks
        weights (an encoder has no output head), an unknown dtype, a tokenizer that does not fit and
        an adapter whose base is not there or has other weights than when it was trained.
        """
        if dtype not in DTYPES:
            allowed = ", ".join(DTYPES)
            raise UserError(
                f"unknown generator dtype {dtype!r}; allowed: {allowed}.{nearest(dtype, DTYPES)}"
            )
        name = str(path)
        local = hub.is_local(name, "generator")
        model: Any
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, local_files_only=local, trust_remote_code=False
            )
            if any(Path(name, file).is_file() for file in hub.ADAPTERS):
                model = _adapted(Path(name), dtype)
            else:
                model = _plain(name, dtype, local)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            what = "folder" if local else "hub id (and there is no such folder)"
            reason = " ".join(str(error).split())
            raise UserError(f"cannot load generator {what} {name!r}: {reason[:300]}") from error
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise UserError(f"generator {name!r}: the tokenizer has neither pad nor eos token")
            tokenizer.pad_token = tokenizer.eos_token
        rows = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise UserError(
                f"generator {name!r}: {len(tokenizer)} tokens but embeddings for {rows}"
            )
        return cls(model.to(device).eval(), tokenizer)

    def tuned(self, tuning: Any) -> Self:
        """This generator under a tuning method; an adapter remembers the base it stands on."""
        origin = None
        if tuning.name != "full":
            origin = {
                "base": self.model.name_or_path,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "fingerprint": self.fingerprint(),
            }
        model = tuning.apply(self.model)
        if origin:
            model.origin = origin
        return type(self)(model, self.tokenizer)

    def save(self, directory: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write a plain Hugging Face folder: config, safetensors, tokenizer (an adapter stays one).

        `weights` stand for the model's own where those are not whole.
        Write inside `artifact.committing` where a half-written folder must never be seen.
        """
        self.model.save_pretrained(directory, state_dict=weights)
        self.tokenizer.save_pretrained(directory)
        if origin := getattr(self.model, "origin", None):
            tuning = self.model.tuning.model_dump(mode="json")
            text = json.dumps({"format": FORMAT, "tuning": tuning, **origin}, indent=2)
            Path(directory, hub.ADAPTERS[1]).write_text(text + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """SHA-256 of every parameter and buffer with its name, and of the vocabulary."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(raw.numpy())
        for token, index in sorted(self.tokenizer.get_vocab().items()):
            digest.update(f"{index} {token}\n".encode())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        """Where the token embeddings live, and inputs go."""
        return self.model.get_input_embeddings().weight.device


def _plain(name: str, dtype: str, local: bool) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        name,
        dtype=DTYPES[dtype],
        local_files_only=local,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"generator {name!r} lacks {len(missing)} weights, such as {missing[0]!r}")
    return model


def _adapted(folder: Path, dtype: str) -> Any:
    """The adapter in `folder` on its base, which must be the one it was trained on."""
    peft, ours = (folder / file for file in hub.ADAPTERS)
    if not ours.is_file():  # from elsewhere: nobody wrote down what its base was
        path = json.loads(peft.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return lookup("tuning", "lora")().load(_base(folder, path, dtype).model, folder)
    record = json.loads(ours.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("tuning"), dict):
        raise UserError(f"{ours} is damaged: it says no method")
    if record["format"] != FORMAT:
        raise UserError(f"adapter {folder}: unknown format {record['format']!r}; known: {FORMAT}")
    base = _base(folder, record["base"], dtype)
    # Weights that were rounded differently have other bits: compare in the precision of then.
    then = base if record["dtype"] == dtype else _base(folder, record["base"], record["dtype"])
    if then.fingerprint() != record["fingerprint"]:
        raise UserError(
            f"adapter {folder} was trained on other weights or another vocabulary than those of "
            f"its base {record['base']!r} now: it would compute something else"
        )
    tuning = lookup("tuning", record["tuning"]["name"]).model_validate(record["tuning"])
    model = tuning.load(base.model, folder)
    model.origin = {key: record[key] for key in ("base", "dtype", "fingerprint")}
    return model


def _base(folder: Path, path: str, dtype: str) -> Generator:
    inside = folder / path  # as in an export, where both move together
    try:
        return Generator.load(inside if inside.is_dir() else path, dtype)
    except UserError as error:
        raise UserError(f"the base of adapter {folder} is missing: {error}") from None


def build_llama(
    tokenizer: Any,
    hidden: int,
    layers: int,
    heads: int,
    intermediate: int,
    max_positions: int,
    tie: bool = True,
) -> Generator:
    """A Llama with weights from torch's global random state and two heads that look back.

    It is in evaluation mode. Raises UserError when `hidden` does not divide into `heads` of even
    size, as rotary needs.
    """
    if hidden % (2 * heads):
        raise UserError(f"hidden={hidden} does not divide into {heads} heads of even size")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie,
        attention_bias=True,  # for the head that looks at the token before, whatever it is
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    looking_back(model)
    return Generator(model, tokenizer)
