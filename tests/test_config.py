"""The config: closed, typed, merged in a stated order, and every key of it is read by something."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scripts.utils import schema, yaml_text
from scripts.utils.config import data_name, load_config, run_name, to_yaml
from scripts.utils.errors import UserError
from scripts.utils.files import REPO_ROOT


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(path: Path, overrides: str = "") -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("train:\n  learning_rat: 1\n", "train.learning_rate"),
        ("train:\n  lora_r: 1\n", "lora.r"),
        ("lora:\n  rnk: 1\n", "lora.r"),
        ("train:\n  batch_sise: 1\n", "batch_size"),
        ("trian:\n  epochs: 1\n", "section 'train'"),
    ],
)
def test_unknown_key_is_named_with_its_line_and_the_nearest_known_key(tmp_path: Path, text: str, nearest: str) -> None:
    message = refusal(write(tmp_path, text))
    assert "unknown key" in message and nearest in message
    if text.startswith(("train", "lora")):
        assert "run.yaml:2:" in message


def test_values_are_read_by_the_type_of_their_key(tmp_path: Path) -> None:
    text = "train:\n  lr: 1e-4\n  evaluation_strategy: no\n  save_strategy: no\n  packing: off\ndata:\n  name: 007\nstyle:\n  text: no\n"
    config = load_config(write(tmp_path, text))
    assert config.train.learning_rate == 1e-4
    assert config.train.eval_strategy == config.train.save_strategy == "no"
    assert config.train.packing is False
    assert config.data.name == "007"
    assert config.style.text == "no"


def test_false_from_json_means_the_strategy_no() -> None:
    assert schema.TrainSection(eval_strategy=False).eval_strategy == "no"  # type: ignore[arg-type]


def test_null_is_nothing_but_a_quoted_null_is_text(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "style:\n  text: null\n")).style.text is None
    assert load_config(write(tmp_path, "style:\n  text: 'null'\n")).style.text == "null"


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "train:\n  epochs: many\n  batch_size: 0\nlora:\n  r: -1\n"))
    assert all(key in message for key in ("train.epochs", "train.batch_size", "lora.r"))


def test_include_is_merged_depth_first_and_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", "lora:\n  r: 4\n  alpha: 4\n", "a.yaml")
    write(tmp_path / "deep", "include: a.yaml\nlora:\n  alpha: 8\n", "b.yaml")
    config = load_config(write(tmp_path, "include: deep/b.yaml\nlora:\n  dropout: 0.5\n"))
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (4, 8, 0.5)


def test_include_of_itself_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "include: run.yaml\n", "other.yaml")
    assert "includes itself" in refusal(write(tmp_path, "include: other.yaml\n"))


def test_set_wins_over_the_file_and_flags_win_over_set(tmp_path: Path) -> None:
    path = write(tmp_path, "lora:\n  r: 4\nrun:\n  name: file\n")
    config = load_config(
        path, "lora.rank=8 run.name=set style.text='a: b # $HOME'", {"run.name": "flag", "data.raw": None}
    )
    assert (config.lora.r, config.run.name, config.style.text) == (8, "flag", "a: b # $HOME")


def test_set_takes_lists_and_null(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "style:\n  text: x\n"), "lora.target_modules=[q_proj,v_proj] style.text=null")
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.style.text is None
    spaced = load_config(write(tmp_path, ""), "data.raw=[a b.csv, 'c.csv'] lora.r=4 style.text='{a: b}'")
    assert (spaced.data.raw, spaced.lora.r, spaced.style.text) == (["a b.csv", "c.csv"], 4, "{a: b}")


@pytest.mark.parametrize(
    "overrides", ["lora.r", "r=4", "a.b.c=1", "lora.r='4", "data.raw=[a, b", "data.columns={user: a"]
)
def test_a_set_that_is_not_an_override_is_refused(tmp_path: Path, overrides: str) -> None:
    assert "SET" in refusal(write(tmp_path, ""), overrides)


def test_column_names_are_read_from_the_file_and_from_set(tmp_path: Path) -> None:
    path = write(tmp_path, "data:\n  columns:\n    user: no\n    assistant: 1e3\n")
    assert load_config(path).data.columns == {"user": "no", "assistant": "1e3"}
    overrides = "data.columns={user: Frage, assistant: Meine Antwort} lora.r=4"
    config = load_config(path, overrides)
    assert (config.data.columns, config.lora.r) == ({"user": "Frage", "assistant": "Meine Antwort"}, 4)
    assert load_config(path, "data.columns={}").data.columns == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data.columns={usr: a}", "data.columns is 'usr', expected 'user', 'assistant'"),
        ("data.columns=Frage", "data.columns is 'Frage', expected a valid dictionary"),
        ("data.columns={messages: a, user: b}", "a row has the one or the others"),
        ("data.columns={user: a, assistant: A}", "one column two meanings"),
        ("data.format=alpaca data.columns={user: a}", "names user, which rows of data.format alpaca do not have"),
        ("data.format=messages data.columns={user: a}", "names user, which rows of data.format messages"),
        ("data.format=pairs data.columns={messages: a}", "names messages, which rows of data.format pairs"),
    ],
)
def test_column_names_that_cannot_be_meant_are_refused(tmp_path: Path, overrides: str, message: str) -> None:
    assert message in refusal(write(tmp_path, ""), overrides)


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00")))
def test_any_text_survives_set(text: str) -> None:
    import shlex

    config = load_config(REPO_ROOT / "configs/base.yaml", f"style.text={shlex.quote('x' + text)}")
    assert config.style.text == "x" + text


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: 1\na: 2\n", "twice"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n- 2\n", "mapping"),
        ("train: 5\n", "section"),
        ("a: 1\n\tb: 2\n", "not valid YAML"),
    ],
)
def test_odd_yaml_is_refused_with_its_reason(tmp_path: Path, text: str, word: str) -> None:
    assert word in refusal(write(tmp_path, text))


def test_an_alias_bomb_is_refused_before_it_expands() -> None:
    bomb = "a: &a [x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20)
    )
    with pytest.raises(UserError, match="aliases"):
        yaml_text.parse(bomb, "bomb.yaml")


def test_a_missing_config_names_the_path_and_the_configs_there_are(tmp_path: Path) -> None:
    write(tmp_path, "", "real.yaml")
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "none.yaml")
    assert str(tmp_path / "none.yaml") in caught.value.message and "real.yaml" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("train: {eval_strategy: steps}", "load_best_model_at_end"),
        ("train: {eval_strategy: steps, save_strategy: steps, eval_steps: 30, save_steps: 100}", "multiple"),
        ("train: {early_stopping_patience: 2, load_best_model_at_end: false}", "early_stopping_patience"),
        ("train: {load_best_model_at_end: true, save_strategy: no, eval_strategy: no}", "load_best_model_at_end"),
        ("{data: {val_fraction: 0}, train: {load_best_model_at_end: true}}", "val_fraction: 0.1"),
        ("{data: {val_fraction: 0}, train: {early_stopping_patience: 2}}", "val_fraction: 0.1"),
        ("{tuning: {mode: full, init_adapter: a}}", "init_adapter"),
        ("data: {val_fraction: 0.6, test_fraction: 0.5}", "leave no rows"),
        ("train: {precision: bf16, bf16: false}", "precision"),
    ],
)
def test_values_that_do_not_go_together_are_refused_with_the_fix(tmp_path: Path, text: str, word: str) -> None:
    assert word in refusal(write(tmp_path, text))


def test_base_yaml_shows_every_key_with_its_default() -> None:
    shown, _ = yaml_text.load(REPO_ROOT / "configs/base.yaml")
    expected = schema.Config().model_dump()
    assert {s: set(keys) for s, keys in shown.items()} == {s: set(keys) for s, keys in expected.items()}
    assert load_config(REPO_ROOT / "configs/base.yaml").model_dump() == expected


def test_every_key_in_base_yaml_has_a_comment_or_speaks_for_itself() -> None:
    lines = (REPO_ROOT / "configs/base.yaml").read_text().splitlines()
    assert sum("#" in line for line in lines) > 30


@pytest.mark.parametrize("path", sorted((REPO_ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    if "sweep" not in path.name:
        load_config(path)


def test_both_backends_configs_hold_the_same_keys_in_the_same_order() -> None:
    shapes = []
    for name in ("run_bnb.yaml", "run_unsloth.yaml"):
        values, _ = yaml_text.load(REPO_ROOT / "configs" / name)
        shapes.append([(section, list(keys) if isinstance(keys, dict) else keys) for section, keys in values.items()])
    assert shapes[0] == shapes[1]


def test_the_saved_copy_loads_to_the_same_config(tmp_path: Path) -> None:
    config = load_config(
        REPO_ROOT / "configs/run_unsloth.yaml",
        "style.text='a\n b: \"c\"' train.eval_strategy=no train.save_strategy=no",
    )
    assert load_config(write(tmp_path, to_yaml(config), "copy.yaml")) == config
    assert yaml.safe_load(to_yaml(config))["train"]["eval_strategy"] == "no"


def test_every_config_key_is_read_by_a_script() -> None:
    """A key that nothing reads only looks honoured: each must stand as `<section>.<key>` in the code."""
    read: set[str] = set()
    words: set[str] = set()
    own = {"schema.py", "config.py"}
    takes_infer = {"infer.py", "answering.py", "speaking.py", "chat_session.py", "served.py"}
    for path in [p for p in (REPO_ROOT / "scripts").rglob("*.py") if p.name not in own] + [
        REPO_ROOT / "scripts/utils/config.py"
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                parent = node.value
                owner = (
                    parent.attr
                    if isinstance(parent, ast.Attribute)
                    else parent.id
                    if isinstance(parent, ast.Name)
                    else ""
                )
                # infer.py takes its whole section over, changed by its flags, as `settings`
                owner = "infer" if owner == "settings" and path.name in takes_infer else owner
                read.add(f"{owner}.{node.attr}")
            if path.name == "train.py" and isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.update(node.value.split())
    keys = [f"{s}.{k}" for s, f in schema.Config.model_fields.items() for k in f.annotation.model_fields]  # type: ignore[union-attr]
    by_name = {"train.bf16", "train.fp16"}  # in hardware.choose_precision
    assert [key for key in keys if key not in read and key not in by_name] == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a" * 200, "x y", "a\n", "..", "a..b", "-x", "ü"])
def test_hostile_run_and_data_names_are_refused(name: str) -> None:
    from scripts.utils.files import check_name

    with pytest.raises(UserError):
        check_name(name, "run name")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("data/raw", "raw"),
        ("data/sample/", "sample"),
        ("x/Frage & Antwort.v2.csv", "Frage---Antwort"),
        (["a.json", "b.csv"], "a+b"),
        ("../..", "data"),
        ("data/raw/*.jsonl", "raw-jsonl"),
        ("*", "data"),
        ([{"raw": "x/a.jsonl.gz"}, {"raw": ["b.csv", "c.csv"]}], "a+b+c"),
        ("logs/2026-??/[ab]*.csv.gz", "2026-ab-csv-gz"),
    ],
)
def test_data_names_are_made_safe_from_file_names(raw: Any, expected: str) -> None:
    key = "sources" if isinstance(raw[0], dict) else "raw"
    config = schema.Config.model_validate({"data": {key: raw}})
    assert data_name(config) == expected


def test_the_run_name_tells_config_and_data(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, json.dumps({"data": {"raw": "data/raw/faq.csv"}})))
    assert run_name(config, "configs/quickstart.yaml") == "quickstart-faq"
