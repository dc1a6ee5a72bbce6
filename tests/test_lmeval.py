"""Arms as models of lm-evaluation-harness: its own tasks, our numbers, and what was read."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from rag2.generator.choices import score_choices
from rag2.generator.load import Generator
from rag2.generator.prompt import GAP, Prompt
from rag2.kb.lexical import BM25
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.retrieval import Lexical
from rag2.types import Chunk
from small_world import roughen

if not os.environ.get("CI"):  # continuous integration must not pass without having compared
    pytest.importorskip("lm_eval")

K, TEMPERATURE = 3, 2.0
YAML = """
task: local_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
fewshot_split: test
fewshot_config: {{sampler: first_n}}
num_fewshot: 1
output_type: multiple_choice
description: "Answer.\\n\\n"
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_mutual_info}}]
"""


@pytest.fixture
def docs(chunks: list[Chunk], dice) -> list[dict[str, Any]]:
    """Questions in the words of a chunk each."""
    picked = dice.sample(chunks, 4)
    return [
        {
            "question": f"{c.text[:50].strip()}?",
            "choices": ["yes", "no, never", c.title],
            "answer": 1,
        }
        for c in picked
    ]


@pytest.fixture
def tasks(tmp_path: Path, docs) -> Path:
    """A folder with one task on a local JSON file."""
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    text = YAML.format(file=json.dumps(str(file)), cache=json.dumps(str(tmp_path / "cache")))
    (tmp_path / "tasks" / "local.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "tasks"


def evaluated(tasks: Path, model: Any, **settings: Any) -> list[dict[str, Any]]:
    """The samples of the task, in the order of the file, as lm-evaluation-harness logs them."""
    # Imported by name: lm_eval's decorators hide the signatures from a type checker.
    lm_eval, managers = map(importlib.import_module, ("lm_eval", "lm_eval.tasks"))
    importlib.import_module("rag2.lmeval")
    results = lm_eval.simple_evaluate(
        model=model,
        model_args=settings or None,
        tasks=["local_questions"],
        bootstrap_iters=0,
        task_manager=managers.TaskManager(include_path=str(tasks), include_defaults=False),
    )
    assert results and "acc,none" in results["results"]["local_questions"]
    return sorted(results["samples"]["local_questions"], key=lambda sample: sample["doc_id"])


def hflm(**settings: Any) -> Any:
    """lm-evaluation-harness's own model."""
    return importlib.import_module("lm_eval.models.huggingface").HFLM(**settings)


def answers(samples: list[dict[str, Any]]) -> list[list[tuple[float, bool]]]:
    return [[response[0] for response in sample["resps"]] for sample in samples]


def test_closed_book_says_what_lm_evaluation_harness_says_itself(home, tasks):
    ours = answers(evaluated(tasks, "rag2", generator=str(home / "generator")))
    path = str(home / "generator")
    theirs = hflm(pretrained=path, device="cpu", batch_size=1, dtype="float32", logits_cache=False)
    expected = answers(evaluated(tasks, theirs))
    assert len(ours) == 4 and all(len(row) == 6 for row in ours), "with and without context"
    for got, wanted in zip(ours, expected, strict=True):
        assert [logp for logp, _ in got] == pytest.approx([w for w, _ in wanted], abs=1e-4)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize("reading", ["marginal", "concat"])
@pytest.mark.parametrize("retriever", ["bm25", "dense"])
def test_an_arm_with_retrieval_says_what_its_parts_say(
    home, tasks, docs, tmp_path, reading, retriever
):
    kb, sidecar = home / "data" / "kb.sqlite", tmp_path / "told" / "chunks.jsonl"
    samples = evaluated(
        tasks,
        "rag2",
        generator=str(home / "generator"),
        retriever="bm25" if retriever == "bm25" else str(home / "retriever"),
        kb=str(kb),
        k=K,
        reading=reading,
        temperature=TEMPERATURE,
        sidecar=str(sidecar),
    )
    told = [json.loads(line) for line in sidecar.read_text().splitlines()]
    assert [row["doc_id"] for row in told] == [0, 1, 2, 3]
    with KnowledgeBase(kb) as base:
        by_id = {chunk.id: chunk for chunk in base.chunks()}
    if retriever == "bm25":
        scores_QK, ids_QK = BM25(list(by_id.values())).search([d["question"] for d in docs], K)
        assert [row["chunks"] for row in told] == ids_QK.tolist()
        np.testing.assert_allclose([row["scores"] for row in told], scores_QK)
    generator = Generator.load(home / "generator")
    # lm-evaluation-harness takes the first other question as its worked example.
    prompt = Prompt(description="Answer.\n\n", budget=512)
    for doc, row, got in zip(docs, told, answers(samples), strict=True):
        header = samples[row["doc_id"]]["arguments"][0][0].rpartition("Question: ")[0]
        passages = [by_id[i].passage for i in row["chunks"]]
        reads = [passages] if reading == "concat" else [[p] for p in passages]
        contexts = [
            prompt.context(doc["question"], read, generator.tokenizer, header=header).text
            for read in reads
        ]
        endings = prompt.continuations(doc["choices"])
        logp_KC = np.array(
            score_choices(generator.model, generator.tokenizer, contexts, [endings] * len(contexts))
        )
        prior_K = log_softmax(np.array(row["scores"]) / TEMPERATURE)
        expected = logp_KC[0] if reading == "concat" else logsumexp(prior_K[:, None] + logp_KC, 0)
        assert [logp for logp, _ in got[:3]] == pytest.approx(expected, abs=1e-4)
        (bare,) = score_choices(generator.model, generator.tokenizer, [""], [endings])
        assert [logp for logp, _ in got[3:]] == pytest.approx(bare, abs=1e-4), "stays without"


