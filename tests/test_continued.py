"""Texts to continue: no template, loss on every token and the end token, long ones cut in parts that lose nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import inspect_row, process, render, style
from scripts.utils import continued, evaluation, stages
from scripts.utils.errors import UserError
from scripts.utils.rendered import encode_row, to_prompts
from tests.test_chat import expressible
from tests.test_render import rows, step
from tests.tiny_models import smollm2_tokenizer

END = "<|im_end|>"


def parts_of(text: str, limit: int) -> list[dict[str, Any]]:
    tokenizer = smollm2_tokenizer()
    return continued.render_texts(tokenizer, text, limit, lambda row: len(encode_row(tokenizer, row).ids))


LETTERS = st.characters(exclude_categories=("Cs",)).filter(expressible)


@given(
    words=st.lists(st.text(LETTERS, max_size=12) | st.sampled_from(["\n\n", "\n", END, "<|im_start|>"]), max_size=40),
    limit=st.integers(16, 64),
)
@settings(max_examples=150)
def test_the_parts_fit_and_joined_are_the_text_with_one_end_token(words: list[str], limit: int) -> None:
    text, tokenizer = " ".join(words) + "x", smollm2_tokenizer()
    made = parts_of(text, limit)
    assert "".join(row["text"] for row in made) == text + END
    for number, row in enumerate(made):
        encoded = encode_row(tokenizer, row)
        assert len(encoded.ids) <= limit
        assert all(encoded.trained)
        # look-alikes in the text are letters: the one end token is ours
        assert encoded.ids.count(tokenizer.eos_token_id) == (number == len(made) - 1)


def test_a_part_ends_at_a_paragraph_where_there_is_one() -> None:
    text = "word " * 20 + "\n\n" + "other " * 12
    assert parts_of(text, 30)[0]["text"] == "word " * 20 + "\n\n"


def test_a_limit_below_one_letter_is_an_error() -> None:
    with pytest.raises(UserError):
        parts_of("x", 1)


@pytest.fixture
def texts(project: Callable[..., Path]) -> Path:
    folder = project()
    raw = next(folder.glob("**/sums.jsonl"))
    lines = [json.dumps({"text": f"The number {n} is followed by {n + 1}."}) for n in range(30)]
    raw.write_text("\n".join([*lines, json.dumps({"text": " ".join(map(str, range(300)))})]) + "\n")
    return folder


def test_texts_go_through_every_step(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step(process)
    assert 'read as text ("text" is text to continue' in capsys.readouterr().err
    step(style, "--style", "Be brief.")
    step(render)
    manifest = stages.read_manifest(Path("data/rendered/sums"))
    assert manifest is not None and manifest["rejected"] == 0 and manifest["too_long"]["split"] == 1
    assert manifest["rows_out"] == 30 + manifest["too_long"]["parts"]
    every = [row for split in stages.SPLITS for row in rows(split)]
    assert not any("Be brief." in row["text"] for row in every)
    assert all(row["trained_tokens"] == row["tokens"] - 1 for row in every)
    assert len({row["id"] for row in every}) == len(every)
    assert to_prompts(smollm2_tokenizer(), every[:1]) == [[]] and evaluation.asking(every) == []
    step(inspect_row, "--row", "1")
    assert f"{END}⟧" in capsys.readouterr().out


def test_a_text_file_is_one_row_where_it_is_named_and_never_by_accident(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.rmtree("data/raw")
    Path("data/raw").mkdir()
    Path("data/raw/book.txt").write_bytes("\ufeffOnce upon a time.\r\n\r\nThe end.".encode())
    with pytest.raises(UserError) as caught:
        step(process, overrides="data.raw=data/raw")
    assert "book.txt is not read: it is text" in caught.value.message and "data/raw/*.txt" in caught.value.message
    for raw in ("data/raw/book.txt", "data/raw/*.txt"):
        step(process, overrides=f"data.raw={raw} data.name=book data.val_fraction=0 data.test_fraction=0")
        [line] = Path("data/processed/book/train.jsonl").read_text().splitlines()
        assert json.loads(line)["text"] == "Once upon a time.\r\n\r\nThe end."


def test_own_column_for_the_text(texts: Path) -> None:
    raw = next(texts.glob("**/sums.jsonl"))
    raw.write_text("".join(json.dumps({"Inhalt": f"n {n}", "question": "q", "answer": "a"}) + "\n" for n in range(20)))
    step(process, overrides="data.columns={text: Inhalt}")
    assert json.loads(Path("data/processed/sums/train.jsonl").read_text().splitlines()[0])["text"].startswith("n ")
    with pytest.raises(UserError, match="a text has no other part"):
        step(process, overrides="data.columns={text: Inhalt, user: question}")
