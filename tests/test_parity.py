"""Every prompt and every log-likelihood against lm-evaluation-harness itself, float by float."""

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mmlu
from rag2.evaluation.shots import Shots
from rag2.generator.bpe import train_bpe
from rag2.generator.choices import score_choices
from rag2.generator.exact import exact_logprobs
from rag2.generator.pairs import Pair, encode_pairs
from rag2.generator.prompt import Prompt
from rag2.types import Question

if not os.environ.get("CI"):  # continuous integration must not pass without having compared
    pytest.importorskip("lm_eval")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,  # sharp enough that a wrong row or split shows
}
CONFIGS = {
    "llama": lambda size: transformers.LlamaConfig(**SIZES, vocab_size=size),
    "qwen3": lambda size: transformers.Qwen3Config(**SIZES, vocab_size=size, head_dim=16),
}
# name -> format, and whether the choices are asked without context too (mutual information)
KINDS = {"letters": ("letters", False), "cloze": ("cloze", False), "mutual": ("cloze", True)}


@dataclass(frozen=True)
class Asked:
    """The requests of one question: ours, lm-evaluation-harness's, and what it answered."""

    ours: list[tuple[str, str]]
    theirs: list[tuple[str, str]]
    scores: list[float]


def compared(
    model: Any, tokenizer: Any, data: Path, tmp_path: Path, subjects: Sequence[str], count: int
) -> list[Asked]:
    """Both sides' requests on the first `count` questions of each subject."""
    splits_of = {
        subject: {name: mmlu.read(data, name, subject) for name in ("dev", "test")}
        for subject in subjects
    }
    tasks, ours = [], {}
    for subject, splits in splits_of.items():
        files = {name: tmp_path / f"{subject}_{name}.jsonl" for name in splits}
        for name, path in files.items():
            mmlu.write(path, splits[name])
        for kind, (format, mutual) in KINDS.items():
            for shots in (0, 5):
                name = f"{kind}_{shots}_{subject}"
                tasks.append(mmlu.task(name, files, format, shots, subject, mutual))
                ours[name] = requests(
                    splits["test"][:count], splits["dev"], format, shots, mutual, tokenizer
                )
    logged = evaluated(model, tokenizer, tasks, count)
    asked = []
    for name, rows in ours.items():
        samples = sorted(logged[name], key=lambda sample: sample["doc_id"])
        for row, sample in zip(rows, samples, strict=True):
            scores = [answers[0][0] for answers in sample["resps"]]
            asked.append(Asked(row, [tuple(a) for a in sample["arguments"]], scores))
    return asked


def requests(
    questions: Sequence[Question],
    pool: Sequence[Question],
    format: Any,
    shots: int,
    mutual: bool,
    tokenizer: Any,
) -> list[list[tuple[str, str]]]:
    """What this project asks the model about each question."""
    prompt = Prompt(format=format, budget=4096, description=mmlu.DESCRIPTION)
    rows = []
    headers = Shots(count=shots).headers(questions, pool, prompt)
    for question, header in zip(questions, headers, strict=True):
        built = prompt.context(question.question, [], tokenizer, question.choices, header)
        endings = prompt.continuations(question.choices)
        contexts = [built.text, ""] if mutual else [built.text]
        rows.append([(context, ending) for context in contexts for ending in endings])
    return rows


def evaluated(model: Any, tokenizer: Any, tasks: list[dict], count: int) -> dict[str, list[dict]]:
    """lm-evaluation-harness's samples by task, at batch size 1 and without its logits cache.

    With that cache one string of tokens that is split in two ways, as the empty contexts of mutual
    information make it happen, is scored on the wrong rows (0.4.13).
    """
    # Imported by name: lm_eval's decorators hide the signatures from a type checker.
    lm_eval, models, managers = map(
        importlib.import_module, ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")
    )
    lm = models.HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", logits_cache=False
    )
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=tasks,
        limit=count,
        bootstrap_iters=0,
        task_manager=managers.TaskManager(include_defaults=False),
    )
    assert results
    return results["samples"]


def exact(model: Any, tokenizer: Any, texts: list[tuple[str, str]]) -> list[float]:
    return exact_logprobs(model, encode_pairs(tokenizer, texts))


def differing(asked: Sequence[Asked], score: Callable[[list[tuple[str, str]]], list[float]]) -> int:
    """How many requests differ, as strings or in any bit of the score."""
    wrong = 0
    for one in asked:
        got = score(one.ours)
        both = zip(one.ours, one.theirs, got, one.scores, strict=True)
        wrong += sum(a != b or x != y for a, b, x, y in both)
    return wrong


