"""The report: documented keys, honest verdicts, runs that can be compared."""

import hashlib
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from made import ENVIRONMENT, exactly, make_arm, make_questions, make_scores
from rag2.evaluation import report, samples, select, stats
from rag2.evaluation.outcome import ArmResult, pool


def make_results(joint: int, rival: int, n: int = 400) -> tuple[dict, list[ArmResult]]:
    choice = select.Choice(k=4, temperature=2.0, validation_accuracy=0.8)
    rag = {"reading": "marginal", "k": 4, "temperature": 2.0, "choice": choice}
    arms = [
        make_arm("majority", exactly(100, n), generator="none"),
        make_arm("base", exactly(110, n), eval_seconds=1.5, control_accuracy=0.9),
        make_arm(
            "frozen_rag",
            exactly(200, n),
            retriever="warm",
            oracle=select.Oracle(k=5, temperature=1.0, test_accuracy=0.51),
            **rag,
        ),
        make_arm("sft_rag", exactly(rival, n), retriever="warm", generator="sft", **rag),
        make_arm("gold_rag", exactly(n, n), retriever="gold", generator="sft"),
        make_arm("warm_joint", exactly(240, n), retriever="warm", generator="joint", **rag),
        make_arm("joint_sft", exactly(230, n), retriever="joint", generator="sft", **rag),
        make_arm(
            "joint",
            exactly(joint, n),
            retriever="joint",
            generator="joint",
            recall_at_1=0.75,
            recall_at_k=0.95,
            two_hop_accuracy=0.4,
            train_seconds=30.0,
            trained_parameters=1_234_567,
            **rag,
        ),
    ]
    return report.summarize("almanac", arms, seed=0, environment=ENVIRONMENT), arms


def test_results_have_the_documented_keys_and_round_trip(tmp_path):
    results, arms = make_results(joint=300, rival=250)
    assert json.loads(report.write(tmp_path, results, arms).read_text()) == results
    assert results["format"] == "rag2.results/1" and results["interval"] == "wilson"
    documented = ["format", "task", "n", "seed", "interval", "arms", "paired", "k_selection"]
    assert set(documented) | {"environment"} <= set(results)
    joint = results["arms"]["joint"]
    assert set("accuracy stderr ci95 k acc_norm recall_at_k train_seconds eval_seconds".split()) | {
        "trained_parameters"
    } <= set(joint)
    assert (joint["accuracy"], joint["k"], joint["recall_at_k"]) == (0.75, 4, 0.95)
    seen = joint["groups"]["wording"]["seen"]
    assert (seen["accuracy"], seen["n"]) == (0.75, 200) and seen["ci95"][0] < 0.75
    first = results["paired"][0]
    assert (first["a"], first["b"], first["difference"]) == ("joint", "base", 0.475)
    assert set(first) >= {"ci95", "mcnemar_p"} and first["holm_p"] >= first["mcnemar_p"]
    seen, unseen = (first["groups"]["wording"][label] for label in ("seen", "unseen"))
    assert (seen["difference"] + unseen["difference"]) / 2 == pytest.approx(0.475)  # 200 of each
    part = stats.paired(arms[-1].correct[1::2], arms[1].correct[1::2])
    assert unseen["mcnemar_p"] == pytest.approx(part.mcnemar_p, rel=1e-5, abs=0)
    assert not {row["b"] for row in results["paired"]} & {"majority", "gold_rag"}
    assert results["k_selection"]["split"] == "validation"
    assert results["k_selection"]["chosen"]["frozen_rag"] == 4
    assert results["k_selection"]["oracle_test"] == {"frozen_rag": 5}


def test_two_runs_are_equal_but_for_their_times():
    results, arms = make_results(joint=300, rival=250)
    slow = [replace(arm, train_seconds=99.0, eval_seconds=99.0) for arm in arms]
    slower = report.summarize("almanac", slow, seed=0, environment=ENVIRONMENT)
    assert slower != results and report.strip_times(slower) == report.strip_times(results)
    assert "seconds" not in json.dumps(report.strip_times(results))
    other, _ = make_results(joint=301, rival=250)
    assert report.strip_times(other) != report.strip_times(results)


def test_the_grid_says_which_half_earned_the_gain():
    results, _ = make_results(joint=300, rival=200)
    grid = results["grid_2x2"]
    assert grid["accuracy"] == [[0.5, 0.6], [0.575, 0.75]]
    assert grid["arms"] == [["sft_rag", "warm_joint"], ["joint_sft", "joint"]]
    effects = {name: effect["difference"] for name, effect in grid["effects"].items()}
    assert effects == {"retriever": 0.1125, "generator": 0.1375, "interaction": 0.075}


