"""Rows over render.max_length: what the config says is cut, an answer never, and every row is accounted for."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import process, render
from scripts.utils import files, rendering, stages
from scripts.utils.chat import TrainOn, choose_template
from scripts.utils.lengths import TooLong
from scripts.utils.rendered import encode_row
from scripts.utils.schema import RenderSection
from tests.test_chat import CALL, chat
from tests.test_render import rows, step
from tests.tiny_models import smollm2_tokenizer

SOURCE = {"file": "raw", "line": 1}


def fitted(
    messages: list[dict[str, Any]], too_long: str, limit: int, train_on: TrainOn = "assistant", template: str = "plain"
) -> tuple[list[dict[str, Any]], str]:
    settings = RenderSection.model_validate({"too_long": too_long, "max_length": limit, "train_on": train_on})
    row = {"id": "f00", "messages": messages, "source": SOURCE}
    return rendering.render_row(_template(template), smollm2_tokenizer(), row, settings)


@functools.cache
def _template(name: str) -> Any:
    return choose_template(smollm2_tokenizer(), name)


def trained(row: dict[str, Any]) -> str:
    tokenizer = smollm2_tokenizer()
    encoded = encode_row(tokenizer, row)
    assert len(encoded.ids) == row["tokens"]
    return str(tokenizer.decode([i for i, yes in zip(encoded.ids, encoded.trained, strict=True) if yes]))


def words(maker: random.Random, most: int) -> str:
    parts = ["word", " the", " a", " parcel", "\n", " 7", "é", " 日本", ", ", "  ", "<|im_end|>"]
    return "w" + "".join(maker.choices(parts, k=maker.randint(0, most)))


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_the_trained_tokens_are_the_whole_answer_and_its_end_token_or_the_row_is_left_out(count: int) -> None:
    maker = random.Random(count)
    seen = {"whole": 0, "cut": 0, "out": 0}
    for _ in range(count):
        question, answer, limit = words(maker, 60), words(maker, 40), maker.randint(8, 100)
        policy = maker.choice(["drop", "truncate_start", "truncate_end", "split_turns", "error"])
        try:
            [row], how = fitted(chat(question, answer), policy, limit)
        except TooLong as problem:
            assert problem.message.startswith("longer than render.max_length")
            seen["out"] += 1
            continue
        assert trained(row) == f"{answer}<|im_end|>" and row["tokens"] <= limit
        asked = row["text"][len("### User:\n") : row["text"].rindex(f"\n\n### Assistant:\n{answer}")]
        if how:
            assert policy.startswith("truncate") and 0 < len(asked) < len(question)
            assert question.endswith(asked) if policy == "truncate_start" else question.startswith(asked)
        else:
            assert asked == question
        seen["cut" if how else "whole"] += 1
    assert min(seen.values()) > count / 20, seen


TALK = chat("one " * 20, "first", "two " * 20, "second", "three " * 20, "third", system="rules")


def test_truncate_start_takes_whole_old_turns_and_keeps_the_system_message() -> None:
    [row], how = fitted(TALK, "truncate_start", 100)
    assert how == "cut" and row["text"].startswith("rules\n\n### User:\ntwo two")
    assert trained(row) == "second<|im_end|>third<|im_end|>"
    [row], _ = fitted(TALK, "truncate_start", 30)
    assert row["text"].startswith("rules\n\n### User:\n") and "two" not in row["text"] and "three three" in row["text"]
    assert trained(row) == "third<|im_end|>" and row["tokens"] == 30


def test_truncate_end_cuts_the_last_question_and_nothing_else() -> None:
    whole = fitted(TALK, "error", 2048)[0][0]
    [row], how = fitted(TALK, "truncate_end", whole["tokens"] - 15)
    assert how == "cut" and row["text"].count("three") == 5 and row["text"].count("two") == 20
    assert trained(row) == "first<|im_end|>second<|im_end|>third<|im_end|>"
    with pytest.raises(TooLong, match="without the end of its last question too"):
        fitted(TALK, "truncate_end", 60)


def test_an_answer_that_does_not_fit_is_left_out_under_every_policy() -> None:
    for policy in ("drop", "truncate_start", "truncate_end", "split_turns", "error"):
        with pytest.raises(TooLong):
            fitted(chat("question", "word " * 50), policy, 40)


@pytest.mark.parametrize("limit", range(40, 101, 6))
def test_split_turns_trains_each_answer_once_in_rows_that_fit(limit: int) -> None:
    made, how = fitted(TALK, "split_turns", limit)
    assert how == "split" and "".join(map(trained, made)) == "first<|im_end|>second<|im_end|>third<|im_end|>"
    assert all(row["tokens"] <= limit and row["text"].startswith("rules\n\n") for row in made)
    assert [row["id"] for row in made] == [f"f00-{number}" for number in range(1, len(made) + 1)]


def test_the_parts_of_a_split_row_learn_what_the_whole_would_have_learnt() -> None:
    def learnt(messages: list[dict[str, Any]], train_on: TrainOn) -> list[str]:
        return [trained(row) for row in fitted(messages, "split_turns", 48, train_on)[0]]

    assert learnt(TALK, "last_assistant") == ["third<|im_end|>"]
    assert learnt(TALK, "completion") == ["third<|im_end|>"]
    flagged = [{**message, "train": False} if message["content"] == "second" else message for message in TALK]
    assert learnt(flagged, "assistant") == ["first<|im_end|>", "third<|im_end|>"]
    assert len(learnt(TALK, "all")) == 3 and all("rules" in text for text in learnt(TALK, "all")[1:])


def test_a_tool_call_stays_with_its_result_and_answer() -> None:
    call = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "sunny"}]
    messages = [*chat("word " * 60, "first", "Rain? " * 5), *call, {"role": "assistant", "content": "No."}]
    for policy in ("truncate_start", "split_turns"):
        last = fitted(messages, policy, 110, template="chatml")[0][-1]
        assert "first" not in last["text"] and last["text"].count("Rain?") == 5
        assert trained(last).startswith("<tool_call>") and trained(last).endswith("</tool_call><|im_end|>No.<|im_end|>")


def test_the_last_exchange_without_loss_is_not_kept_alone() -> None:
    messages = [*TALK[:-1], {**TALK[-1], "train": False}]
    with pytest.raises(TooLong, match="carries no loss"):
        fitted(messages, "truncate_start", 60)


@pytest.mark.parametrize("policy", ["drop", "truncate_start", "truncate_end", "split_turns"])
def test_the_manifest_and_the_summary_count_what_was_done(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    folder = project()
    long = [
        {"messages": chat("word " * 200, "Yes.")},
        {"messages": chat("word " * 50, "Yes.", "word " * 80, "No.")},
        {"messages": chat("q", "word " * 200)},
    ]
    with (folder / "data/raw/sums.jsonl").open("w") as file:
        file.writelines(json.dumps({"messages": chat(f"{n}?", f"{n}!")}) + "\n" for n in range(40))
        file.writelines(json.dumps(row) + "\n" for row in long)
    step(process)
    capsys.readouterr()
    step(render, overrides=f"render.too_long={policy}")
    said = "".join(capsys.readouterr())
    manifest = stages.read_manifest(Path("data/rendered/sums"))
    assert manifest is not None
    expected = {
        "drop": {"cut": 0, "split": 0, "parts": 0, "left_out": 3},
        "truncate_start": {"cut": 2, "split": 0, "parts": 0, "left_out": 1},
        "truncate_end": {"cut": 2, "split": 0, "parts": 0, "left_out": 1},
        "split_turns": {"cut": 0, "split": 1, "parts": 2, "left_out": 2},
    }[policy]
    assert manifest["too_long"] == expected
    made = sum(len(rows(split)) for split in stages.SPLITS)
    assert manifest["rows_in"] == 43 and made == manifest["rows_out"]
    assert made == 43 - expected["left_out"] - expected["split"] + expected["parts"]
    assert len(list(files.read_jsonl(Path("data/rendered/sums/rejected.jsonl")))) == expected["left_out"]
    assert "of the rows are too long and left out" in said
    assert ("rows with their prompt cut, each answer whole" in said) == bool(expected["cut"])
    assert ("1 rows split into 2" in said) == bool(expected["split"])


def test_one_long_row_in_a_hundred_is_no_warning(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project(rows=99)
    with (folder / "data/raw/sums.jsonl").open("a") as file:
        file.write(json.dumps({"question": "long?", "answer": "word " * 500}) + "\n")
    step(process)
    step(render)
    said = "".join(capsys.readouterr())
    assert "too long" not in said and "1 left out (see rejected.jsonl)" in said
