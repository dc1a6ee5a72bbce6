"""Every tuning method on every family: what trains, what is saved, what is scored."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from rag2.generator.exact import exact_logprobs
from rag2.generator.generate import generate
from rag2.generator.learning import answer_logprob_rows
from rag2.generator.load import Generator
from rag2.generator.logprob import Request, choice_logprobs
from rag2.generator.pairs import positions
from rag2.registry import UserError
from rag2.tuning.bottleneck import Bottleneck
from rag2.tuning.full import Full
from small_models import CONFIGS, small_tokenizer
from tunings import (
    ADAPTERS,
    MERGED,
    TOKENS,
    VIRTUAL,
    formula,
    learn,
    left_alone,
    method,
    scores,
    trained,
)

pytestmark = pytest.mark.usefixtures("seed")
FAMILIES = ("llama", "mistral", "qwen3", "gpt2")
# GPT-2 has no nn.Linear for bitsandbytes to put into 4 bits
CASES = [(n, f) for n in ADAPTERS for f in FAMILIES if (n, f) != ("qlora", "gpt2")]


def cases(quick: str, names: tuple[str, ...] = ADAPTERS) -> pytest.MarkDecorator:
    """All methods on all families; all but `names` on the family `quick` are slow together."""
    rows = [
        pytest.param(
            n, f, marks=[] if f == quick and n in names else pytest.mark.slow, id=f"{n}-{f}"
        )
        for n, f in CASES
    ]
    return pytest.mark.parametrize(("name", "family"), rows)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of each family."""
    folder, tokenizer = tmp_path_factory.mktemp("bases"), small_tokenizer()
    torch.manual_seed(0)
    for family in FAMILIES:
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]())
        Generator(model.eval(), tokenizer).save(folder / family)
    return folder


def tuned(bases: Path, family: str, name: str, dtype: str = "float32", **changes: Any) -> Generator:
    return Generator.load(bases / family, dtype).tuned(method(name, **changes))


@cases("llama")
def test_a_method_trains_its_own_weights_alone_and_comes_back_to_the_bit(
    bases: Path, tmp_path: Path, name: str, family: str
):
    before = scores(Generator.load(bases / family))
    generator = tuned(bases, family, name)
    model = generator.model
    assert sum(p.numel() for p in trained(model).values()) == formula(name, family)
    frozen = left_alone(model)
    starts = {n: p.detach().clone() for n, p in trained(model).items()}
    learn(model)
    assert all(torch.equal(t, frozen[n]) for n, t in left_alone(model).items())
    assert all(not torch.equal(p, starts[n]) for n, p in trained(model).items())
    after = scores(generator)
    assert after != pytest.approx(before, abs=0.01)  # or the comparisons below would show nothing
    generator.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists()
    loaded = Generator.load(tmp_path / "adapter")
    assert scores(loaded) == after
    loaded.save(tmp_path / "again")
    for file in (tmp_path / "adapter").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    if name in MERGED:
        merged = Generator(Full().apply(loaded.model), generator.tokenizer)
        assert type(merged.model) is type(Generator.load(bases / family).model)
        assert scores(merged) == pytest.approx(after, rel=1e-6, abs=1e-5)
        merged.save(tmp_path / "merged")
        assert scores(Generator.load(tmp_path / "merged")) == scores(merged)
    else:
        with pytest.raises(UserError, match=f"tuning={name} cannot be merged"):
            Full().apply(loaded.model)


@cases("qwen3", ("lora", "prompt", "ia3"))
def test_an_adapter_on_half_precision_is_saved_and_reloaded_in_float32(
    bases: Path, tmp_path: Path, name: str, family: str
):
    generator = tuned(bases, family, name, "bfloat16")
    assert {p.dtype for p in trained(generator.model).values()} == {torch.float32}
    learn(generator.model, steps=1, lr=0.01)
    generator.save(tmp_path)
    assert scores(Generator.load(tmp_path, "bfloat16")) == scores(generator)
    assert Generator.load(tmp_path, "float32").model.dtype == torch.float32  # of another precision


