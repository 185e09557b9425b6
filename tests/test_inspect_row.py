"""inspect: shows what the model will see and nothing else, also of hostile rows; writes the same as a page."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scripts import inspect_row, process, render
from scripts.utils import shown
from scripts.utils.encoding import encode
from scripts.utils.errors import UserError
from tests.test_chat import expressible
from tests.test_render import rows, step
from tests.tiny_models import smollm2_tokenizer


@pytest.fixture
def prepared(project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SFT_ROW", "SFT_SPLIT", "SFT_IDS"):
        monkeypatch.delenv(name, raising=False)
    project()
    step(process)
    step(render)


@given(
    pieces=st.lists(
        st.text(st.characters(exclude_categories=("Cs",)).filter(expressible), min_size=1), min_size=1, max_size=8
    )
)
@example(pieces=["\ufffd\U00010000"])  # a replacement character of the text itself is no half of the next one
@settings(max_examples=100)
def test_pieces_joined_are_what_the_ids_spell_and_what_is_trained_is_marked(pieces: list[str]) -> None:
    tokenizer, text = smollm2_tokenizer(), "".join(pieces)
    first = len(pieces[0])
    encoded = encode(tokenizer, text, [(first, len(text))] if first < len(text) else [])
    found = shown.to_pieces(tokenizer, encoded)
    assert [i for piece in found for i in piece.ids] == encoded.ids
    assert "".join(piece.text for piece in found) == tokenizer.decode(encoded.ids, clean_up_tokenization_spaces=False)
    assert sum(len(piece.ids) for piece in found if piece.trained) == encoded.trained_tokens
    assert all(len(piece.ids) <= 4 for piece in found)


def test_a_row_is_shown_with_what_is_trained_marked(prepared: None, capsys: pytest.CaptureFixture[str]) -> None:
    step(inspect_row, "--row", "3")
    out = capsys.readouterr().out
    row = rows()[2]
    [[start, end]] = row["spans"]
    assert f"{row['text'][:start]}⟦{row['text'][start:end]}⟧{row['text'][end:]}" in out
    assert f"3 of {len(rows())}" in out and row["id"] in out and "sums.jsonl:" in out
    assert f"{row['tokens']:,}, of which {row['trained_tokens']:,} carry loss" in out
    assert "gives the same text" in out


def test_a_row_is_found_by_number_by_id_and_at_random(prepared: None, capsys: pytest.CaptureFixture[str]) -> None:
    row = rows()[4]
    step(inspect_row, "--row", row["id"][:10])
    assert f"5 of {len(rows())}" in capsys.readouterr().out
    step(inspect_row, "--row", "random", "--split", "val")
    assert " in val" in capsys.readouterr().out


def test_ids_are_listed_one_line_a_token(prepared: None, capsys: pytest.CaptureFixture[str]) -> None:
    step(inspect_row, "--row", "1", "--ids")
    out = capsys.readouterr().out
    row = rows()[0]
    encoded = encode(smollm2_tokenizer(), row["text"], row["spans"], (), [row["prompt_end"]])
    listed = [int(line.split()[1]) for line in out.splitlines() if re.match(r"\s*\d+\s+\d+\s+['\"]", line)]
    assert listed == encoded.ids
    assert len(re.findall(r"^\s*\d+ .* trained\s*$", out, flags=re.M)) == row["trained_tokens"]


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--row", "0"], "no row '0'", "give 1 to "),
        (["--row", "zebra"], "no row 'zebra'", "random"),
        (["--split", "trian"], "SPLIT is 'trian'", "train, val, test"),
    ],
)
def test_a_row_that_is_not_there_is_one_clear_message(
    prepared: None, words: list[str], message: str, hint: str
) -> None:
    with pytest.raises(UserError) as caught:
        step(inspect_row, *words)
    assert message in caught.value.message and hint in caught.value.hint


def test_a_row_that_render_left_out_is_answered_with_its_reason(project: Callable[..., Path]) -> None:
    folder = project()
    raw = next(folder.glob("**/sums.jsonl"))
    raw.write_text(raw.read_text() + json.dumps({"question": "long", "answer": "word " * 3000}) + "\n")
    step(process, overrides="data.val_fraction=0 data.test_fraction=0")
    step(render, overrides="data.val_fraction=0 data.test_fraction=0")
    [left] = rows("rejected")
    with pytest.raises(UserError) as caught:
        step(inspect_row, "--row", left["id"], overrides="data.val_fraction=0 data.test_fraction=0")
    assert f"sums.jsonl:{left['source']['line']}: longer than" in caught.value.message


HOSTILE = "</pre><script>alert(1)</script>\x1b[31mred\x07 <|im_end|>\r & \u202e 🙂"


def pieces_of(text: str) -> list[shown.Piece]:
    return shown.to_pieces(smollm2_tokenizer(), encode(smollm2_tokenizer(), text, [(3, len(text))]))


def test_a_hostile_row_cannot_steer_the_terminal_or_the_page() -> None:
    pieces = pieces_of(HOSTILE)
    on_terminal = shown.for_terminal(pieces, io.StringIO())
    assert not set("\x1b\x07\r") & set(on_terminal) and "␛[31mred␇" in on_terminal
    page = shown.to_html(HOSTILE, [("row", HOSTILE)], pieces)
    assert "<script>alert" not in page and page.count("</pre>") == 1 and "\x1b" not in page.split("<pre", 1)[1]
    assert not re.search(r"(?:src|href)=|https?:", page)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    coloured = shown.for_terminal(pieces_of("abcdef\nghi"), Terminal())
    assert "\x1b[32m" in coloured and "⟦" not in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == "abcdef\nghi"


def test_the_page_holds_the_whole_text(prepared: None) -> None:
    step(inspect_row, "--row", "2")
    page = Path("data/rendered/sums/inspect.html").read_text()
    import html

    body = html.unescape(re.sub(r"<[^>]+>", "", page.split('class="tokens">', 1)[1].split("</pre>")[0]))
    assert body.replace("↵", "") == rows()[1]["text"]


def test_a_text_that_the_vocabulary_cannot_spell_is_named() -> None:
    tokenizer: Any = smollm2_tokenizer()
    encoded = encode(tokenizer, "abc def", [])
    assert shown.difference(tokenizer, encoded, "abc def") == ""
    assert "at character 4: the row has 'xef'" in shown.difference(tokenizer, encoded, "abc xef")
