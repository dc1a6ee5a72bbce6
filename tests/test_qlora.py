"""4-bit weights under LoRA: gradients after an evaluation, what is saved, what is merged."""

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rag2.generator.learning import answer_logprob_rows
from rag2.generator.load import Generator
from rag2.generator.logprob import pair_logprobs
from rag2.registry import UserError
from rag2.tuning.full import Full
from small_models import small_tokenizer
from tunings import learn, method, scores, trained

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("seed")
PAIRS = [([5, 6, 7, 8], [3, 4]), ([9, 8], [7])]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=300, num_attention_heads=2, initializer_range=0.1, **sizes)
    Generator(LlamaForCausalLM(config), small_tokenizer()).save(folder)
    return folder


def quantised(base: Path) -> Generator:
    """It under QLoRA after a step, so that both factors of the update get gradients."""
    generator = Generator.load(base).tuned(method("qlora"))
    learn(generator.model, steps=1)
    return generator


def layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]


def gradients(model: Any) -> torch.Tensor:
    """Of all adapters, in one line."""
    model.zero_grad()
    model.train()
    answer_logprob_rows(model, PAIRS)[0].sum().backward()
    return torch.cat([p.grad.flatten() for p in trained(model).values() if p.grad is not None])


def test_every_linear_layer_but_the_head_is_in_four_bits_with_quantised_scales(base: Path):
    model = quantised(base).model
    assert len(layers(model)) == 2 * 7
    for layer in layers(model):
        assert layer.weight.dtype == torch.uint8 and layer.weight.quant_state.nested
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.numel() in (2048, 4096)
    assert model.get_output_embeddings().weight.dtype == torch.float32


def test_gradients_after_an_evaluation_are_those_before(base: Path, tmp_path: Path):
    generator = quantised(base)
    before = gradients(generator.model)
    assert before.norm() > 0.1
    pair_logprobs(generator.model, PAIRS)
    assert torch.equal(gradients(generator.model), before)
    generator.save(tmp_path)
    loaded = Generator.load(tmp_path)
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    pair_logprobs(loaded.model, PAIRS)
    assert torch.equal(gradients(loaded.model), before)


# torch may notice, and warn
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
def test_a_planted_fault_the_packing_of_the_weights_makes_those_gradients_wrong(base: Path):
    model = quantised(base).model
    if not bitsandbytes.nn.Linear4bit(2, 2, device="meta").support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16: nothing is packed")
    before = gradients(model)
    for layer in layers(model):
        layer.support_avx512bf16_for_cpu = True
    pair_logprobs(model, PAIRS)
    after = gradients(model)
    assert len(after) != len(before) or (after - before).norm() > 0.1 * before.norm()


def test_merging_adds_the_update_to_the_dequantised_weights(base: Path, tmp_path: Path):
    generator = quantised(base)
    learn(generator.model, steps=3, lr=0.01)
    before = scores(generator)
    merged = Generator(Full().apply(generator.model), generator.tokenizer)
    assert not layers(merged.model)
    assert scores(merged) == pytest.approx(before, rel=1e-6, abs=1e-5)
    merged.save(tmp_path)
    assert scores(Generator.load(tmp_path)) == scores(merged)


def test_without_the_extra_or_in_double_precision_it_says_so_in_one_line(
    base: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match="not dtype=float64"):
        Generator.load(base, "float64").tuned(method("qlora"))
    honest = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError(name)
        return honest(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install rag2\[qlora\]"):
        Generator.load(base).tuned(method("qlora"))
