"""The dual encoder: what an embedding depends on, what trains, and what returns from disk."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
)

from rag2.registry import UserError
from rag2.retriever.embed import batches, embed_corpus
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.tuning.lora import LoRA
from rag2_kernels import info_nce

SMALL = {"hidden": 16, "layers": 2, "heads": 2, "intermediate": 32, "max_positions": 64}
LIMITS = {"max_question_tokens": 16, "max_chunk_tokens": 64}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
KINDS = ["scratch", "bert", "modernbert"]


@pytest.fixture
def tokenizer():
    words = SPECIAL + [f"w{i}" for i in range(60)]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token"], SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


@pytest.fixture
def make(rng, tokenizer, tmp_path):
    """make(kind, **settings): a tiny encoder from scratch or from a checkpoint on disk."""

    def checkpoint(kind):
        shape: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
        }
        special: dict[str, Any] = {
            f"{n}_token_id": i for i, n in enumerate(["pad", "unk", "cls", "sep"])
        }
        if kind == "bert":  # with a pooler, as hub checkpoints have
            model = BertModel(BertConfig(**shape))
        else:
            special |= {"bos_token_id": 2, "eos_token_id": 3}
            model = ModernBertModel(ModernBertConfig(**shape, **special))
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    def encoder(kind="scratch", **settings):
        if kind == "scratch":
            chosen = EncoderConfig.model_validate(SMALL | LIMITS | settings)
            return DualEncoder.build(chosen, tokenizer)
        chosen = {"model": checkpoint(kind)} | LIMITS | settings
        return DualEncoder.build(EncoderConfig.model_validate(chosen))

    return encoder


def texts(rng, count, longest=40):
    return [
        " ".join(f"w{i}" for i in rng.integers(60, size=rng.integers(0, longest)))
        for _ in range(count)
    ]


def step_on(encoder, rng, lr=0.01):
    """One contrastive step on fresh texts."""
    questions, chunks = texts(rng, 6, 12), texts(rng, 8)
    queries, passages, scale = encoder(questions, chunks)
    info_nce(queries, passages, torch.arange(6), scale).backward()
    torch.optim.SGD(encoder.parameters(), lr).step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_embedding_does_not_depend_on_its_neighbours_or_the_padding(rng, make, kind, pooling):
    encoder, corpus = make(kind, pooling=pooling).eval(), texts(rng, 24)
    together = encoder.encode_chunks(corpus)
    alone = torch.cat([encoder.encode_chunks([text]) for text in corpus])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(24))
    assert together.dtype == torch.float32


def test_mean_pooling_is_the_mean_of_the_tokens_that_are_no_padding(make):
    encoder = make(normalize=False).eval()
    ids = encoder.tokenize(["w1 w2 w3"], "chunk")
    assert len(ids[0]) == 5
    hidden = encoder.chunk_tower(input_ids=torch.tensor(ids)).last_hidden_state
    torch.testing.assert_close(encoder.encode_chunks(["w1 w2 w3"]), hidden.mean(1))


def test_the_corpus_keeps_its_order_whatever_the_batches(rng, make):
    encoder, corpus = make(), texts(rng, 50)
    expected = encoder.eval().encode_chunks(corpus).detach().numpy()
    for budget in (1, 100, 100_000):
        got = embed_corpus(encoder, corpus, budget)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
        assert got.dtype == np.float32 and got.flags.c_contiguous
    assert embed_corpus(encoder, []).shape == (0, 16)


def test_progress_is_told_after_every_batch(rng, make):
    seen = []
    embed_corpus(make(), texts(rng, 20), 128, lambda done, total: seen.append((done, total)))
    assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == (20, 20)


def test_batches_stay_within_the_token_budget_and_cover_every_text_once(rng):
    lengths = rng.integers(1, 65, size=200)
    parts = list(batches(lengths, 512))
    assert sorted(np.concatenate(parts)) == list(range(200))
    assert all(len(part) * 8 * -(-lengths[part].max() // 8) <= 512 for part in parts)


def test_embedding_a_corpus_needs_no_dropout_no_gradient_and_leaves_the_modes_alone(rng, make):
    encoder = make(towers="two", dropout=0.5).train()
    encoder.question_tower.eval()
    modes = [module.training for module in encoder.modules()]
    corpus = texts(rng, 9)
    np.testing.assert_array_equal(embed_corpus(encoder, corpus), embed_corpus(encoder, corpus))
    assert modes == [module.training for module in encoder.modules()]
    assert all(p.grad is None for p in encoder.parameters())
    assert not torch.equal(encoder.encode_chunks(corpus), encoder.encode_chunks(corpus))


def test_an_embedding_that_is_not_finite_is_refused_by_row_and_the_mode_restored(rng, make):
    encoder, corpus = make().train(), ["w1"] * 30
    corpus[17] = "w5 w6"
    with torch.no_grad():
        encoder.chunk_tower.get_input_embeddings().weight[len(SPECIAL) + 5] = torch.nan
    with pytest.raises(ValueError, match="chunk 17 is not finite"):
        embed_corpus(encoder, corpus, 64)
    assert encoder.training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("towers", ["shared", "two"])
def test_a_contrastive_step_gives_every_tensor_a_gradient(rng, make, kind, towers):
    encoder = make(kind, towers=towers, dropout=0.0)
    queries, passages, scale = encoder(texts(rng, 6, 12), texts(rng, 8))
    info_nce(queries, passages, torch.arange(6), scale).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        # A key bias adds the same to all logits of a query, which softmax cancels: its true
        # gradient is zero, and only rounding shows.
        if not name.endswith("key.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_two_towers_start_as_copies_and_part_when_only_questions_train(rng, make):
    encoder, corpus = make("bert", towers="two").eval(), texts(rng, 5, 12)
    torch.testing.assert_close(encoder.encode_questions(corpus), encoder.encode_chunks(corpus))
    before = encoder.encode_chunks(corpus).detach()
    encoder.chunk_tower.requires_grad_(False)
    step_on(encoder, rng, lr=1.0)
    assert torch.equal(encoder.encode_chunks(corpus), before)
    assert (encoder.encode_questions(corpus) - before).abs().max() > 1e-4


def test_towers_take_adapters_that_merge_back_into_the_same_embeddings(rng, make, tmp_path):
    encoder, corpus, lora = make(towers="two").double(), texts(rng, 5, 12), LoRA(rank=2)
    encoder.map_towers(lora.apply)
    step_on(encoder, rng, lr=1.0)
    step_on(encoder, rng, lr=1.0)  # B is zero before the first
    adapted = encoder.encode_chunks(corpus)
    encoder.map_towers(lora.merge)
    torch.testing.assert_close(encoder.encode_chunks(corpus), adapted, rtol=0, atol=1e-10)
    encoder.float().save(tmp_path / "e")
    assert torch.equal(
        DualEncoder.load(tmp_path / "e").encode_chunks(corpus), encoder.encode_chunks(corpus)
    )


def test_shared_towers_are_one_network_that_is_stored_once(make):
    encoder = make()
    assert encoder.question_tower is encoder.chunk_tower
    assert len(encoder.state_dict()) == len(encoder.chunk_tower.state_dict()) + 1  # the scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("towers", ["shared", "two"])
def test_a_saved_encoder_returns_bit_for_bit(rng, make, kind, towers, tmp_path):
    prefixes = {"question_prefix": "w1 ", "chunk_prefix": "w2 "}
    encoder = make(kind, towers=towers, **prefixes)
    step_on(encoder, rng)
    encoder.save(tmp_path / "e")
    again = DualEncoder.load(tmp_path / "e")
    assert again.config == encoder.config and again.fingerprint() == encoder.fingerprint()
    assert torch.equal(again.scale, encoder.scale)
    corpus = texts(rng, 7, 12)
    assert torch.equal(
        again.eval().encode_questions(corpus), encoder.eval().encode_questions(corpus)
    )
    assert torch.equal(again.encode_chunks(corpus), encoder.encode_chunks(corpus))
    suffixes = {path.suffix for path in (tmp_path / "e").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_an_encoder_in_double_precision_embeds_and_returns_in_it(make, tmp_path):
    encoder = make().double()
    embedded_BD = encoder.encode_questions(["one", "two three"])
    assert embedded_BD.dtype == torch.float64
    assert not torch.equal(embedded_BD, embedded_BD.float().double())
    encoder.save(tmp_path)
    again = DualEncoder.load(tmp_path)
    assert again.fingerprint() == encoder.fingerprint()
    assert torch.equal(again.encode_questions(["one", "two three"]), embedded_BD)


def test_a_saved_tower_is_a_plain_hugging_face_folder(make, tmp_path):
    encoder = make()
    encoder.save(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    for name, tensor in encoder.chunk_tower.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)


def test_the_fingerprint_follows_weights_settings_and_vocabulary_but_not_the_folder(rng, make):
    encoder = make("bert")
    start = encoder.fingerprint()
    assert encoder.fingerprint() == start
    moved = encoder.config.model_copy(update={"model": "elsewhere"})
    longer = encoder.config.model_copy(update={"chunk_prefix": "w3 "})
    towers = dict(encoder.towers)
    assert DualEncoder(moved, encoder.tokenizer, towers).fingerprint() == start
    assert DualEncoder(longer, encoder.tokenizer, towers).fingerprint() != start
    step_on(encoder, rng)
    assert encoder.fingerprint() != start


def test_texts_beyond_the_limit_are_cut_counted_and_announced(make, caplog):
    encoder = make()
    assert encoder.truncated == {}
    rows = encoder.tokenize(["w1 " * 14, "w1 " * 15, "w2 " * 99], "question")
    assert [len(row) for row in rows] == [16, 16, 16] and rows[2][-1] == rows[0][-1] == 3
    assert encoder.truncated["question"] == 2 and encoder.truncated["chunk"] == 0
    assert "question texts longer than 16 tokens are cut" in caplog.text


def test_prefixes_go_in_front_of_their_own_side(make):
    encoder = make(question_prefix="w1 ", chunk_prefix="w2 w3 ")
    assert encoder.tokenize(["w9"], "question") == [[2, 5, 13, 3]]
    assert encoder.tokenize(["w9"], "chunk") == [[2, 6, 7, 13, 3]]


def test_the_scale_is_learnt_capped_at_100_and_can_come_back(make):
    encoder = make(temperature=0.05)
    assert encoder.scale.item() == pytest.approx(20)
    with torch.no_grad():
        encoder.log_scale.fill_(9.0)
    assert encoder.scale.item() <= 100 and encoder.scale.item() == pytest.approx(100)
    encoder.scale.backward()
    assert encoder.log_scale.grad.item() > 0
    assert not make(learn_temperature=False).log_scale.requires_grad


def test_mistakes_get_one_clear_line(make, tmp_path):
    cases = [
        (lambda: DualEncoder.build(EncoderConfig()), "needs a tokenizer"),
        (lambda: make(max_positions=32), "max_chunk_tokens=64 is more than the 32 positions"),
        (lambda: make(heads=3), "hidden=16 is not a multiple of heads=3"),
        (lambda: DualEncoder.build(EncoderConfig(model=str(tmp_path / "no"))), "cannot load"),
        (lambda: DualEncoder.load(tmp_path / "no"), "holds no rag2 encoder"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_an_encoder_folder_whose_parts_do_not_fit_is_refused(make, tmp_path):
    make().save(tmp_path)
    record = json.loads((tmp_path / "rag2_encoder.json").read_text())
    (tmp_path / "rag2_encoder.json").write_text(json.dumps(record | {"dimension": 32}))
    with pytest.raises(UserError, match="but rag2_encoder.json says"):
        DualEncoder.load(tmp_path)
