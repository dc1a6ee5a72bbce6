"""YAML + key=value -> frozen models: what merges, what is refused, and in which words."""

import random
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import StrictBool, StrictInt, ValidationError, field_validator

from rag2 import config, yaml12
from rag2.config import Config, choice, dump, load
from rag2.registry import TABLES, UserError


class Full(Config):
    """All weights."""

    name: Literal["full"] = "full"


class LoRA(Config):
    """A low-rank update."""

    name: Literal["lora"] = "lora"
    rank: StrictInt = 16
    alpha: float = 32.0


# `choice` reads the registry, and class bodies below are read once, at import.
_module = types.ModuleType("configs_of_test_config")
vars(_module).update(Full=Full, LoRA=LoRA)
sys.modules[_module.__name__] = _module
TABLES["test_tuning"] = {
    n: f"{_module.__name__}:{c}" for n, c in {"full": "Full", "lora": "LoRA"}.items()
}
TABLES["test_single"] = {"lora": f"{_module.__name__}:LoRA"}
if TYPE_CHECKING:
    Tuning = Any
    Single = Any
else:
    Tuning, Single = choice("test_tuning"), choice("test_single")
del TABLES["test_tuning"], TABLES["test_single"]


class OptimConfig(Config):
    lr: float = 1e-3
    steps: StrictInt = 10
    betas: tuple[float, ...] = (0.9, 0.95)

    @field_validator("steps")
    @classmethod
    def _positive(cls, steps: int) -> int:
        if steps < 1:
            raise UserError("a run has at least one step")
        return steps


class RunConfig(Config):
    out: str = "runs/x"
    """where the run goes"""
    seed: StrictInt = 0
    resume: StrictBool = False
    k: StrictInt | str = 4
    limit: float | None = None
    mode: Literal["sum", "mean"] = "sum"
    weights: dict[str, float] = {"a": 1.0}
    optim: OptimConfig = OptimConfig(lr=0.5)
    tuning: Tuning = LoRA(rank=4)
    loss: Single = LoRA(alpha=1.0)


class NeedsTuning(Config):
    generator: str
    tuning: Tuning


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    return str(tmp_path / "run.yaml")


def refusal(*overrides: str, cls: type[Config] = RunConfig, path: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(cls, path, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_file_and_overrides_there_are_the_defaults():
    assert load(RunConfig) == RunConfig()


def test_an_override_of_one_key_leaves_the_others_as_the_field_has_them():
    loaded = load(RunConfig, None, ["optim.steps=3", "tuning.alpha=2"])
    assert loaded.optim == OptimConfig(lr=0.5, steps=3)
    assert loaded.tuning == LoRA(rank=4, alpha=2.0)


def test_partial_blocks_merge_the_same_way_in_python_yaml_and_overrides(tmp_path: Path):
    in_python = RunConfig.model_validate({"tuning": {"alpha": 2.0}})
    in_yaml = load(RunConfig, written(tmp_path, "tuning: {alpha: 2.0}"))
    assert in_python == in_yaml == load(RunConfig, None, ["tuning.alpha=2.0"])


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path):
    path = written(tmp_path, "seed: 1\noptim: {lr: 0.1, steps: 7}\n")
    loaded = load(RunConfig, path, ["optim.lr=0.2"])
    assert (loaded.seed, loaded.optim.lr, loaded.optim.steps) == (1, 0.2, 7)


@pytest.mark.parametrize("text", ["tuning: {rank: 8}", "tuning: {name: lora, rank: 8}"])
@pytest.mark.parametrize("override", ["tuning.name=full", "tuning=full"])
def test_a_new_name_replaces_the_block(tmp_path: Path, text: str, override: str):
    assert load(RunConfig, written(tmp_path, text), [override]).tuning == Full()


def test_a_name_given_again_keeps_the_block(tmp_path: Path):
    path = written(tmp_path, "tuning: {name: lora, rank: 8}")
    assert load(RunConfig, path, ["tuning.name=lora"]).tuning == LoRA(rank=8)
    assert load(RunConfig, path, ["tuning=lora", "tuning.alpha=3"]).tuning == LoRA(rank=8, alpha=3)


def test_a_bare_string_is_the_short_form_of_a_block(tmp_path: Path):
    assert load(RunConfig, written(tmp_path, "tuning: full")).tuning == Full()
    assert load(RunConfig, written(tmp_path, "tuning: lora"), ["tuning.rank=2"]).tuning.rank == 2
    required = load(NeedsTuning, None, ["generator=g", "tuning=lora"])
    assert required.tuning == LoRA()
    assert load(RunConfig, None, ["loss=lora"]).loss == LoRA(alpha=1.0)


def test_numbers_and_words_are_read_as_yaml_1_2_reads_them():
    loaded = load(
        RunConfig, None, ["optim.lr=1e-5", "out=no", "optim.betas=[0.8, 1]", "k=2021-01-01"]
    )
    assert (loaded.optim.lr, loaded.out, loaded.optim.betas) == (1e-5, "no", (0.8, 1.0))
    assert loaded.k == "2021-01-01"
    assert (
        load(RunConfig, None, ["k=010"]).k == 10 and load(RunConfig, None, ["k=1:30"]).k == "1:30"
    )


def test_a_plain_dictionary_is_replaced_not_merged():
    assert load(RunConfig, None, ["weights={b: 2}"]).weights == {"b": 2.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr' for OptimConfig. Did you mean 'optim.lr'?"),
        ("sed=1", "unknown key 'sed' for RunConfig. Did you mean 'seed'?"),
        ("steps=1", "unknown key 'steps' for RunConfig. Did you mean 'optim.steps'?"),
        ("tuning.rnk=8", "unknown key 'tuning.rnk' for LoRA. Did you mean 'tuning.rank'?"),
        ("loss.alhpa=8", "unknown key 'loss.alhpa' for LoRA. Did you mean 'loss.alpha'?"),
        ("tuning=lor", "unknown value 'lor' for 'tuning.name'; allowed: full, lora."),
        ("tuning.name=ful", "Did you mean 'full'?"),
        ("loss=lroa", "unknown value 'lroa' for 'loss.name'; allowed: lora. Did you mean 'lora'?"),
        ("mode=man", "unknown value 'man' for 'mode'; allowed: sum, mean. Did you mean 'mean'?"),
        ("optim.lr=abc", "wrong value for 'optim.lr': 'abc'; expected a valid number"),
        ("seed=true", "wrong value for 'seed': True; expected a valid integer"),
        ("seed=1.0", "wrong value for 'seed': 1.0"),
        ("resume=yes", "wrong value for 'resume': 'yes'; expected a valid boolean"),
        ("resume=1", "wrong value for 'resume': 1"),
        ("out=12", "wrong value for 'out': 12; expected a valid string; put it in quotes"),
        ("k=[1]", "wrong value for 'k': [1]; expected a valid integer or a valid string"),
        ("optim=3", "'optim' is a block of keys, not 3"),
        ("optim.betas=[1, x]", "wrong value for 'optim.betas[1]': 'x'"),
        ("optim.steps=0", "optim.steps: a run has at least one step"),
        ("seed", "malformed override 'seed': write key=value"),
        ("=3", "malformed override '=3'"),
        ("optim..lr=3", "malformed override"),
        ("--seed=3", "malformed override"),
        ("out=[a", "malformed value in override 'out=[a'"),
        ("out={a: 1, a: 2}", "key 'a' is given twice"),
    ],
)
def test_a_mistake_is_one_line_with_key_value_allowed_and_nearest(override: str, message: str):
    assert message in refusal(override)


