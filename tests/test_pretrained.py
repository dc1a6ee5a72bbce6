"""Pretrained families: a checkpoint on disk, the shipped hub configs, training, and back from disk.

The checkpoints are tiny and random, their tokenizers trained here; in layout and special tokens
they are like those of Llama 3, Mistral 7B v0.3, Qwen3, BERT (bge, e5) and ModernBERT.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

from rag2 import artifact, config
from rag2.generator.learning import answer_logprob_rows
from rag2.generator.load import Generator
from rag2.generator.pairs import encode_pairs
from rag2.generator.prompt import Prompt
from rag2.kb.build import build
from rag2.kb.chunk import TokenChunker
from rag2.kb.store import KnowledgeBase
from rag2.rag import RagModel
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder
from rag2.training.run import Run

ROOT = Path(__file__).resolve().parents[1]
TOWNS = ["Arlow", "Benmoor", "Corvale", "Dunwick", "Eastrey", "Farholt", "Gildern", "Hazelby"]
TOWNS += ["Iverness", "Jarrow", "Kelmere", "Lorring", "Milhaven", "Norwell", "Ostrava", "Penrith"]
TOWNS += ["Quarley", "Redmoss", "Stanwick", "Thornby"]
TRADES = ["salt", "wool", "glass", "barley"]
TEXTS = [
    f"{town} lies on a river and has a market. Merchants there trade {TRADES[i % 4]} all year."
    for i, town in enumerate(TOWNS)
]
QUESTIONS = [f"What do the merchants of {town} sell?" for town in TOWNS]
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED: dict[str, Any] = SHAPE | {"num_key_value_heads": 2}
LIMITS = ("prompt.budget=200", "candidates={dense: 2, bm25: 1, random: 1}", "batch_size=4")


pytestmark = pytest.mark.usefixtures("seed")


# ----- tokenizers, as the families have them ----------------------------------------------------


def byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS + QUESTIONS, trainer)
    return tokenizer


def metaspace(special: list[str]) -> Tokenizer:
    """SentencePiece's way: a space is part of the word after it, unknown text falls to bytes."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    fallback = [AddedToken(f"<0x{byte:02X}>", normalized=False) for byte in range(256)]
    trainer = BpeTrainer(vocab_size=600, special_tokens=[*special, *fallback])
    tokenizer.train_from_iterator(TEXTS + QUESTIONS, trainer)
    return tokenizer