@pytest.mark.parametrize(
    ("joint", "rival", "says"),
    [
        (
            300,
            250,
            "joint beats sft_rag, the strongest arm without a jointly trained half (75.0 % ",
        ),
        (252, 250, "joint is ahead, perhaps by chance, of sft_rag"),
        (250, 250, "joint does not win: sft_rag answers as many questions right"),
        (248, 250, "joint does not win: sft_rag is ahead, perhaps by chance (62.0 %"),
        (220, 250, "joint does not win: sft_rag beats it (55.0 % against 62.5 %, difference -7.5"),
        (220, 250, "score higher still: warm_joint 60.0 %, joint_sft 57.5 %."),
        (235, 180, "without a jointly trained half (58.8 % against 50.0 %"),
        (235, 180, "score higher still: warm_joint 60.0 %."),
    ],
)
def test_the_verdict_is_honest_also_when_joint_loses(joint, rival, says):
    results, _ = make_results(joint, rival)
    assert says in report.verdict(results)
    assert report.verdict(results) in report.markdown(results)


def test_without_a_joint_arm_the_verdict_names_the_best():
    arms = [make_arm("base", exactly(20, 40)), make_arm("ft", exactly(25, 40))]
    results = report.summarize("mmlu", arms, seed=1, environment={})
    assert report.verdict(results).startswith("ft scores highest with 62.5 % of 40 questions")
    assert "Choice of K" not in report.markdown(results) and "grid_2x2" not in results
    arms.append(make_arm("sft", exactly(25, 40)))
    tied = report.verdict(report.summarize("mmlu", arms, seed=1, environment={}))
    assert tied.startswith("ft and sft score highest with 62.5 % of 40 questions")


def test_the_report_shows_every_arm_and_labels_the_oracle():
    results, arms = make_results(joint=300, rival=250)
    text = report.markdown(results)
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(report.terminal_table(results))
    terminal = console.export_text()
    for arm in arms:
        assert f"| {arm.name} |" in text and arm.name in terminal
    assert (
        "| joint | joint | joint | marginal | 75.0 % | [70.5, 79.0] | 4 | 75.0 % | 95.0 % |" in text
    )
    oracle = (
        "Oracle, the best K, reading and temperature on the test answers and therefore no result"
    )
    assert f"{oracle}: frozen_rag K = 5" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_samples_have_the_harness_shape_and_the_passages(tmp_path, rng):
    scores = make_scores(rng, q=6, k=3, c=3)
    questions = make_questions(6)
    choice = select.Choice(k=2, temperature=1.0, validation_accuracy=0.5)
    contexts = [f"Question: {question.question}\nAnswer:" for question in questions]
    facts = {"retriever": "warm", "contexts": tuple(contexts)}
    arm = ArmResult.of("frozen_rag", questions, scores, choice, **facts)
    path = samples.write_samples(tmp_path, arm)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.name == "samples_frozen_rag.jsonl" and len(rows) == 6
    for index, row in enumerate(rows):
        assert row["doc_id"] == index and row["doc"]["id"] == f"q{index}" and row["target"] == "0"
        assert row["arguments"]["gen_args_1"] == {"arg_0": contexts[index], "arg_1": " bb"}
        assert [float(value) for value, _ in row["filtered_resps"]] == arm.logp_QC[index].tolist()
        assert row["resps"] == [[answer] for answer in row["filtered_resps"]]
        assert row["prompt_hash"] == hashlib.sha256(contexts[index].encode()).hexdigest()
        assert row["acc"] == float(arm.correct[index])
        assert [item["chunk"] for item in row["retrieved"]] == scores.ids_QK[index, :2].tolist()
        assert sum(item["posterior"] for item in row["retrieved"]) == pytest.approx(1.0)


def test_arms_that_answered_other_questions_cannot_be_compared():
    arms = [make_arm("base", exactly(20, 40)), make_arm("ft", exactly(25, 41))]
    with pytest.raises(AssertionError, match="ft is not paired"):
        report.summarize("mmlu", arms, seed=1, environment={})


def test_seeds_are_pooled_by_joining_their_records():
    runs = {
        seed: [
            make_arm("base", exactly(20, 40), train_seconds=1.0),
            make_arm("joint", exactly(right, 40), k=k, retriever="joint", train_seconds=1.0 * seed),
        ]
        for seed, right, k in ((1, 24, 2), (3, 34, 4))
    }
    pooled = [pool([run[i] for run in runs.values()]) for i in range(2)]
    results = report.summarize("almanac", pooled, seed=1, environment={}, by_seed=runs)
    joint = results["arms"]["joint"]
    assert (results["n"], joint["accuracy"], joint["k"]) == (80, 58 / 80, None)
    assert (joint["train_seconds"], results["arms"]["base"]["k"]) == (2.0, 0)
    assert joint["ci95"] == pytest.approx(stats.wilson(58, 80), abs=1e-6)
    assert results["paired"][0]["a_only"] == 18
    assert "| joint | 60.0 % | 85.0 % |" in report.markdown(results)
    assert results["seeds"]["3"]["joint"] == {"accuracy": 0.85, "k": 4}
