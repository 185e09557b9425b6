"""A rendered row as a person can look at it: its tokens as pieces of text, which of them carry loss, and whether the
ids spell the text again. Pieces become lines for a terminal, or a page of HTML that needs nothing else.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.utils import console
from scripts.utils.encoding import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 8  # tokens before a piece that are decoded with it: some decoders drop the space before the first one


@dataclass(frozen=True)
class Piece:
    """Text of one token, or of the few that make up one character; ``trained``: it carries loss."""

    text: str
    ids: tuple[int, ...]
    trained: bool


def to_pieces(tokenizer: "PreTrainedTokenizerBase", encoded: Encoded) -> list[Piece]:
    """The example's tokens in order; their texts joined are the decoded text, but for bytes that make no character."""
    pieces: list[Piece] = []
    # the first token can carry no loss: nothing predicts it
    trained = [False, *encoded.trained[1:]]
    start = 0
    for end in range(1, len(encoded.ids) + 1):
        context = encoded.ids[max(0, start - _CONTEXT) : start]
        text = _decode(tokenizer, [*context, *encoded.ids[start:end]])[len(_decode(tokenizer, context)) :]
        last = end == len(encoded.ids) or trained[end] != trained[start]
        # half of a character, of which UTF-8 has up to 4 bytes
        if text.endswith("\ufffd") and not last and end - start < 4 and _goes_on(tokenizer, encoded.ids, end):
            continue
        pieces.append(Piece(text, tuple(encoded.ids[start:end]), trained[start]))
        start = end
    return pieces


def _goes_on(tokenizer: Any, ids: Sequence[int], end: int) -> bool:
    """Whether the tokens from ``end`` on change what stands before them; a U+FFFD of the text itself stays as it is."""
    before = ids[max(0, end - _CONTEXT) : end]
    text = _decode(tokenizer, before)
    return any(not _decode(tokenizer, [*before, *ids[end : end + more]]).startswith(text) for more in (1, 2, 3))


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def difference(tokenizer: "PreTrainedTokenizerBase", encoded: Encoded, text: str) -> str:
    """Where the text that the ids spell departs from ``text``; empty where it is the same."""
    back = _decode(tokenizer, encoded.ids)
    if back == text:
        return ""
    at = next((n for n, (a, b) in enumerate(zip(back, text, strict=False)) if a != b), min(len(back), len(text)))
    return f"at character {at:,}: the row has {text[at : at + 20]!r}, its tokens spell {back[at : at + 20]!r}"


def runs(pieces: Sequence[Piece]) -> list[tuple[str, bool]]:
    """Neighbouring pieces with the same ``trained`` as one text each."""
    joined: list[tuple[str, bool]] = []
    for piece in pieces:
        if joined and joined[-1][1] == piece.trained:
            joined[-1] = (joined[-1][0] + piece.text, piece.trained)
        else:
            joined.append((piece.text, piece.trained))
    return joined


def visible(text: str) -> str:
    """Control characters as their pictures (␛): a row must not be able to steer the terminal it is shown on."""
    return "".join(
        chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else "␡" if c == "\x7f" else f"\\x{ord(c):02x}" if "\x80" <= c <= "\x9f" else c
        for c in text
    )  # fmt: skip


def for_terminal(pieces: Sequence[Piece], stream: Any) -> str:
    """The text, what is trained in green; without colour between ⟦ and ⟧."""
    colour = console.use_colour(stream)
    shown = []
    for text, trained in runs(pieces):
        text = visible(text)
        if colour:  # line by line, so that a pager keeps the colour
            shown.append("\n".join(console.paint(line, "green", stream) if line and trained else line for line in text.split("\n")))  # fmt: skip
        else:
            shown.append(f"⟦{text}⟧" if trained else text)
    return "".join(shown)


def for_listing(pieces: Sequence[Piece]) -> list[tuple[object, ...]]:
    """A line a token: position, ids, text as Python writes it, and "trained" or nothing."""
    lines: list[tuple[object, ...]] = []
    at = 0
    for piece in pieces:
        lines.append((at, " ".join(map(str, piece.ids)), repr(piece.text), "trained" if piece.trained else ""))
        at += len(piece.ids)
    return lines


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --back: #fff; --ink: #1c1f23; --soft: #6b7280; --line: #e3e5e8; --loss: #c9f0d3; --loss-ink: #0b3d1c; --edge: #8fd3a3; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #15181c; --ink: #e4e6e9; --soft: #98a1ad; --line: #2d333b; --loss: #12402a; --loss-ink: #c4f5d3; --edge: #2c7a4b; }} }}
body {{ margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--back); color: var(--ink); font: 15px/1.6 system-ui, sans-serif; }}
h1 {{ font-size: 1.25rem; margin: 0 0 .75rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1.25rem; }}
dt {{ color: var(--soft); }} dd {{ margin: 0; overflow-wrap: anywhere; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, Menlo, Consolas, monospace; border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 0; }}
.l {{ background: var(--loss); color: var(--loss-ink); padding: .15em 0; }}
.tokens span {{ box-shadow: inset -1px 0 var(--line); }} .tokens .l {{ box-shadow: inset -1px 0 var(--edge); }}
.e {{ color: var(--soft); }} label {{ display: inline-block; margin: 0 0 .75rem; color: var(--soft); }}
.key {{ padding: .1em .4em; border-radius: .25rem; }}
</style></head><body>
<h1>{title}</h1>
<dl>{facts}</dl>
<label><input type="checkbox" id="borders" checked> borders of tokens (point at one for its id)</label>
<pre id="row" class="tokens">{text}</pre>
<script>document.getElementById("borders").onchange = e => document.getElementById("row").classList.toggle("tokens", e.target.checked)</script>
</body></html>
"""


def to_html(title: str, facts: Sequence[tuple[str, object]], pieces: Sequence[Piece]) -> str:
    """The same as one page, light and dark: trained tokens on green, the ids where one points."""
    shown = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts)
    shown += '<dt>colour</dt><dd><span class="l key">carries loss</span> the rest is only read</dd>'
    return _PAGE.format(title=html.escape(title), facts=shown, text="".join(map(_token, pieces)))


def _token(piece: Piece) -> str:
    text = html.escape(visible(piece.text)).replace("\n", '<i class="e">↵</i>\n').replace("\t", '<i class="e">⇥</i>\t')
    ids = " ".join(map(str, piece.ids))
    return f'<span{" class=l" if piece.trained else ""} title="id {ids}">{text}</span>'