def word_piece(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = WordPieceTrainer(vocab_size=300, special_tokens=special)
    tokenizer.train_from_iterator(TEXTS + QUESTIONS, trainer)
    return tokenizer


def wrapped(tokenizer: Tokenizer, template: str, **names: str) -> Any:
    """A fast tokenizer that frames a text as `template` says."""
    ends = [(word, tokenizer.token_to_id(word)) for word in template.split() if word != "$A"]
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


FRAME = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FRAMED = {f"{name[1:-1].lower()}_token": name for name in FRAME}
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
TOKENIZERS = {
    "llama": lambda: wrapped(
        byte_level([BEGIN, END]), f"{BEGIN} $A", bos_token=BEGIN, eos_token=END
    ),
    "mistral": lambda: wrapped(
        metaspace(["<unk>", "<s>", "</s>"]),
        "<s> $A",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    ),
    "qwen3": lambda: wrapped(  # no token begins a text
        byte_level(["<|endoftext|>"]), "$A", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ),
    "bert": lambda: wrapped(word_piece(FRAME), "[CLS] $A [SEP]", **FRAMED),
    "modernbert": lambda: wrapped(byte_level(FRAME), "[CLS] $A [SEP]", **FRAMED),
}


def network(kind: str, rows: int) -> transformers.PreTrainedModel:
    """A random network of the family with embeddings for `rows` tokens."""
    match kind:
        case "llama":
            shape = transformers.LlamaConfig(
                vocab_size=rows, tie_word_embeddings=True, pad_token_id=None, **GROUPED
            )
            return transformers.LlamaForCausalLM(shape)
        case "mistral":
            shape = transformers.MistralConfig(vocab_size=rows, sliding_window=None, **GROUPED)
            return transformers.MistralForCausalLM(shape)
        case "qwen3":
            shape = transformers.Qwen3Config(
                vocab_size=rows + 24, head_dim=16, tie_word_embeddings=True, **GROUPED
            )
            return transformers.Qwen3ForCausalLM(shape)
        case "bert":  # with a pooler, as on the hub
            return transformers.BertModel(transformers.BertConfig(vocab_size=rows, **SHAPE))
        case _:
            special: dict[str, Any] = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
            special |= {"bos_token_id": 2, "eos_token_id": 3}
            shape = transformers.ModernBertConfig(vocab_size=rows, **SHAPE, **special)
            return transformers.ModernBertModel(shape)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per family, and beside them the user's knowledge base and questions."""
    root = tmp_path_factory.mktemp("hub")
    for kind, make in TOKENIZERS.items():
        tokenizer = make()
        tokenizer.save_pretrained(root / kind)
        network(kind, len(tokenizer)).save_pretrained(root / kind)
    documents = [
        {"id": town, "title": town, "text": text} for town, text in zip(TOWNS, TEXTS, strict=True)
    ]
    questions = [
        {
            "id": f"q{i}",
            "question": question,
            "choices": TRADES,
            "answer": i % 4,
            "split": "train" if i < 12 else "test",
            "evidence": [TOWNS[i]],
        }
        for i, question in enumerate(QUESTIONS)
    ]
    for name, rows in (("documents", documents), ("questions", questions)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chunker = TokenChunker(tokens=64, overlap=8, tokenizer=str(root / "bert"))
    build(root / "kb.sqlite", [root / "documents.jsonl"], chunker)
    return root


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the last run committed to final/, as it was in memory."""
    kept: dict[str, Any] = {}
    commit = Run.finish

    def finish(self: Run, **parts: Any) -> None:
        kept.update(parts)
        commit(self, **parts)

    monkeypatch.setattr(Run, "finish", finish)
    return kept


def recipe(path: str) -> ModuleType:
    """A recipe as a module, which nothing but a test may import."""
    spec = importlib.util.spec_from_file_location(f"recipe_{Path(path).stem}", ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(path: str, cls: str, yaml: str, hub: Path, *overrides: str) -> tuple[ModuleType, Any]:
    """A recipe and its configuration from a shipped YAML, with the user's files."""
    module = recipe(path)
    given = [f"kb={hub}/kb.sqlite", f"questions={hub}/questions.jsonl", "device=cpu"]
    return module, config.load(getattr(module, cls), f"configs/hub/{yaml}", [*given, *overrides])


def joint(yaml: str, hub: Path, out: Path, generator: str, encoder: str, *overrides: str) -> float:
    """The loss after two steps of joint training."""
    settings = [f"generator={hub}/{generator}", f"encoder.model={hub}/{encoder}", f"out={out}"]
    settings += ["steps=2", "schedule.warmup=0", "lr_generator=1e-3", "checkpoint_every=1"]
    words = [*settings, *LIMITS, *overrides]
    module, cfg = load("train/joint.py", "JointConfig", yaml, hub, *words)
    return module.main(cfg)["loss"]


def finetune(hub: Path, out: Path, *overrides: str) -> float:
    """The loss after two steps of fine-tuning."""
    words = [f"out={out}", "steps=2", "schedule.warmup=0", "lr=1e-3", "batch_size=2", *overrides]
    yaml = "finetune_qwen3_lora.yaml"
    module, cfg = load("train/finetune.py", "FinetuneConfig", yaml, hub, *words)
    return module.main(cfg)["loss"]


def figures(retriever: DualEncoder, generator: Generator, hub: Path) -> tuple[torch.Tensor, ...]:
    """Scores_BK, crowding_B and logp_BKT of three questions against four chunks each."""
    with KnowledgeBase(hub / "kb.sqlite") as kb:
        chunks = kb.chunks()
    rag = RagModel(retriever, generator, Prompt()).eval()
    with torch.no_grad():
        return rag(QUESTIONS[:3], ["salt", "wool", "glass"], [chunks[:4], chunks[2:6], chunks[3:7]])


def answers(generator: Generator) -> torch.Tensor:
    """Log-probabilities of two answers, closed book."""
    texts = [(f"Question: {q}\nAnswer:", " salt") for q in QUESTIONS]
    pairs = encode_pairs(generator.tokenizer, texts)
    with torch.no_grad():
        return answer_logprob_rows(generator.model, pairs)[0]


# ----- the paths that ought to work -------------------------------------------------------------


@pytest.mark.parametrize(
    ("yaml", "generator", "encoder", "overrides"),
    [
        ("joint_llama_e5.yaml", "llama", "modernbert", ()),
        ("joint_qwen3_bge.yaml", "qwen3", "bert", ()),
        ("joint_mistral_lora.yaml", "mistral", "bert", ("tuning=full", "dtype=float32")),
    ],
)
def test_a_family_trains_jointly_by_its_hub_config_and_scores_the_same_after_a_reload(
    hub, tmp_path, finished, yaml, generator, encoder, overrides
):
    out = tmp_path / "run"
    joint(yaml, hub, out, generator, encoder, *overrides)
    artifact.verify(out / "final", kind="system")
    parts = out / "final"
    retriever, reader = DualEncoder.load(parts / "retriever"), Generator.load(parts / "generator")
    before = figures(finished["retriever"], finished["generator"], hub)
    for mine, theirs in zip(before, figures(retriever, reader, hub), strict=True):
        assert torch.equal(mine, theirs)
    assert retriever.config == finished["retriever"].config and retriever.config.question_prefix
    assert retriever.fingerprint() == finished["retriever"].fingerprint()
    # both halves moved, or the comparison would show nothing
    untrained = DualEncoder.build(retriever.config), Generator.load(hub / generator)
    assert untrained[0].fingerprint() != retriever.fingerprint()
    assert untrained[1].fingerprint() != reader.fingerprint()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_joint_run_with_lora_commits_the_adapter_alone_and_reloads_it_on_its_base(
    hub, tmp_path, finished, dtype
):
    out = tmp_path / "run"
    joint("joint_mistral_lora.yaml", hub, out, "mistral", "bert", f"dtype={dtype}")
    folder = out / "final/generator"
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(hub / "mistral") and adapter["r"] == 16
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    memory = finished["generator"]
    trained = [p for p in memory.model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    loaded = Generator.load(folder, dtype=dtype)
    assert torch.equal(answers(loaded), answers(memory))
    assert not torch.equal(answers(Generator.load(hub / "mistral", dtype=dtype)), answers(loaded))


def test_training_goes_on_from_an_adapter_only_where_its_work_is_kept(hub, tmp_path, finished):
    finetune(hub, tmp_path / "first", f"generator={hub}/qwen3", "dtype=float32")
    first = f"generator={tmp_path}/first/final/generator"
    before = answers(finished["generator"])
    finetune(hub, tmp_path / "full", first, "tuning=full", "dtype=float32", "steps=0")
    loaded = Generator.load(tmp_path / "full/final/generator")
    torch.testing.assert_close(answers(loaded), before, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="an adapter already"):
        finetune(hub, tmp_path / "second", first, "dtype=float32")
    shutil.move(hub / "qwen3", hub / "moved")
    try:
        with pytest.raises(UserError, match="qwen3': the folder does not exist"):
            finetune(hub, tmp_path / "third", first, "tuning=full")
    finally:
        shutil.move(hub / "moved", hub / "qwen3")


@pytest.mark.parametrize("generator", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("objective", ["unsupervised", "supervised"])
def test_a_family_is_fine_tuned_with_lora_and_reloads_as_it_was(
    hub, tmp_path, finished, generator, objective
):
    words = (f"generator={hub}/{generator}", f"objective={objective}", "dtype=float32")
    finetune(hub, tmp_path / "run", *words)
    loaded = Generator.load(tmp_path / "run/final/generator")
    assert torch.equal(answers(loaded), answers(finished["generator"]))
    assert not torch.equal(answers(Generator.load(hub / generator)), answers(loaded))


def test_gradient_checkpointing_changes_nothing_but_the_memory(hub, tmp_path, finished):
    results = []
    for on in ("true", "false"):
        words = (f"gradient_checkpointing={on}", "encoder.dropout=0")
        loss = joint("joint_llama_e5.yaml", hub, tmp_path / on, "llama", "bert", *words)
        memory = finished["generator"]
        assert memory.model.is_gradient_checkpointing == (on == "true")
        results.append((loss, memory.fingerprint()))
    assert results[0] == results[1]


def test_a_hub_encoder_is_measured_without_training_and_a_trained_one_goes_before_it(hub, tmp_path):
    words = [f"encoder.model={hub}/bert", "ks=[1, 5]", f"out={tmp_path}/recall"]
    module, cfg = load("eval/recall.py", "RecallConfig", "recall_bge.yaml", hub, *words)
    direct = module.main(cfg)["dense"]
    DualEncoder.build(cfg.encoder).save(tmp_path / "saved")
    elsewhere = {"out": f"{tmp_path}/both"}
    both = cfg.model_copy(update={"retriever": str(tmp_path / "saved"), **elsewhere})
    assert module.main(both)["dense"] == direct
    with pytest.raises(UserError, match="recall' holds what was made with retriever=None"):
        module.main(both.model_copy(update={"out": cfg.out}))
    with pytest.raises(UserError, match="holds no rag2 encoder"):
        wrong = {"retriever": str(hub / "bert"), "out": f"{tmp_path}/wrong"}
        module.main(cfg.model_copy(update=wrong))


# ----- mistakes ---------------------------------------------------------------------------------


def broken(hub: Path, tmp_path: Path, kind: str) -> Path:
    """A checkpoint whose weights end too early, as after a download that was cut off."""
    shutil.copytree(hub / kind, tmp_path / f"broken-{kind}")
    weights = tmp_path / f"broken-{kind}/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return weights.parent


def test_a_checkpoint_that_is_missing_or_no_model_is_one_line_and_leaves_nothing(
    hub, tmp_path, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    out = tmp_path / "run"
    cases = {
        f"{tmp_path}/none": "does not exist",
        f"{tmp_path}/empty": "config.json",
        f"{tmp_path}/notes.txt": "is a file",
        "nobody/no-such-model": "cannot load",
    }
    wrong = [(f"{key}={p}", m) for key in ("generator", "encoder.model") for p, m in cases.items()]
    wrong += [
        (f"generator={broken(hub, tmp_path, 'llama')}", "cannot load generator"),
        (f"encoder.model={broken(hub, tmp_path, 'bert')}", "cannot load encoder"),
        (f"generator={hub}/bert", "lacks"),  # an encoder has no output head
        ("encoder=null", "retriever is not given"),
        ("encoder.model=null", "encoder.model is null"),
        ("retriever=" + str(hub / "bert"), "holds no rag2 encoder"),
        ("dtype=bfloat", "Did you mean 'bfloat16'"),
        ("dtype=bfloat16", "bfloat16 weights cannot be trained"),
        ("device=cuda:99", "device=cuda:99"),
        ("device=gpu", "unknown device 'gpu'"),
    ]
    for override, message in wrong:
        with pytest.raises(UserError, match=message) as error:
            joint("joint_llama_e5.yaml", hub, out, "llama", "bert", override)
        assert "\n" not in str(error.value), override
        assert not out.exists(), override
