"""A sweep's plan: what it expands to, how runs are named, and what is said of a wrong one before anything runs."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.utils import sweep_choices, sweep_file, sweep_plan, sweep_schema
from scripts.utils.config import load_config, to_yaml
from scripts.utils.errors import UserError
from scripts.utils.sweep_plan import DEFAULT_STEPS, STEPS, Run, Wanted
from tests.commands import ROOT


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text("train:\n  epochs: 1\n")
    return tmp_path


def runs_of(text: str, *, words: str = "", variables: dict[str, tuple[str, str]] | None = None) -> list[Run]:
    Path("plan.yaml").write_text(text)
    plan, places = sweep_file.read(Path("plan.yaml"))
    data, configs = tuple(plan.data) or ("a.jsonl",), tuple(plan.configs) or ("one.yaml",)
    steps = tuple(plan.steps) or DEFAULT_STEPS
    given_values = sweep_plan.given_by(plan, places, words, variables or {})
    return sweep_plan.expand(Wanted(data, configs, steps, tuple(given_values), plan, places))


def said_of(text: str) -> str:
    with pytest.raises(UserError) as caught:
        runs_of(text)
    return str(caught.value)


def test_everything_is_combined_with_everything() -> None:
    runs = runs_of(
        "data: [a.jsonl, b.jsonl]\nconfigs: [one.yaml, two.yaml]\nseeds: [1, 2]\n"
        "grid: {train.lr: [1e-4, 1e-3], lora.r: [4, 8]}\n"
        "random: {count: 2, train.warmup: {min: 0, max: 0.5}}\n"
        "variants: [{name: packed, train.packing: true}, {train.packing: false, train.batch_size: 4}]\n"
    )
    assert len(runs) == 2 * 2 * 2 * (2 * 2) * 2 * 2
    assert len({run.name for run in runs}) == len(runs)
    first = runs[0]
    assert list(first.variant) == ["train.learning_rate", "lora.r", "train.warmup", "train.packing"]
    # values as the config has them, not as the file spells them
    assert (first.variant["train.learning_rate"], first.variant["train.packing"], first.seed) == (1e-4, True, 1)
    assert first.resolved.train.seed == 1 and first.resolved.lora.r == 4
    assert first.name.startswith("one-a-lr0.0001-r4-warmup") and first.name.endswith("-packed-seed1")
    assert "packingfalse-batch_size4" in runs[2].name


def test_the_old_keys_alone_make_the_old_names() -> None:
    runs = runs_of(
        "data:\n  - a.jsonl\nconfigs:\n  - one.yaml\n  - two.yaml\nset:\n  - train.epochs=2\nsteps: [process]\n"
    )
    assert [(run.name, run.steps, run.variant) for run in runs] == [
        ("one-a", ("process",), {}),
        ("two-a", ("process",), {}),
    ]


def test_the_command_line_goes_over_the_plans_own_set() -> None:
    (run,) = runs_of(
        "set: ['train.lr=1e-4 ', train.epochs=2, 'style.text=be brief, # please']\n", words="train.epochs=9"
    )
    assert (run.resolved.train.learning_rate, run.resolved.train.epochs) == (1e-4, 9)
    assert run.resolved.style.text == "be brief, # please"


def test_set_goes_below_what_the_plan_varies() -> None:
    (run,) = runs_of("grid: {train.epochs: 5}\n", words="train.epochs=2 train.lr=1e-5")
    assert (run.resolved.train.epochs, run.resolved.train.learning_rate) == (5, 1e-5)


def test_null_is_a_value_like_any_other() -> None:
    Path("one.yaml").write_text("train:\n  max_steps: 7\n")
    assert [run.resolved.train.max_steps for run in runs_of("grid: {train.max_steps: [null, 3]}\n")] == [None, 3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config: one.yaml", ["plan.yaml:1", "'config'", "'configs'"]),
        ("grid:\n  train.learning_rat: [1e-4]", ["plan.yaml:2", "train.learning_rat", "train.learning_rate"]),
        ("grid:\n  lr: [1e-4]", ["plan.yaml:2", "'lr'"]),
        ("grid:\n  train.lr: [1e-4, fast]", ["plan.yaml:2", "train.learning_rate is 'fast'"]),
        ("grid:\n  train.lr: []", ["plan.yaml:2", "at least 1"]),
        ("variants:\n  - {lora.r: 4}\n  - lora.rr: 4", ["plan.yaml:3", "lora.rr", "lora.r"]),
        ("random:\n  train.lr: [1e-3]", ["plan.yaml:1", "random.count is missing"]),
        ("random:\n  count: 2\n  train.lr: {min: 1, max: 0.1}", ["plan.yaml:3", "must be below"]),
        ("random:\n  count: 2\n  train.lr: {min: 0, max: 0.1, log: true}", ["plan.yaml:3", "above 0"]),
        ("random:\n  count: 2\n  train.lr: {min: 0, mx: 0.1}", ["plan.yaml:3", "'max'"]),
        ("random:\n  count: 2\n  train.lr: {min: 0.5, max: 2}", ["plan.yaml:3", "less than 1"]),
        ("seeds: [1, x]", ["plan.yaml:1", "'x'"]),
        ("seeds: [-1]", ["plan.yaml:1", "'-1'"]),
        ("budget:\n  hour: 2", ["plan.yaml:2", "'hours'"]),
        ("budget:\n  runs: none", ["plan.yaml:2", "budget.runs"]),
        ("prune: {percentile: 120}", ["plan.yaml:1", "less than 100"]),
        ("prune: {after: 1}", ["plan.yaml:1", "after_runs"]),
        ("steps: [trian]", ["plan.yaml:1", "'trian'", "'train'"]),
        ("name: '{confg}-{train.lr}'", ["plan.yaml:1", "{confg}", "{config}"]),
        ("grid: {train.lr: 1e-4}\nvariants: [{train.learning_rate: 1e-3}]", ["plan.yaml:2", "in grid and in variants"]),
        ("grid:\n  train.seed: [1]\n", ["plan.yaml:2", "seeds:"]),
        ("grid:\n  data.raw: [1]\n", ["plan.yaml:2", "data:"]),
        ("variants:\n  - run.name: x\n", ["plan.yaml:2", "name:"]),
        ("set:\n  - train.epocs=1", ["plan.yaml:1", "train.epocs", "train.epochs"]),
        ("set: [epochs]", ["plan.yaml:1", "section.key=value"]),
        ("include: nowhere.yaml", ["nowhere.yaml"]),
        ("include: plan.yaml", ["includes itself"]),
        ("grid: 3", ["plan.yaml:1", "grid"]),
        ("random: 3", ["plan.yaml:1", "random"]),
        ("variants: {a.b: [1", ["plan.yaml"]),
        ("- a", ["plan.yaml", "mapping"]),
        ("name: sweeps", ["sweeps"]),
        (f"seeds: {list(range(100))}\ngrid: {{lora.r: {list(range(1, 61))}}}", ["6,000 runs", "random"]),
    ],
)
def test_each_wrong_plan_is_told_where_and_what_and_what_instead(text: str, said: list[str]) -> None:
    message = said_of(text)
    assert [part for part in said if part not in message] == []


def test_all_problems_come_at_once_and_each_once() -> None:
    message = said_of("data: [a.jsonl, b.jsonl]\ngrid:\n  train.lr: [fast, 1e-4]\n  lora.r: [0, 8]\nseeds: [1, 2]\n")
    assert message.count("'fast'") == 1 and message.count("lora.r") == 1


def test_values_that_are_wrong_only_together_are_found_before_the_first_run() -> None:
    message = said_of("grid:\n  train.eval_strategy: [epoch, steps]\n")
    assert "load_best_model_at_end" in message


def test_an_included_plan_is_merged_and_its_own_lines_are_named(folder: Path) -> None:
    (folder / "shared").mkdir()
    (folder / "shared" / "base.yaml").write_text(
        "data: [x.jsonl]\ngrid:\n  lora.r: [4]\n  train.lr: [fast]\nseeds: [1, 2]\n"
    )
    message = said_of("include: shared/base.yaml\nseeds: [3]\n")
    assert "shared/base.yaml:4" in message
    runs = runs_of("include: shared/base.yaml\ngrid:\n  train.lr: [1e-4, 1e-3]\nseeds: [3]\n")
    assert [(run.data, run.resolved.lora.r, run.seed) for run in runs] == [("x.jsonl", 4, 3)] * 2


def test_a_name_is_made_of_the_pattern() -> None:
    runs = runs_of("name: '{config}_{train.lr}_{seed}_{number}'\ngrid: {train.lr: [1e-4, 1e-3]}\nseeds: 7\n")
    assert [run.name for run in runs] == ["one_0.0001_7_1", "one_0.001_7_2"]
    (named,) = runs_of("name: '{data}.{variant}'\nvariants: [{name: big one!, lora.r: 64}]\n")
    assert named.name == "a.big-one"


def test_runs_that_would_meet_are_told_apart_by_what_they_are_not_by_their_number() -> None:
    def names(data: str) -> dict[str, str]:
        return {run.data: run.name for run in runs_of(f"data: {data}\nname: same\n")}

    both = names("[a.jsonl, b.jsonl]")
    assert len(set(both.values())) == 2
    assert names("[c.jsonl, b.jsonl, a.jsonl]").items() >= both.items()


def test_a_long_name_is_cut_and_stays_a_name_of_its_own() -> None:
    path = "a" * 40 + ".jsonl"
    keys = (
        "lora.target_modules: [[q_proj, k_proj, v_proj, o_proj, up_proj], [q_proj, k_proj, v_proj, o_proj, gate_proj]]"
    )
    runs = runs_of(f"data: {path}\ngrid:\n  {keys}\n  train.lr: [1e-4]\n")
    assert len({run.name for run in runs}) == 2
    assert all(len(run.name) <= 100 for run in runs)


def test_two_that_come_to_the_same_are_one() -> None:
    assert len(runs_of("grid: {lora.r: [8, '8', 16]}\n")) == 2
    # but two files are two configs, whatever they hold
    assert len(runs_of("configs: [one.yaml, two.yaml]\n")) == 2


def test_rows_that_come_out_differently_never_share_a_folder_and_equal_ones_do() -> None:
    runs = runs_of("grid:\n  render.max_length: [64, 128]\n  train.lr: [1e-4, 1e-3]\n")
    names = [run.data_name for run in runs]
    assert names[0] == names[1] != names[2] == names[3]
    assert {run.data_name for run in runs_of("grid:\n  train.lr: [1e-4, 1e-3]\n")} == {"a"}
    same_stem = runs_of("data: [x/a.jsonl, y/a.jsonl]\n")
    assert len({run.data_name for run in same_stem}) == len({run.name for run in same_stem}) == 2


def test_the_names_of_folders_do_not_make_another_run() -> None:
    (alone,) = runs_of("grid: {render.max_length: 64}\n")
    beside = runs_of("grid: {render.max_length: [64, 128]}\nname: x{render.max_length}\n")
    assert alone.fingerprint == beside[0].fingerprint != beside[1].fingerprint
    assert alone.data_name != beside[0].data_name
    (named,) = runs_of("grid: {render.max_length: 64}\nset: [data.name=mine]\n")
    assert named.fingerprint == alone.fingerprint and named.data_name == "mine"


def test_a_key_that_the_schema_gains_later_makes_no_other_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.utils import schema

    plan = "grid: {render.max_length: [64, 128]}\n"
    before = [(run.fingerprint, run.data_name) for run in runs_of(plan)]

    class Later(schema.RenderSection):
        new_key: int = 3

    class LaterConfig(schema.Config):
        render: Later = Later()

    monkeypatch.setattr(schema, "Config", LaterConfig)
    assert [(run.fingerprint, run.data_name) for run in runs_of(plan)] == before


def test_the_config_that_a_run_is_given_is_the_config_that_was_checked(folder: Path) -> None:
    nasty = {
        "data": {"columns": {"user": "Frage: 1", "assistant": "null"}, "format": "pairs"},
        "style": {"text": "line one\nline two: 'quoted' # no comment\t…"},
        "train": {"eval_strategy": "no", "save_strategy": "no", "learning_rate": 1e-5, "bf16": False},
        "infer": {"stop": ["\n\n", "no", "1e-4"]},
        "lora": {"target_modules": ["q_proj"]},
    }
    (folder / "one.yaml").write_text(json.dumps(nasty))
    (run,) = runs_of("grid: {train.max_steps: [null], train.weight_decay: 1e-2}\n")
    (folder / "given.yaml").write_text(to_yaml(run.resolved))
    assert load_config("given.yaml") == run.resolved


def test_a_config_with_a_secret_is_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "a-very-secret-value")
    message = said_of("grid: {style.text: ['say a-very-secret-value first']}\n")
    assert "secret" in message and "a-very-secret-value" not in message


def test_variables_of_make_reach_every_run() -> None:
    (run,) = runs_of("data: a.jsonl\n", variables={"LIMIT": ("eval.limit", "7")})
    assert run.resolved.eval.limit == 7


def test_the_steps_are_those_of_the_schema() -> None:
    annotation = sweep_schema.Plan.model_fields["steps"].annotation
    assert get_args(get_args(annotation)[0]) == STEPS


@pytest.mark.parametrize("name", ["configs/sweep_example.yaml", "workflows/batch_example.yaml"])
def test_the_example_is_a_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan, places = sweep_file.read(Path(name))
    runs = sweep_plan.expand(Wanted(tuple(plan.data), tuple(plan.configs), DEFAULT_STEPS, (), plan, places))
    assert runs and all(Path(run.config).is_file() and Path(run.data).exists() for run in runs)


# --- drawing at random

RANGES = st.tuples(st.floats(1e-6, 0.9), st.floats(1e-6, 0.9)).filter(lambda pair: pair[0] < pair[1])


@given(RANGES, st.booleans(), st.integers(0, 99), st.integers(1, 12))
def test_draws_stay_in_their_range_and_more_of_them_move_none(
    pair: tuple[float, float], log: bool, seed: int, count: int
) -> None:
    def drawn(count: int, *others: str) -> list[float]:
        values = {
            "train.learning_rate": {"min": pair[0], "max": pair[1], "log": log},
            **{key: ["x", "y"] for key in others},
        }
        part = sweep_schema.RandomPart.model_validate({"count": count, "seed": seed, "values": values})
        return [choice.values[0][1] for choice in sweep_choices._drawn(part, {})]

    found = drawn(count)
    assert all(pair[0] <= value <= pair[1] for value in found)
    assert drawn(count + 5)[:count] == found == drawn(count, "train.scheduler")


@pytest.mark.parametrize(("key", "whole"), [("lora.r", True), ("train.batch_size", True), ("lora.dropout", False)])
def test_a_key_without_fractions_gets_whole_numbers(key: str, whole: bool) -> None:
    assert sweep_choices.takes_whole_numbers(key) is whole
    runs = runs_of(f"random: {{count: 6, {key}: {{min: 0.1, max: {'9' if whole else '0.9'}}}}}\n") if not whole else []
    assert all(isinstance(run.variant[key], float) for run in runs)
    if whole:
        drawn = [run.variant[key] for run in runs_of(f"random: {{count: 6, {key}: {{min: 1, max: 9}}}}\n")]
        assert all(isinstance(value, int) and 1 <= value <= 9 for value in drawn)


POSSIBLE = {"train.lr": ["1e-4", "1e-3"], "lora.r": ["4", "8", "16"], "train.epochs": ["1", "2e-1", "8"]}


@given(
    st.fixed_dictionaries({}, optional={k: st.lists(st.sampled_from(v), min_size=1, unique=True) for k, v in POSSIBLE.items()}),
    st.lists(st.integers(0, 3), max_size=2, unique=True),
    st.integers(0, 3),
)  # fmt: skip
def test_any_plan_expands_to_runs_with_names_of_their_own(
    grid: dict[str, list[str]], seeds: list[int], draws: int
) -> None:
    lines = [f"grid: {json.dumps(grid)}", f"seeds: {seeds}"]
    lines += [f"random: {{count: {draws}, lora.dropout: {{min: 0, max: 0.5}}}}"] if draws else []
    runs = runs_of("\n".join(lines))
    assert len(runs) == len({run.name for run in runs}) == len({run.fingerprint for run in runs})
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", run.name) for run in runs)
    assert runs == runs_of("\n".join(lines))


def test_a_plan_that_is_not_there_is_told_with_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.utils import yaml_text

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sweep.yaml").write_text("data: [a]\n")
    (tmp_path / ".hidden.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match="nope.yaml not found") as caught:
        yaml_text.load(Path("nope.yaml"))
    assert "configs/sweep.yaml" in caught.value.hint and "hidden" not in caught.value.hint