def test_passages_stand_before_the_question_or_in_front_of_everything():
    from rag2.lmeval import inserted

    shots = "Answer.\n\nQuestion: Who?\nAnswer: Ola\n\n"
    assert inserted(["best", "next"], f"{shots}Question: Where?\nAnswer:", " Where? ") == (
        f"{shots}next\n\nbest\n\nQuestion: Where?\nAnswer:"
    )
    assert inserted(["p"], "Question: Where?", "Where?") == f"p{GAP}Question: Where?"
    assert inserted(["p"], "<s>Where?", "Where?", "<s>") == f"<s>p{GAP}Where?"
    assert inserted(["p"], "a\n\nanother text", "Where?") == f"p{GAP}a\n\nanother text"


def instance(kind: Any, doc: dict, *arguments: Any) -> Any:
    instances = importlib.import_module("lm_eval.api.instance")
    return instances.Instance(kind, doc, arguments, 0, ("made_up", 0, 1))


def test_generation_is_greedy_and_ends_before_a_stop_string(home):
    from rag2.lmeval import Rag

    model = Rag(generator=str(home / "generator"))
    ids = model.generator.tokenizer("The town", return_tensors="pt")["input_ids"]
    whole = model.generator.model.generate(ids, max_new_tokens=12, do_sample=False)
    text = model.generator.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    ask = {"until": [], "max_gen_toks": 12}
    assert model.generate_until([instance("generate_until", {}, "The town", ask)]) == [text]
    stop = text[len(text) // 2 :][:3]
    ask = {"until": [stop], "max_gen_toks": 12}
    (cut,) = model.generate_until([instance("generate_until", {}, "The town", ask)])
    assert cut == text[: text.find(stop)]
    with pytest.raises(UserError, match="greedily"):
        ask = {"do_sample": True}
        model.generate_until([instance("generate_until", {}, "The town", ask)])


def test_rolling_windows_cover_a_long_text_as_lm_evaluation_harness_cuts_it(home, chunks):
    from rag2.lmeval import Rag

    path = str(home / "generator")
    theirs = hflm(pretrained=path, device="cpu", batch_size=1, dtype="float32")
    text = " ".join(chunk.text for chunk in chunks)[:4000]
    request = instance("loglikelihood_rolling", {}, text)
    assert len(theirs.tok_encode(text)) > theirs.max_length
    expected = theirs.loglikelihood_rolling([request], disable_tqdm=True)
    assert Rag(generator=path).loglikelihood_rolling([request]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generatr": "x"}, "generatr.*Did you mean 'generator'"),
        ({"retriever": "bm25"}, "nothing to search: set kb"),
        ({"kb": "there.sqlite"}, "kb is given without a retriever"),
        ({"reading": "mixed"}, "reading"),
        ({"k": 0}, "k"),
    ],
)
def test_wrong_settings_are_one_clear_line(home, settings, message):
    from rag2.lmeval import Rag

    given = {"generator": str(home / "generator")} | settings
    with pytest.raises(UserError, match=message) as error:
        Rag(**given)
    assert "\n" not in str(error.value)


def test_documents_without_the_query_field_are_refused_with_the_fields_there_are(home):
    from rag2.lmeval import Rag

    kb = str(home / "data" / "kb.sqlite")
    model = Rag(generator=str(home / "generator"), retriever="bm25", kb=kb, query="questions")
    doc = {"question": "Where?", "choices": []}
    with pytest.raises(
        UserError, match="'questions'.*question, choices; .*Did you mean 'question'"
    ):
        model.loglikelihood([instance("loglikelihood", doc, "Where?", " there")])


# --- passages that have no room ------------------------------------------------------------------