def test_the_first_of_several_mistakes_is_named_and_the_others_counted():
    assert refusal("optim.lr=x", "seed=y").endswith("(and 1 more)")


def test_an_override_cannot_go_into_a_plain_value():
    assert "goes into 'seed'" in refusal("seed=1", "seed.x=2")


def test_a_missing_key_is_named():
    assert "missing key 'generator' for NeedsTuning" in refusal("tuning=full", cls=NeedsTuning)
    assert "missing key 'tuning.name'" in refusal("generator=g", "tuning.rank=2", cls=NeedsTuning)


def test_a_very_long_value_is_cut():
    assert len(refusal(f"seed={'x' * 10_000}")) < 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nout: : 2\n", "run.yaml, line 2:"),
        ("seed: 1\nseed: 2\n", "run.yaml, line 2: key 'seed' is given twice"),
        ("- seed\n", "does not hold `key: value` lines"),
        ("3: seed\n", "does not hold `key: value` lines"),
        ("out: !!python/object:os.system x\n", "run.yaml, line 1:"),
        ("out: \x00\n", "run.yaml"),
        pytest.param("[" * 1500, "run.yaml", marks=pytest.mark.slow),
    ],
)
def test_a_malformed_file_is_refused_with_its_place(tmp_path: Path, text: str, message: str):
    assert message in refusal(path=written(tmp_path, text))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path):
    (tmp_path / "run.yaml").write_bytes(b"out: \xff\n")
    assert "is not UTF-8 text" in refusal(path=str(tmp_path / "run.yaml"))


def test_an_empty_file_is_the_defaults(tmp_path: Path):
    assert load(RunConfig, written(tmp_path, "# nothing\n")) == RunConfig()


def test_a_missing_file_answers_with_the_nearest_one(tmp_path: Path):
    path = written(tmp_path, "")
    assert f"Did you mean '{path}'?" in refusal(path=path.replace("run", "rnu"))
    assert "is a directory" in refusal(path=str(tmp_path))


def test_shipped_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wheel = tmp_path / "site/rag2/recipes"
    for name in ("configs/demo/a.yaml", "train/a.py"):
        (wheel / name).parent.mkdir(parents=True, exist_ok=True)
        (wheel / name).write_text("seed: 5\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(config, "SHIPPED", (tmp_path / "site", wheel))
    assert load(RunConfig, "configs/demo/a.yaml").seed == 5
    assert config.recipe("train/a.py") == wheel / "train/a.py"
    (tmp_path / "elsewhere/configs/demo").mkdir(parents=True)
    (tmp_path / "elsewhere/configs/demo/a.yaml").write_text("seed: 6\n")
    assert load(RunConfig, "configs/demo/a.yaml").seed == 6  # as given comes first
    assert "Did you mean 'configs/demo/a.yaml'?" in refusal(path="configs/demo/b.yaml")
    with pytest.raises(UserError, match="recipe 'train/b.py' not found. Did you mean 'train/a.py'"):
        config.recipe("train/b.py")


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValidationError):
        RunConfig().seed = 3


