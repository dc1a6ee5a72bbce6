"""Tokenizer, prompt, pairs of ids, loading: what comes before the first log-probability."""

import random

import pytest
import torch
import transformers

from rag2.generator.bpe import train_bpe
from rag2.generator.load import Generator, build_llama
from rag2.generator.prompt import Prompt
from rag2.registry import UserError
from small_models import WORDS, encode_pair, small_tokenizer
from texts import ODD

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


# -- tokenizer -----------------------------------------------------------------------------------


def test_the_tokenizer_represents_every_text_and_survives_a_round_trip(tokenizer, tmp_path):
    text = "Karin lives  near\n\tthe mill, 1987: \u00e9\u4e2d\U0001f600\x00"
    encoded = tokenizer.encode(text)
    assert encoded[0] == tokenizer.bos_token_id and encoded.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(encoded[1:]) == text
    assert tokenizer.unk_token is None and len(tokenizer) == 300
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(text) == encoded and again.pad_token == "<pad>"
    assert (again.cls_token, again.sep_token, again.mask_token) == ("<s>", "</s>", "<pad>")


def test_the_same_texts_give_the_same_tokenizer():
    texts = [" ".join(random.choices(WORDS, k=9)) for _ in range(30)]
    first, second = (train_bpe(iter(texts), 290).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(UserError, match="vocab_size 200 .* 259"):
        train_bpe(["text"], 200)


def test_a_number_has_the_same_tokens_at_the_start_of_a_line_as_after_a_space():
    tokenizer = train_bpe(["in 1848 and\n1848 again, 42,972 of 42,972"] * 50, 400)
    ids = {digit: tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"}
    spelled = [ids["4"], ids["2"]]
    for text in ("42", "a 42", "a\n42"):
        assert tokenizer.encode(text)[-2:] == spelled
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


# -- prompt --------------------------------------------------------------------------------------


def test_the_best_passage_stands_nearest_to_the_question(tokenizer):
    built = Prompt().context("Who?", ["best", "second"], tokenizer)
    assert built.text == "second\n\nbest\n\nQuestion: Who?\nAnswer:" and built.dropped == 0
    assert Prompt().context(" Who? ", [], tokenizer).text == "Question: Who?\nAnswer:"
    assert Prompt().continuations(["Karin"]) == [" Karin"]


def test_letters_lists_the_choices_as_mmlu_does(tokenizer):
    prompt = Prompt(format="letters")
    built = prompt.context("Who?", ["p"], tokenizer, choices=["Karin", "Ola"])
    assert built.text == "p\n\nWho?\nA. Karin\nB. Ola\nAnswer:"
    assert prompt.continuations(["Karin", "Ola"]) == [" A", " B"]
    with pytest.raises(UserError, match="needs the choices"):
        prompt.context("Who?", [], tokenizer)
    with pytest.raises(UserError, match="26 letters, not 27"):
        prompt.continuations(["x"] * 27)


def test_passages_over_budget_are_dropped_whole_worst_first_and_counted(tokenizer):
    passages = [f"{word} {'mill ' * 10}" for word in ("best", "second", "worst")]
    whole = len(tokenizer.encode(Prompt().context("Who?", passages, tokenizer).text))
    assert Prompt(budget=whole).context("Who?", passages, tokenizer).dropped == 0
    built = Prompt(budget=whole - 1).context("Who?", passages, tokenizer)
    assert built.dropped == 1
    assert built.text == f"{passages[1]}\n\n{passages[0]}\n\nQuestion: Who?\nAnswer:"


def test_a_question_that_does_not_fit_is_refused_not_cut(tokenizer):
    with pytest.raises(UserError, match="budget=10 .* alone takes"):
        Prompt(budget=10).context("mill " * 50, ["p"], tokenizer)


@pytest.mark.parametrize("which", range(3))
def test_a_budget_is_what_counting_the_tokens_would_say(tokenizers, which, dice):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers[which])
    for words in (WORDS, WORDS + ODD):
        for _ in range(20):
            question = " ".join(dice.choices(words, k=dice.randint(1, 12))) or "?"
            text = Prompt(budget=10_000).context(question, [], tokenizer).text
            count = len(tokenizer.encode(text))
            assert Prompt(budget=count).context(question, [], tokenizer).text == text
            with pytest.raises(UserError, match="alone takes"):
                Prompt(budget=count - 1).context(question, [], tokenizer)


# -- encode_pairs --------------------------------------------------------------------------------


def test_whitespace_at_the_end_of_the_context_moves_to_the_continuation(tokenizer):
    moved = encode_pair(tokenizer, "Karin lives near \n", "the mill")
    assert moved == encode_pair(tokenizer, "Karin lives near", " \nthe mill")
    assert tokenizer.decode(moved[1]) == " \nthe mill"
    assert sum(moved, []) == tokenizer.encode("Karin lives near \nthe mill")


def test_an_empty_context_is_the_beginning_of_text(tokenizer):
    bare = tokenizer.encode("mill", add_special_tokens=False)
    assert encode_pair(tokenizer, "", "mill") == ([0], bare)
    assert encode_pair(tokenizer, "", "<s>mill") == ([0], bare)


def test_a_beginning_of_text_written_in_the_context_is_not_doubled(tokenizer):
    assert encode_pair(tokenizer, "<s>Karin", " lives") == encode_pair(tokenizer, "Karin", " lives")


@pytest.mark.parametrize("context, continuation", [("Karin", ""), ("", ""), ("Ka", "rin")])
def test_a_continuation_without_a_token_of_its_own_is_refused(tokenizer, context, continuation):
    assert len(tokenizer.encode("Karin")) == 2
    with pytest.raises(UserError, match="no token of its own"):
        encode_pair(tokenizer, context, continuation)


# -- loading -------------------------------------------------------------------------------------


def test_a_generator_survives_a_round_trip_and_its_fingerprint_sees_every_weight(
    tokenizer, tmp_path
):
    generator = build_llama(tokenizer, 32, 2, 4, 48, 64)
    assert generator.model.config._attn_implementation == "sdpa"
    generator.save(tmp_path / "g")
    assert (tmp_path / "g/model.safetensors").exists()
    loaded = Generator.load(tmp_path / "g")
    assert loaded.fingerprint() == generator.fingerprint() and not loaded.model.training
    half = Generator.load(tmp_path / "g", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16 and half.fingerprint() != generator.fingerprint()
    with torch.no_grad():
        loaded.model.model.norm.weight[3] += 1e-3
    assert loaded.fingerprint() != generator.fingerprint()


def test_a_missing_pad_token_falls_back_to_eos(tokenizer, tmp_path):
    build_llama(tokenizer, 32, 1, 4, 48, 64).save(tmp_path)
    bare = transformers.AutoTokenizer.from_pretrained(tmp_path)
    bare.pad_token = bare.mask_token = None
    bare.save_pretrained(tmp_path)
    assert Generator.load(tmp_path).tokenizer.pad_token == "</s>"


def test_mistakes_in_loading_are_one_clear_line(tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in [
        ("nothing", "does not exist"),
        ("empty", "config.json"),
        ("file", "is a"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            Generator.load(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="Did you mean 'bfloat16'"):
        Generator.load(tmp_path, dtype="bfloat")
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load generator"):
        Generator.load(tmp_path / "empty")
    with pytest.raises(UserError, match="4 heads"):
        build_llama(tokenizer, 36, 1, 4, 48, 64)