def by_hand(model: Any, name: str, ids: list[int]) -> torch.Tensor:
    """The log-probabilities after each of `ids`, [L, V], by a forward of the base alone."""
    ids_1L = torch.tensor([ids])
    if name not in VIRTUAL:
        return model(input_ids=ids_1L).logits[0].log_softmax(-1)
    base, made_VE = model.get_base_model(), model.get_prompt_embedding_to_save("default")
    if name == "prefix":
        shape = (TOKENS, 2 * 2, -1, 8)  # 2 layers, keys and values, heads of 8
        made = made_VE.reshape(shape).permute(1, 2, 0, 3)[:, None]
        cache = DynamicCache(config=base.config)
        for layer in range(2):
            cache.update(made[2 * layer], made[2 * layer + 1], layer)
        logits_1LV = base(input_ids=ids_1L, past_key_values=cache).logits
    else:
        embedded_1LH = base.get_input_embeddings()(ids_1L)
        logits_1LV = base(inputs_embeds=torch.cat([made_VE[None], embedded_1LH], 1)).logits
    return logits_1LV[0, -len(ids) :].log_softmax(-1)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # of PEFT's own
@cases("mistral")
def test_all_ways_of_scoring_and_writing_agree_with_one_sequence_at_a_time(
    bases: Path, name: str, family: str
):
    dtype, tolerance = ("float32", 1e-4) if name == "qlora" else ("float64", 1e-9)
    generator = tuned(bases, family, name, dtype)
    model, tokenizer = generator.model, generator.tokenizer
    for parameter in trained(model).values():
        parameter.add_(0.1 * torch.randn_like(parameter))
    prefix = [7, 8, 9, 10, 11, 12, 13, 14, 15]
    requests = [
        Request([*prefix, 20, 21], [[3, 4], [5]]),
        Request([*prefix, 22], [[3, 4, 6]]),
        Request([30, 31], [[5, 6], [5, 7]]),
    ]
    pairs = [(r.context_ids, ids) for r in requests for ids in r.continuations]
    model.eval()
    hand = []
    for context, ids in pairs:
        logp_LV = by_hand(model, name, [*context, *ids])[len(context) - 1 : -1]
        hand.append(float(logp_LV.gather(-1, torch.tensor(ids)[:, None]).sum()))
    ways = {
        "shared": sum(choice_logprobs(model, requests), []),
        "learning": answer_logprob_rows(model, pairs)[0].sum(-1).tolist(),
    }
    for way, found in ways.items():
        assert found == pytest.approx(hand, abs=tolerance), way
    assert exact_logprobs(model, pairs) == pytest.approx(hand, abs=1e-4)  # in float32
    context = "Karin lives near the"
    ids = tokenizer(context)["input_ids"]
    stem = len(ids)
    for _ in range(5):
        ids.append(int(by_hand(model, name, ids)[-1].argmax()))
    ends = {tokenizer.eos_token_id, model.config.eos_token_id}
    made = list(itertools.takewhile(lambda token: token not in ends, ids[stem:]))
    line = tokenizer.decode(made, skip_special_tokens=True).partition("\n")[0].strip()
    assert generate(model, tokenizer, [context], 5) == [line]
    given_1L = torch.tensor([ids[:stem]])  # as the adapter for lm-evaluation-harness writes
    mask_1L, settings = torch.ones_like(given_1L), {"do_sample": False, "max_new_tokens": 5}
    written = model.generate(input_ids=given_1L, attention_mask=mask_1L, **settings)[0].tolist()
    assert written[: stem + len(made)] == ids[: stem + len(made)]


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_take_positions(bases: Path, name: str):
    plain, model = Generator.load(bases / "gpt2").model, tuned(bases, "gpt2", name).model
    assert (positions(plain), positions(model)) == (128, 128 - TOKENS)
    longest = ([3] * (128 - TOKENS), [4])
    assert answer_logprob_rows(model, [longest])[0].isfinite().all()
    with pytest.raises(UserError, match=f"a sequence of {129 - TOKENS} tokens"):
        answer_logprob_rows(model, [([3] * (129 - TOKENS), [4])])
    with pytest.raises(UserError, match="tuning.tokens=128 leaves no room"):
        tuned(bases, "gpt2", name, tokens=128)


def test_a_prefix_that_a_network_makes_has_its_formula_and_is_saved_without_it(
    bases: Path, tmp_path: Path
):
    generator = tuned(bases, "mistral", "prefix", projection=7)
    count = sum(p.numel() for p in trained(generator.model).values())
    assert count == TOKENS * 16 + (16 * 7 + 7) + (2 * 2 * 16) * (7 + 1)
    learn(generator.model)
    generator.save(tmp_path)
    assert scores(Generator.load(tmp_path)) == scores(generator)


