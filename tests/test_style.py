"""style: any character survives, the processed rows stay as they are, and the right text wins."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts import process, style
from scripts.utils import environment, stages
from scripts.utils.errors import UserError

REPO = Path(__file__).resolve().parents[1]
NASTY = 'It\'s "quoted" $HOME `id` $(id) \\n\n second line \U0001f600 %s {x} <|im_end|> # : -'
Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A folder with processed rows, one of two with a system message; calls style and returns its exit code."""
    for name in ("CONFIG", "RAW", "SET", "FORCE", "STYLE", "STYLE_MODE", "CLEAR"):
        monkeypatch.delenv(f"SFT_{name}", raising=False)
    monkeypatch.setattr(environment, "prepare", lambda root: None)  # see test_process
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("data: {name: set, raw: rows.jsonl}\n")
    write_rows(20)
    return lambda *flags: style.main(["--config", "run.yaml", *flags])


def write_rows(count: int) -> None:
    rows = [{"question": f"q{n}", "answer": "a", "system": "was here" if n % 2 else ""} for n in range(count)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert process.main(["--config", "run.yaml"]) == 0


def read(folder: str) -> list[dict]:
    return [
        json.loads(line)
        for split in stages.SPLITS
        for line in Path(folder, "set", f"{split}.jsonl").read_text().splitlines()
    ]


def systems() -> set[str | None]:
    firsts = [row["messages"][0] for row in read("data/processed_with_style")]
    return {first["content"] if first["role"] == "system" else None for first in firsts}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("replace", {"S"}),
        ("prepend", {"S", "S\n\nwas here"}),
        ("append", {"S", "was here\n\nS"}),
        ("only-if-missing", {"S", "was here"}),
    ],
)
def test_modes_meet_a_system_message_that_is_there(run, mode, expected):
    before = {path: path.read_bytes() for path in Path("data/processed/set").iterdir()}
    assert run("--style", "S", "--style-mode", mode) == 0
    assert systems() == expected
    assert {path: path.read_bytes() for path in Path("data/processed/set").iterdir()} == before
    plain, styled = read("data/processed"), read("data/processed_with_style")
    assert [(row["id"], row["source"]) for row in plain] == [(row["id"], row["source"]) for row in styled]
    spoken = [[m for m in row["messages"] if m["role"] != "system"] for row in styled]
    assert spoken == [[m for m in row["messages"] if m["role"] != "system"] for row in plain]
    assert stages.newest_source("set").path == Path("data/processed_with_style/set")


def test_any_character_survives_from_the_environment_to_the_rows(run):
    environ = {**os.environ, "SFT_STYLE": NASTY, "SFT_CONFIG": "run.yaml"}
    command = [sys.executable, REPO / "scripts/style.py"]
    done = subprocess.run(command, check=False, env=environ, capture_output=True, text=True)
    assert (done.returncode, systems()) == (0, {NASTY}), done.stderr
    assert stages.newest_source("set").manifest["settings"]["origin"] == "STYLE"


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), mode=st.sampled_from(["prepend", "append", "replace", "only-if-missing"]))  # fmt: skip
def test_any_text_stands_whole_in_a_row_without_system_message(text, mode):
    user = {"role": "user", "content": "q"}
    asked = style.Style(text, mode, "STYLE")
    assert style.with_style([user], asked) == ([{"role": "system", "content": text}, user], "added")
    # an empty system message counts as none
    assert style.with_style([{"role": "system", "content": " "}, user], asked)[0] == [
        {"role": "system", "content": text},
        user,
    ]
    messages, change = style.with_style([{"role": "system", "content": "old"}, user], asked)
    assert (text in messages[0]["content"]) == (change == "changed") or text in "old"


def test_a_style_given_once_stays_in_force_when_rows_change(run, capsys):
    assert run("--style", "sticky", "--style-mode", "append") == 0
    write_rows(30)
    with pytest.raises(UserError, match="run: make style"):
        stages.newest_source("set")
    Path("run.yaml").write_text("data: {name: set, raw: rows.jsonl}\nstyle: {text: from config, mode: replace}\n")
    capsys.readouterr()
    assert run() == 0
    assert len(read("data/processed_with_style")) == 30
    assert systems() == {"sticky", "was here\n\nsticky"}
    shown = capsys.readouterr()
    assert (
        "the STYLE given earlier is still in force" in shown.err and "goes before the config's style.text" in shown.err
    )
    assert run("--style-mode", "prepend") == 0
    assert systems() == {"sticky", "sticky\n\nwas here"}


def test_the_configs_style_is_used_and_goes_when_it_is_taken_out(run, capsys):
    assert run("--set", "style.text=configured") == 0
    assert systems() == {"configured"}
    assert stages.newest_source("set").manifest["settings"]["origin"] == "config"
    assert run("--set", "style.text=other") == 0
    assert systems() == {"other"}
    assert run() == 0
    assert "none asked for; render reads data/processed/set" in capsys.readouterr().out
    assert not Path("data/processed_with_style/set").exists()
    assert stages.newest_source("set").path == Path("data/processed/set")


def test_clear_ends_a_style(run, capsys):
    assert run("--style", "S") == 0
    assert run("--clear") == 0
    assert not Path("data/processed_with_style/set").exists()
    assert run("--clear") == 0
    assert "nothing to remove" in capsys.readouterr().out
    assert run("--clear", "--style", "S") == 2


def test_a_second_run_is_up_to_date_and_changes_are_seen(run, capsys):
    assert run("--style", "S") == 0
    for flags, expected in [(("--style", "S"), True), ((), True), (("--style", "T"), False), (("--force",), False)]:
        capsys.readouterr()
        assert run(*flags) == 0
        assert ("up to date" in capsys.readouterr().out) == expected, flags
    assert systems() == {"T"}
    Path("data/processed_with_style/set/train.jsonl").write_text("")
    assert run() == 0
    assert len(read("data/processed_with_style")) == 20


def test_wrong_calls_are_one_clear_error_and_change_nothing(run, capsys):
    assert run("--style", " \n") == 2
    assert "STYLE is empty" in capsys.readouterr().err
    assert run("--style", "S", "--style-mode", "above") == 2
    assert "prepend" in capsys.readouterr().err
    assert run("--style", "\udce9") == 2
    assert "not UTF-8" in capsys.readouterr().err
    assert not Path("data/processed_with_style").exists()
    Path("data/processed/set/val.jsonl").write_text("x")
    assert run("--style", "S") == 3
    assert "make process FORCE=1" in capsys.readouterr().err
    Path("data/processed/set/manifest.json").unlink()
    assert run("--style", "S") == 2
    assert "no processed rows" in capsys.readouterr().err