def check(
    name: str, data: Path, tmp_path: Path, subjects: Sequence[str], count: int
) -> tuple[Any, Any, list[Asked]]:
    """No request of lm-evaluation-harness differs; the shared prefixes are close."""
    texts = [
        "\n".join([question.question, *question.choices])
        for subject in subjects
        for question in mmlu.read(data, "test", subject)
    ]
    tokenizer = train_bpe(texts, 4000)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](len(tokenizer)))
    asked = compared(model.eval(), tokenizer, data, tmp_path, subjects, count)
    assert differing(asked, lambda texts: exact(model, tokenizer, texts)) == 0

    contexts = [context for one in asked for context in dict.fromkeys(c for c, _ in one.theirs)]
    endings = [
        [ending for c, ending in one.theirs if c == context]
        for one in asked
        for context in dict.fromkeys(c for c, _ in one.theirs)
    ]
    shared = iter(score_choices(model, tokenizer, contexts, endings))
    for one in asked:
        expected = torch.tensor(one.scores, dtype=torch.float64).view(-1, 4)
        got = torch.tensor([next(shared) for _ in expected], dtype=torch.float64)
        # Long answers have hundreds of nats, of which theirs is an fp32 sum: two of its roundings.
        torch.testing.assert_close(got, expected, rtol=2**-22, atol=1e-4)
        first, second = expected.topk(2).values.T
        clear = first - second > 2e-4  # below that, "within 1e-4" leaves the order open
        assert torch.equal(got.argmax(-1)[clear], expected.argmax(-1)[clear])
    return model, tokenizer, asked


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_and_scores_are_those_of_lm_evaluation_harness(name, tmp_path, dice, monkeypatch):
    monkeypatch.delenv("RAG2_DATA", raising=False)
    data = mmlu.folder(tmp_path, dice, 5)
    subject = dice.choice(mmlu.SUBJECTS)
    model, tokenizer, asked = check(name, data, tmp_path, [subject], 5)
    assert sum(len(one.scores) for one in asked) == 5 * (4 + 4 + 8) * 2
    for fault, spoilt in faults(model, tokenizer).items():
        assert differing(asked, spoilt) > len(asked), fault


def faults(model: Any, tokenizer: Any) -> dict[str, Callable]:
    """Scorers, each with one of the mistakes that the comparison is there to find."""

    def softmax_in_bf16(texts):
        with torch.no_grad():
            return [float(sum(bf16(model, pair))) for pair in encode_pairs(tokenizer, texts)]

    def split_one_too_early(texts):
        pairs = encode_pairs(tokenizer, texts)
        return exact_logprobs(
            model, [([*a[:-1]], [a[-1], *b]) if len(a) > 1 else (a, b) for a, b in pairs]
        )

    return {
        "the space before the answer is lost": lambda texts: exact(
            model, tokenizer, [(context, ending.strip()) for context, ending in texts]
        ),
        "the beginning of text is lost": lambda texts: exact_logprobs(
            model, [(a[1:] or a, b) for a, b in encode_pairs(tokenizer, texts)]
        ),
        "context and answer are cut at the wrong token": split_one_too_early,
        "the softmax is rounded": softmax_in_bf16,
    }


def bf16(model: Any, pair: Pair) -> torch.Tensor:
    context, ids = pair
    logits_LV = model(torch.tensor([[*context, *ids[:-1]]])).logits[0, -len(ids) :]
    logp_TV = logits_LV.bfloat16().log_softmax(-1)
    return logp_TV.gather(-1, torch.tensor(ids)[:, None])[:, 0]


def test_a_planted_difference_of_prompts_is_counted():
    one = Asked([("Q:", " a"), ("Q:", " b")], [("Q:", " a"), ("Q: ", "b")], [-1.0, -2.0])
    assert differing([one], lambda texts: [-1.0, -2.0]) == 1
    assert differing([one], lambda texts: [-1.0000001, -2.0]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_three_thousand_requests_are_those_of_lm_evaluation_harness(name, tmp_path, dice):
    data = mmlu.folder(tmp_path, dice, 20)
    _, _, asked = check(name, data, tmp_path, mmlu.SUBJECTS, 20)
    assert sum(len(one.scores) for one in asked) == 5 * 20 * (4 + 4 + 8) * 2 > 3000