def test_what_is_dumped_loads_to_an_equal_object(tmp_path: Path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201
    draw = random.Random(seed)
    words = [
        "no",
        "1e-5",
        "2021-01-01",
        "1:30",
        "",
        " x ",
        "a: b",
        "# c",
        "null",
        "~",
        "é\n\t",
        "010",
    ]
    for _ in range(30):
        cfg = RunConfig(
            out=draw.choice(words),
            k=draw.choice([draw.randrange(9), *words]),
            limit=draw.choice([None, draw.random(), 1e300, -5e-324]),
            weights={draw.choice(words): draw.gauss(0, 1e9)},
            optim=OptimConfig(lr=draw.random() * 1e-9, betas=(draw.random(),) * draw.randrange(3)),
            tuning=draw.choice([Full(), LoRA(rank=draw.randrange(99))]),
        )
        assert load(RunConfig, written(tmp_path, dump(cfg))) == cfg


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_a_number_without_bound_is_refused(value: str):
    with pytest.raises(UserError, match=r"limit.*finite"):
        load(RunConfig, None, [f"limit={value}"])


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=15,
)


@settings(deadline=None, max_examples=60)
@given(plain)
def test_yaml_text_gives_the_same_data_back(data: Any):
    assert yaml12.parse(yaml12.render(data), "here") == data
    assert yaml12.parse(yaml12.render(data, flow=True), "here") == data


@settings(deadline=None, max_examples=60)
@given(st.text())
def test_any_text_is_either_data_or_one_line_of_complaint(text: str):
    try:
        yaml12.parse(text, "here")
    except ValueError as error:
        assert str(error).startswith("here") and len(str(error).splitlines()) == 1


def test_an_unknown_table_is_refused_by_name():
    with pytest.raises(UserError, match="unknown registry table 'tunning'. Did you mean 'tuning'"):
        choice("tunning")


# ----- run -----------------------------------------------------------------------------------


def outcome(monkeypatch: pytest.MonkeyPatch, capsys, words: list[str], main=lambda cfg: cfg.seed):
    """(result or exit status, stdout, stderr) of a recipe called with these words."""
    monkeypatch.setattr(sys, "argv", ["train/x.py", *words])
    try:
        result = config.run(main, RunConfig)
    except SystemExit as error:
        result = f"exit {error.code}"
    return result, *capsys.readouterr()


def test_run_hands_the_configuration_to_main_and_returns_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = written(tmp_path, "seed: 7")
    assert outcome(monkeypatch, capsys, ["-c", path]) == (7, "", "")
    assert outcome(monkeypatch, capsys, ["seed=9", "--config", path])[0] == 9


@pytest.mark.parametrize(
    "words", [["sed=1"], ["-c"], ["-c", "none.yaml"], ["--hepl"], ["--seed", "1"], ["seed"]]
)
def test_run_ends_with_status_2_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
):
    result, out, err = outcome(monkeypatch, capsys, words)
    assert (result, out, err.count("\n")) == ("exit 2", "", 1) and err.startswith("error: ")


def test_run_words_the_mistakes_that_main_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def user(cfg: Any):
        raise UserError("two\nlines")

    assert outcome(monkeypatch, capsys, [], user) == ("exit 2", "", "error: two lines\n")
    result, _, err = outcome(monkeypatch, capsys, [], lambda cfg: (tmp_path / "none").read_text())
    assert result == "exit 2" and "none" in err and err.count("\n") == 1


def test_run_does_not_hide_faults_of_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for fault in (ValueError("bug"), AssertionError("bug"), OSError(5, "Input/output error")):

        def main(cfg: Any, fault: Exception = fault):
            raise fault

        with pytest.raises(type(fault)):
            outcome(monkeypatch, capsys, [], main)


def test_run_ends_with_130_when_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def main(cfg: Any):
        raise KeyboardInterrupt

    assert outcome(monkeypatch, capsys, [], main) == ("exit 130", "", "error: interrupted\n")


def test_help_tells_the_defaults_as_yaml_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    result, out, err = outcome(monkeypatch, capsys, ["--help"])
    assert (result, err) == ("exit 0", "")
    story, _, defaults = out.partition("keys and their defaults:\n\n")
    assert story.startswith("usage: rag2 train x [-c FILE.yaml] [key=value ...]")
    assert "YAML + key=value" in story  # the docstring of the module of `main`
    assert "out: runs/x  # where the run goes" in defaults
    assert "tuning:  # (name: full | lora)" in defaults
    assert load(RunConfig, written(tmp_path, defaults)) == RunConfig()