QUERY, ENDINGS = "Where lives Ola?", [" here", " by the old mill"]
# BM25 prefers the shorter ones: 1 is the best, 3 the worst.
LIVES = [Chunk(n, f"d{n}", f"Ola lives{' near' * n**3}") for n in (3, 1, 2)]


def small_rag(home: Path, **settings: Any) -> Any:
    """A model over three chunks of different length, sharp enough that every token tells."""
    from rag2.lmeval import Rag

    model = Rag(generator=str(home / "generator"), k=3, temperature=TEMPERATURE, **settings)
    roughen(model.generator.model, 0.1)
    model.chunks, model.retriever = {chunk.id: chunk for chunk in LIVES}, Lexical(BM25(LIVES))
    return model


def told(tmp_path: Path) -> dict[str, Any]:
    """The one line of the sidecar."""
    (line,) = (tmp_path / "told.jsonl").read_text().splitlines()
    return json.loads(line)


def filled(model: Any, numbers: list[int]) -> str:
    """A context as long as leaves no room for just these chunks, but for any shorter prompt."""
    from rag2.lmeval import inserted

    passages, filler = [model.chunks[n].passage for n in numbers], ""
    tokenizer = model.generator.tokenizer
    room = model.max_length - max(len(tokenizer.encode(ending)) for ending in ENDINGS)
    while True:
        context = f"Answer.{filler}{GAP}Question: {QUERY}\nAnswer:"
        if len(tokenizer.encode(inserted(passages, context, QUERY))) > room:
            return context
        filler += " x"


@pytest.mark.parametrize(
    ("reading", "without_room", "reads"),
    [
        ("marginal", None, [[1], [2], [3]]),
        ("marginal", [3], [[1], [2], []]),
        ("concat", None, [[1, 2, 3]]),
        ("concat", [1, 2, 3], [[1, 2]]),
        ("concat", [1, 2], [[1]]),
    ],
)
def test_what_has_no_room_is_left_out_worst_first_and_told(
    home, tmp_path, seed, reading, without_room, reads
):
    from rag2.lmeval import inserted

    model = small_rag(home, reading=reading, sidecar=str(tmp_path / "told.jsonl"))
    context = filled(model, without_room) if without_room else f"Question: {QUERY}\nAnswer:"
    requests = [
        instance("loglikelihood", {"question": QUERY}, context, ending) for ending in ENDINGS
    ]
    got = [logp for logp, _ in model.loglikelihood(requests)]
    row = told(tmp_path)
    assert row["chunks"] == [1, 2, 3]
    assert row["dropped"] == 3 - sum(map(len, reads))
    contexts = [
        inserted([model.chunks[n].passage for n in read], context, QUERY) if read else context
        for read in reads
    ]
    parts = model.generator.model, model.generator.tokenizer
    logp_KC = np.array(score_choices(*parts, contexts, [ENDINGS] * len(contexts)))
    prior_K = log_softmax(np.array(row["scores"]) / TEMPERATURE)
    expected = logp_KC[0] if reading == "concat" else logsumexp(prior_K[:, None] + logp_KC, 0)
    assert got == pytest.approx(expected, abs=1e-4)


def first_read(model: Any, context: str) -> list[int]:
    """The tokens that the generator reads before it writes the first of its own."""
    seen: list[list[int]] = []
    handle = model.generator.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    ask = {"until": [], "max_gen_toks": 2}
    model.generate_until([instance("generate_until", {"question": QUERY}, context, ask)])
    handle.remove()
    return seen[0]


def test_generation_reads_all_passages_in_one_prompt_the_best_one_last(home, tmp_path):
    model = small_rag(home, sidecar=str(tmp_path / "told.jsonl"))
    passages = [model.chunks[n].passage for n in (3, 2, 1)]
    whole = GAP.join([*passages, f"Question: {QUERY}"])
    assert first_read(model, f"Question: {QUERY}") == model.generator.tokenizer.encode(whole)
    assert (told(tmp_path)["chunks"], told(tmp_path)["dropped"]) == ([1, 2, 3], 0)


def test_a_context_that_spells_the_beginning_of_text_begins_once(home):
    from rag2.lmeval import Rag

    model = Rag(generator=str(home / "generator"))
    tokenizer = model.generator.tokenizer
    ids = tokenizer.encode("The town")
    assert ids.count(tokenizer.bos_token_id) == 1
    for context in ("The town", f"{tokenizer.bos_token}The town"):
        assert first_read(model, context) == ids


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to take")
def test_a_gpu_that_is_not_there_is_replaced_by_the_cpu_with_a_warning(home, caplog):
    from rag2.lmeval import Rag

    model = Rag(generator=str(home / "generator"), device="cuda:0")
    assert model.generator.device.type == "cpu"
    assert "device=cuda:0: there is no GPU, taking the CPU" in caplog.text
