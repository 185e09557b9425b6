"""What infer promises: the model asked for, one answer a prompt, and prompts as in training."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import infer
from scripts.utils import encoding, files, prompts, stages, stamp, trained
from scripts.utils.errors import UserError
from tests.tiny_models import CHATS, RUN, SYSTEM, enter_run

pytestmark = pytest.mark.slow  # each test runs a whole step of its own

QUESTION, ANSWER = CHATS[2]  # a question of two lines


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter_run(tmp_path, monkeypatch)


def ask(*flags: str) -> int:
    return infer.main(["--config", "c.yaml", *flags])


def predictions(path: str = f"outputs/{RUN}/predictions.jsonl") -> list[dict[str, Any]]:
    return list(files.read_jsonl(Path(path)))


# --- one prompt


def test_a_prompt_with_a_line_break_is_one_prompt_and_only_its_answer_is_on_stdout(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "\n" in QUESTION
    assert ask("--prompt", QUESTION) == 0
    captured = capsys.readouterr()
    assert captured.out == ANSWER + "\n"
    assert f"adapters/{RUN}" in captured.err


def test_stdin_is_one_prompt_too(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(QUESTION.encode() + b"\n")))
    assert ask("--prompt", "-") == 0
    assert capsys.readouterr().out == ANSWER + "\n"


def test_which_chooses_the_base_model_and_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("--which", "base", "--prompt", QUESTION) == 0
    captured = capsys.readouterr()
    assert captured.out not in ("", ANSWER + "\n")
    assert "base model" in captured.err


def test_a_missing_adapter_is_an_error_naming_its_path_never_the_base_model(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(f"adapters/{RUN}")
    assert ask("--prompt", QUESTION) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(Path(f"adapters/{RUN}").absolute()) in captured.err


def test_a_missing_merged_model_is_an_error_that_says_how_to_make_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("--which", "merged", "--prompt", "hi") == 2
    assert f"make merge RUN={RUN}" in capsys.readouterr().err


def test_temperature_zero_from_flag_beats_the_configs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for seed in ("1", "2"):
        assert ask("--set", "infer.temperature=50", "--temperature", "0", "--seed", seed, "--prompt", QUESTION) == 0
        answers.append(capsys.readouterr().out)
    assert answers == [ANSWER + "\n"] * 2
    assert ask("--temperature", "50", "--prompt", QUESTION) == 0
    assert capsys.readouterr().out != ANSWER + "\n"


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("--stop", "no such", "--stop", '", "par', "--prompt", QUESTION) == 0
    captured = capsys.readouterr()
    assert captured.out == ANSWER.partition('", "par')[0] + "\n"
    assert "cut" not in captured.err


def test_a_control_token_can_be_stopped_at(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It never stands in the text of an answer, so it is found by its id."""
    trained_run = trained.load_trained(RUN)
    assert trained_run.stop_ids == [2]
    from scripts.infer import build_parser, load

    arguments = build_parser().parse_args(["--config", "c.yaml"])
    assert load(arguments, RUN, ["<|im_start|>", "plain"]).stop_ids == [1, 2]