# -- mistakes ------------------------------------------------------------------------------------


def saved(bases: Path, folder: Path, name: str = "lora") -> dict[str, Any]:
    """An adapter on the llama of `bases`; what is written of it."""
    tuned(bases, "llama", name).save(folder)
    return json.loads((folder / "rag2_adapter.json").read_text())


@pytest.mark.parametrize(
    ("name", "dtype"), [("lora", "float32"), ("qlora", "float32"), ("houlsby", "bfloat16")]
)
def test_an_adapter_is_refused_on_a_base_with_other_weights(
    bases: Path, tmp_path: Path, name: str, dtype: str
):
    base = shutil.copytree(bases / "llama", tmp_path / "base")
    Generator.load(base).tuned(method(name)).save(tmp_path / "adapter")
    Generator.load(tmp_path / "adapter", dtype)
    other = Generator.load(base)
    next(other.model.parameters()).data[5, 5] += 0.01
    other.save(base)
    with pytest.raises(UserError, match="was trained on other weights"):
        Generator.load(tmp_path / "adapter", dtype)
    shutil.rmtree(base)
    with pytest.raises(UserError, match="the base of adapter .*adapter is missing: cannot load"):
        Generator.load(tmp_path / "adapter", dtype)


def test_a_record_of_an_adapter_that_says_nonsense_is_one_line(bases: Path, tmp_path: Path):
    record = saved(bases, tmp_path)
    wrongs = [
        (record | {"format": "rag2.adapter/9"}, "unknown format"),
        (record | {"tuning": {"name": "lorra"}}, "unknown tuning 'lorra'.*Did you mean 'lora'"),
        (record | {"tuning": {"name": "lora", "rank": 0}}, "cannot load generator"),
        *((nonsense, "is damaged") for nonsense in ({}, [], {"tuning": "lora"})),
    ]
    for wrong, message in wrongs:
        (tmp_path / "rag2_adapter.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=message):
            Generator.load(tmp_path)


def test_an_adapter_from_elsewhere_is_loaded_on_the_base_it_names(bases: Path, tmp_path: Path):
    generator = tuned(bases, "llama", "lora")
    learn(generator.model)
    generator.save(tmp_path)
    (tmp_path / "rag2_adapter.json").unlink()  # as PEFT alone would leave it
    assert scores(Generator.load(tmp_path)) == scores(generator)


@pytest.mark.parametrize("first", ["lora", "prompt", "houlsby"])
@pytest.mark.parametrize("second", ["dora", "prefix", "pfeiffer"])
def test_an_adapter_on_an_adapter_is_refused(bases: Path, first: str, second: str):
    with pytest.raises(UserError, match=f"tuning={second}: the generator is an adapter already"):
        tuned(bases, "llama", first).tuned(method(second))


@pytest.mark.parametrize("name", ["lora", "dora", "rslora", "qlora"])
def test_layers_are_chosen_by_name_and_one_that_is_not_there_is_refused(bases: Path, name: str):
    model = tuned(bases, "llama", name, target_modules=["q_proj", "mlp.down_proj"]).model
    assert len(trained(model)) == 2 * 2 * (3 if name == "dora" else 2)
    for wrong, near in (("q_prj", "q_proj"), ("mlp.down_pro", "down_proj")):
        with pytest.raises(UserError, match=f"{wrong!r}; there are: q_proj, .*mean '.*{near}'"):
            tuned(bases, "llama", name, target_modules=["v_proj", wrong])
    for wrong in ("lm_head", "embed_tokens"):  # the head may be the embeddings; neither is adapted
        with pytest.raises(UserError, match=f"no linear layer of the model is called {wrong!r}"):
            tuned(bases, "llama", name, target_modules=[wrong])


def test_a_model_whose_layers_nobody_knows_is_refused_in_one_line(bases: Path):
    bloom = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)
    model = transformers.AutoModelForCausalLM.from_config(bloom)
    with pytest.raises(UserError, match="houlsby does not know .* in a bloom"):
        method("houlsby").apply(model)
    sizes: dict[str, Any] = {"hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2}
    opt = transformers.OPTConfig(vocab_size=50, num_hidden_layers=1, **sizes)
    unknown = transformers.AutoModelForCausalLM.from_config(opt)
    names = {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": ["fc2"]}
    with pytest.raises(UserError, match="ia3 does not know the layers of a opt"):
        method("ia3").apply(unknown)
    assert len(trained(method("ia3", **names).apply(unknown))) == 3
    with pytest.raises(UserError, match="a gpt2 has no nn.Linear layers to quantise"):
        tuned(bases, "gpt2", "qlora")


def test_the_prefix_does_not_go_with_gradient_checkpointing(bases: Path):
    generator = Generator.load(bases / "llama")
    generator.model.gradient_checkpointing_enable()
    with pytest.raises(UserError, match="tuning=prefix does not work with gradient checkpointing"):
        generator.tuned(method("prefix"))
    generator.tuned(method("prompt"))


def test_dora_leaves_a_layer_with_an_output_of_zeros_as_it_is(bases: Path):
    generator = Generator.load(bases / "llama")
    layer = generator.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.weight[3] = 0.0  # without a direction, its length by it is 0 / 0
    before = scores(generator)
    adapted = generator.tuned(method("dora"))
    assert not any("layers.0.self_attn.q_proj" in name for name in trained(adapted.model))
    assert any("layers.1.self_attn.q_proj" in name for name in trained(adapted.model))
    learn(adapted.model)
    after = torch.tensor(scores(adapted))
    assert after.isfinite().all() and not torch.equal(after, torch.tensor(before))


def test_dora_that_can_adapt_none_of_the_layers_asked_for_is_refused(bases: Path):
    generator = Generator.load(bases / "llama")
    with torch.no_grad():
        for layer in generator.model.model.layers:
            layer.self_attn.q_proj.weight[3] = 0.0
    with pytest.raises(UserError, match="can adapt none of these, which have zero rows"):
        generator.tuned(method("dora", target_modules=["q_proj"]))


@pytest.mark.parametrize("name", ["lora", "prompt", "ia3"])
def test_an_adapter_that_lacks_a_tensor_is_refused(bases: Path, tmp_path: Path, name: str):
    """PEFT alone would leave that layer as in the base, and say nothing."""
    generator = tuned(bases, "llama", name)
    learn(generator.model)
    generator.save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    rows = load_file(file)
    rows.pop(sorted(rows)[0])
    save_file(rows | {"another": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="of its method is missing|'prompt_embeddings'"):
        Generator.load(tmp_path)


@pytest.mark.parametrize(("name", "scale"), [("lora", 12 / 4), ("rslora", 12 / 2)])
def test_an_update_is_scaled_by_its_rank_as_its_paper_says(bases: Path, name: str, scale: float):
    base = Generator.load(bases / "llama").model.model.layers[1].self_attn.q_proj
    adapted = tuned(bases, "llama", name, rank=4, alpha=12)
    layer = adapted.model.base_model.model.model.layers[1].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
        inputs = torch.randn(3, base.in_features)
        expected = base(inputs) + scale * inputs @ a.T @ b.T
        torch.testing.assert_close(layer(inputs), expected)


@pytest.mark.parametrize(
    ("name", "behind"), [("houlsby", {"o_proj", "down_proj"}), ("pfeiffer", {"down_proj"})]
)
def test_a_bottleneck_stands_where_its_paper_puts_it_and_starts_as_nothing(
    bases: Path, name: str, behind: set[str]
):
    before = scores(Generator.load(bases / "llama"))
    adapted = tuned(bases, "llama", name)
    assert scores(adapted) == before
    found = {p: m for p, m in adapted.model.named_modules() if isinstance(m, Bottleneck)}
    assert {path.rpartition(".")[2] for path in found} == behind
    for module in found.values():
        layer: Any = module.layer
        with torch.no_grad():
            for weight in (module.down, module.up):
                weight.weight.normal_()
                weight.bias.normal_()
            inputs = torch.randn(3, layer.in_features)
            y = layer(inputs)
            inner = torch.clamp(y @ module.down.weight.T + module.down.bias, min=0)
            expected = y + inner @ module.up.weight.T + module.up.bias
            torch.testing.assert_close(module(inputs), expected)
