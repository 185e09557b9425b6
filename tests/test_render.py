"""render: reads the newest stage, writes exactly what is trained on, loses no row in silence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import process, render, style
from scripts.utils import files, stages
from scripts.utils.chat import choose_template, render_prompt
from scripts.utils.config import load_config
from scripts.utils.encoding import encode_prompt
from scripts.utils.errors import UserError
from scripts.utils.rendered import to_examples, to_prompts
from tests.tiny_models import smollm2_tokenizer


def step(module: Any, *words: str, overrides: str = "") -> None:
    arguments = module.build_parser().parse_args(["--config", "tiny.yaml", *words])
    flags = {"style.text": getattr(arguments, "style", None)}
    module.work(arguments, load_config("tiny.yaml", overrides, flags))


def rows(split: str = "train") -> list[dict[str, Any]]:
    return list(files.read_jsonl(Path("data/rendered/sums") / f"{split}.jsonl"))


def test_render_writes_the_template_text_and_its_spans(project: Callable[..., Path]) -> None:
    project()
    step(process)
    step(render)
    row = rows()[0]
    assert row["text"].startswith("<|im_start|>system") and row["text"].endswith("<|im_end|>\n")
    assert [row["text"][a:b] for a, b in row["spans"]] == [row["reference"] + "<|im_end|>"]
    manifest = stages.read_manifest(Path("data/rendered/sums"))
    assert manifest is not None and manifest["rows_in"] == manifest["rows_out"] + manifest["rejected"] == 24
    assert manifest["tokens"]["trained"] == sum(r["trained_tokens"] for s in stages.SPLITS for r in rows(s))


def test_render_takes_the_styled_rows_once_they_are_there_and_says_so(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    project()
    step(process)
    step(render)
    assert "no style was asked for" in capsys.readouterr().err
    step(style, "--style", "Answer like a pirate: $HOME 'yes' \"no\" `x`")
    step(render)
    assert "the newest stage" in capsys.readouterr().err
    assert all("Answer like a pirate: $HOME 'yes' \"no\" `x`<|im_end|>" in row["text"] for row in rows())


def test_the_system_message_that_all_train_rows_have_is_known_from_then_on(project: Callable[..., Path]) -> None:
    """So that the model is asked as it was trained, also where the rows brought it along and no style did."""
    project()

    def known(*systems: str) -> str | None:
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        lines = [
            {
                "messages": [
                    *([{"role": "system", "content": system}] if system else []),
                    {**turns[0], "content": str(n)},
                    turns[1],
                ]
            }
            for n, system in enumerate(systems * 12)
        ]
        files.write_jsonl(Path("data/raw/sums.jsonl"), lines)
        step(process)
        step(render)
        manifest = stages.read_manifest(Path("data/rendered/sums"))
        assert manifest is not None
        return manifest["system"]

    assert known("Be brief.") == "Be brief."
    assert known("Be brief.", "Be long.") is None and known("Be brief.", "") is None and known("") is None
    step(style, "--style", "And kind.", "--style-mode", "append")
    step(render)
    manifest = stages.read_manifest(Path("data/rendered/sums"))
    assert manifest is not None and manifest["system"] == "And kind.", "the style's, where rows have none"


def test_render_is_up_to_date_until_an_input_or_setting_changes(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project()
    step(process)
    step(render)
    capsys.readouterr()
    step(render)
    assert "up to date" in capsys.readouterr().err
    step(render, overrides="render.train_on=all")
    assert "up to date" not in capsys.readouterr().err
    with (folder / "data/raw/sums.jsonl").open("a") as file:
        file.write(json.dumps({"question": "One more?", "answer": "Yes."}) + "\n")
    step(process)
    step(render, overrides="render.train_on=all")
    assert sum(len(rows(split)) for split in stages.SPLITS) == 25


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "completion", "all"])
def test_a_rows_ids_are_those_of_its_prompt_whatever_carries_loss(project: Callable[..., Path], train_on: str) -> None:
    folder, tokenizer = project(), smollm2_tokenizer()
    turns = ["How?", "So  1", "\n\nAnd?", " 2 ", "Then  ", "\n 3"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    messages[1]["train"] = False  # type: ignore[assignment]
    (folder / "data/raw/sums.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    step(process)
    step(render, overrides=f"render.train_on={train_on}")
    [row] = rows()
    [example], [prompt] = to_examples(tokenizer, [row]), to_prompts(tokenizer, [row])
    assert example.ids[: len(prompt)] == prompt
    awaited = render_prompt(choose_template(tokenizer, "auto"), tokenizer, messages[:-1])
    assert encode_prompt(tokenizer, awaited) == prompt
    assert "So  1" not in "".join(row["text"][a:b] for a, b in row["spans"])


def test_rows_that_are_too_long_are_counted_and_kept_aside_never_cut(project: Callable[..., Path]) -> None:
    folder = project()
    with (folder / "data/raw/sums.jsonl").open("a") as file:
        file.write(json.dumps({"question": "long?", "answer": "word " * 500}) + "\n")
    step(process)
    step(render)
    aside = list(files.read_jsonl(Path("data/rendered/sums/rejected.jsonl")))
    assert len(aside) == 1 and "longer than render.max_length" in aside[0]["reason"]
    assert aside[0]["messages"][-1]["content"] == "word " * 500
    with pytest.raises(UserError, match="longer than"):
        step(render, overrides="render.too_long=error")


def test_a_refusal_leaves_the_earlier_rows_as_they_were(project: Callable[..., Path]) -> None:
    project()
    step(process)
    step(render)
    before = rows()
    with pytest.raises(UserError, match="no train row is left"):
        step(render, overrides="render.max_length=8")
    assert rows() == before


def test_rows_that_the_vocabulary_cannot_express_are_named(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project()
    with (folder / "data/raw/sums.jsonl").open("a") as file:
        file.write(json.dumps({"question": "odd \x1d?", "answer": "Yes."}) + "\n")
    step(process)
    step(render)
    assert "cannot express" in capsys.readouterr().err


def test_render_without_processed_rows_says_what_to_run(project: Callable[..., Path]) -> None:
    project()
    with pytest.raises(UserError) as caught:
        step(render)
    assert "make process" in caught.value.hint