def test_an_answer_cut_at_the_limit_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("--max-new-tokens", "3", "--prompt", QUESTION) == 0
    assert "cut at 3 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "a", "--input", "b"], "--prompt and --input"),
        (["--input", ""], "no input file"),
        (["--input", "gone.jsonl"], "gone.jsonl"),
        (["--model", "x", "--which", "base", "--prompt", "a"], "--model is a model without a run"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature is -1"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature is nan"),
        (["--prompt", "a", "--top-p", "0"], "--top-p is 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompt", "a", "--chat"], "--prompt and --chat"),
        (["--prompt", "a", "--output", "b"], "--output would do nothing without --input"),
        (["--prompt", "a", "--num-samples", "2", "--limit", "3"], "--limit and --num-samples would do nothing"),
        (["--input", "gone.jsonl", "--num-samples", "2"], "would all be the same"),
        (["--input", "gone.jsonl", "--num-samples", "0"], "--num-samples is 0"),
        (["--prompt", "a", "--stop", ""], "--stop is ''"),
        (["--prompt", "a", "--json-schema", "gone.json"], "gone.json cannot be read"),
        (["--prompt", "word " * 300], "limit is 256"),
        ([], "no terminal"),
    ],
)
def test_wrong_arguments_are_one_message_and_exit_2(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert ask(*flags) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""


# --- the system message and the renderer


def test_the_system_message_of_training_is_used_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter_run(tmp_path, monkeypatch, style=True)
    assert ask("--prompt", QUESTION) == 0
    captured = capsys.readouterr()
    assert captured.out == ANSWER + "\n"
    assert f"as in training: {SYSTEM}" in captured.err
    assert ask("--system", "", "--prompt", QUESTION) == 0
    assert "no system message" in capsys.readouterr().err


def test_the_system_message_of_all_rows_is_used_before_the_styles(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = stamp.require(RUN)
    stamp.write(RUN, {**facts, "system": "Of every row.", "style": {"text": "Of the style.", "mode": "append"}})
    assert ask("--prompt", QUESTION) == 0
    assert "as in training: Of every row." in capsys.readouterr().err
    assert stamp.system_of({"system": None, "style": {"text": "Of the style."}}) == "Of the style."
    assert stamp.system_of({"style": None}) is None


def test_inference_sends_the_ids_that_training_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batch prompts made from the trained rows: the ids handed to the model equal the trained ids up to the answer."""
    enter_run(tmp_path, monkeypatch, style=True)
    rows = list(files.read_jsonl(stages.folder("render", "demo") / "train.jsonl"))
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": question}) + "\n" for question, _ in CHATS))
    sent: list[list[int]] = []
    from scripts.utils import generation

    real = generation.generate
    monkeypatch.setattr(generation, "generate", lambda m, t, ids, **k: sent.extend(ids) or real(m, t, ids, **k))
    assert ask("--input", "p.jsonl") == 0
    tokenizer = trained.load_trained(RUN, which="base").tokenizer
    trained_on = [encoding.encode(tokenizer, row["text"], row["spans"]) for row in rows]
    assert sorted(sent) == sorted(seen.ids[: seen.trained.index(True)] for seen in trained_on)


def test_a_chat_with_its_own_system_message_keeps_it() -> None:
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}]
    assert prompts.with_system(own, SYSTEM) == own
    assert prompts.with_system(own, SYSTEM, replace=True)[0]["content"] == SYSTEM
    assert prompts.with_system(own[1:], SYSTEM) == [{"role": "system", "content": SYSTEM}, own[1]]


# --- files of prompts


def test_n_prompts_give_n_answers_in_their_order_with_their_ids(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": QUESTION, "id": "two lines"},
        {"user": CHATS[0][0]},
        {"messages": [{"role": "user", "content": CHATS[4][0]}], "id": 7},
        {"prompt": QUESTION},
    ]
    Path("p.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert ask("--input", "p.jsonl") == 0
    found = predictions()
    assert [row["id"] for row in found] == ["two lines", 2, 7, 4]
    assert [row["answer"] for row in found] == [ANSWER, CHATS[0][1], CHATS[4][1], ANSWER]
    assert [row["line"] for row in found] == [1, 3, 5, 7]
    assert all(row["finished"] for row in found)
    assert "4 answers" in capsys.readouterr().out


def test_three_text_lines_give_three_answers_whatever_characters_they_hold(run: Path) -> None:
    """Only a line feed ends a line: U+2028, form feed and the like stand inside a prompt."""
    Path("p.txt").write_text("hello\u2028there\x0b\x0cyou\x85\r\n\n  \nthanks\nlast", encoding="utf-8")
    assert ask("--input", "p.txt", "--output", "out/a.jsonl") == 0
    found = predictions("out/a.jsonl")
    assert [row["messages"][-1]["content"] for row in found] == ["hello\u2028there\x0b\x0cyou\x85", "thanks", "last"]
    assert found[1]["answer"] == CHATS[4][1]


def test_a_whole_file_is_one_prompt(run: Path) -> None:
    Path("p.txt").write_text(QUESTION + "\n")
    assert ask("--input", "p.txt", "--whole-file") == 0
    (row,) = predictions()
    assert row["answer"] == ANSWER


def test_limit_takes_the_first_prompts(run: Path) -> None:
    Path("p.txt").write_text("thanks\nhello\nthanks\n")
    assert ask("--input", "p.txt", "--limit", "2") == 0
    assert [row["answer"] for row in predictions()] == [CHATS[4][1], CHATS[3][1]]


def test_training_rows_are_asked_without_their_answer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}
    Path("p.jsonl").write_text(json.dumps(row) + "\n")
    assert ask("--input", "p.jsonl") == 0
    (found,) = predictions()
    assert found["answer"] == found["reference"] == ANSWER
    assert "not shown to the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "not valid JSON"),
        ('{"text": "hi"}', 'no "messages", "prompt" or "user"'),
        ('{"prompt": ""}', '"prompt" is empty'),
        ('{"prompt": 5}', '"prompt" is empty or no text'),
        ('["hi"]', ""),
        ('{"messages": []}', "empty or no list"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "message 1"),
        ('{"messages": [{"role": "user"}]}', 'no text in "content"'),
        ('{"messages": [{"role": "system", "content": "x"}]}', "must end with a user"),
    ],
)
def test_a_broken_line_is_named_before_any_answer(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"p\.jsonl:2") as caught:
        prompts.read(path)
    assert said in caught.value.message


def test_broken_input_leaves_no_output_behind(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.jsonl").write_text('{"prompt": "fine"}\n{"prompt"\n')
    assert ask("--input", "p.jsonl") == 2
    assert "p.jsonl:2" in capsys.readouterr().err
    assert not Path(f"outputs/{RUN}/predictions.jsonl").exists()
    Path("p.jsonl").write_text('{"prompt": "fine"}\n')
    assert ask("--input", "p.jsonl", "--output", "p.jsonl") == 2
    assert "input file itself" in capsys.readouterr().err


def test_bytes_that_are_not_utf8_and_unknown_kinds_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"fine\nfa\xe7ade\n")
    with pytest.raises(UserError, match=r"p\.txt:2"):
        prompts.read(tmp_path / "p.txt")
    (tmp_path / "p.docx").write_bytes(b"x")
    with pytest.raises(UserError, match="docx"):
        prompts.read(tmp_path / "p.docx")
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no prompts"):
        prompts.read(tmp_path / "p.jsonl")
