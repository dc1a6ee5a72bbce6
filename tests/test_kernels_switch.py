"""One switch for every operation: a call, RAG2_KERNELS, or what has been measured on a device."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rag2 import config
from rag2.retriever.encoder import EncoderConfig
from rag2_kernels import answer_logprob, masked_mean_pool, switch
from rag2_kernels.switch import takes_kernel

ON_CPU = torch.ones(1)


def on_gpu(dtype=torch.float32) -> Any:
    """What the switch looks at in a tensor on a GPU."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0")


@pytest.fixture(autouse=True)
def a_device_where_pooling_was_measured(monkeypatch):
    monkeypatch.delenv(switch.VARIABLE, raising=False)
    monkeypatch.setattr(switch, "measured", lambda: {"Measured": ["masked_mean_pool"]})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Measured")


def test_auto_takes_a_kernel_where_it_has_been_measured_and_nowhere_else(monkeypatch):
    assert takes_kernel("masked_mean_pool", "auto", on_gpu())
    assert not takes_kernel("mips_topk", "auto", on_gpu())
    assert not takes_kernel("masked_mean_pool", "auto", ON_CPU)
    assert not takes_kernel("masked_mean_pool", "auto", on_gpu(torch.float64))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another")
    assert not takes_kernel("masked_mean_pool", "auto", on_gpu())


def test_the_variable_decides_for_tensors_on_a_gpu_and_a_call_over_it(monkeypatch):
    monkeypatch.setenv(switch.VARIABLE, "triton")
    assert takes_kernel("mips_topk", "auto", on_gpu())
    assert not takes_kernel("mips_topk", "auto", ON_CPU)
    assert not takes_kernel("mips_topk", "torch", on_gpu())
    monkeypatch.setenv(switch.VARIABLE, "torch")
    assert not takes_kernel("masked_mean_pool", "auto", on_gpu())


def test_a_call_may_ask_for_the_interpreter_on_a_cpu():
    assert takes_kernel("mips_topk", "triton", ON_CPU)


def test_without_the_interpreter_tensors_that_no_kernel_takes_are_refused(monkeypatch):
    from rag2_kernels.gpu import launch

    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r"on a GPU, not on cpu"):
        takes_kernel("mips_topk", "triton", ON_CPU)


def test_an_unknown_implementation_is_refused_wherever_it_was_named(monkeypatch):
    given = torch.ones(1, 2, 3), torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"impl must be one of auto, torch, triton, not 'cuda'"):
        masked_mean_pool(*given, impl="cuda")
    monkeypatch.setenv(switch.VARIABLE, "tritn")
    with pytest.raises(ValueError, match=r"RAG2_KERNELS must be one of .*, not 'tritn'"):
        answer_logprob(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]))


def test_a_recipe_refuses_an_unknown_switch_with_one_line(monkeypatch, capsys):
    monkeypatch.setenv(switch.VARIABLE, "tritn")
    monkeypatch.setattr("sys.argv", ["recipe.py"])
    with pytest.raises(SystemExit) as ended:
        config.run(lambda cfg: pytest.fail("it went on"), EncoderConfig)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error == "error: RAG2_KERNELS must be one of auto, torch, triton, not 'tritn'\n"
