"""Texts to be continued as they stand: no chat template, loss on every token and on the end token after the last one.

A text over the length limit becomes several rows, cut at a paragraph, a line or a space where there is one: nothing
of it is lost.
"""

from collections.abc import Callable, Iterator
from typing import Any

from scripts.utils import literals
from scripts.utils.errors import UserError

Row = dict[str, Any]
_GUESS = 8  # letters a token at most, for the first look at how far a part may reach


def render_texts(tokenizer: Any, text: str, limit: int, measure: Callable[[Row], int]) -> list[Row]:
    """The rendered rows of one text, without ids and counts; ``measure`` gives the tokens of such a row.

    Raises ``UserError`` where not even a single letter fits.
    """
    begin = _begin(tokenizer)
    rows = []
    for start, end in _parts(text, limit, lambda a, b: measure(_row(tokenizer, begin, text[a:b], b == len(text)))):
        rows.append(_row(tokenizer, begin, text[start:end], end == len(text)))
    return rows


def _row(tokenizer: Any, begin: str, text: str, last: bool) -> Row:
    # as in a question: a book about chat templates must not teach the model to end its turn
    [guarded], _, guard = literals.guard(tokenizer, "", [{"role": "user", "content": text}], None)
    clean, found = literals.find(guard, guarded["content"])
    whole = begin + clean + (tokenizer.eos_token or "" if last else "")
    at = len(begin)
    return {
        "text": whole,
        "spans": [(at, len(whole))],
        "prompt_end": 0,
        "prompt_spans": [],
        "reference": "",
        **({"literals": [(a + at, b + at) for a, b in found]} if found else {}),
    }


def _begin(tokenizer: Any) -> str:
    """The begin token, for tokenizers that put one before every text."""
    ids = tokenizer("a")["input_ids"]
    return str(tokenizer.bos_token) if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else ""


def _parts(text: str, limit: int, tokens: Callable[[int, int], int]) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(text):
        end = _reach(text, start, limit, tokens)
        yield start, end
        start = end


def _reach(text: str, start: int, limit: int, tokens: Callable[[int, int], int]) -> int:
    """Where the part that begins at ``start`` ends: as far as fits, then back to a good place in its second half."""
    low, high = start, min(len(text), start + limit * _GUESS)
    if tokens(start, high) > limit:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if tokens(start, middle) <= limit else (low, middle)
        if low == start:
            raise UserError(f"longer than render.max_length ({limit} tokens), with a single letter", "raise it")
        high = low
    if high == len(text):
        return high
    for border in ("\n\n", "\n", " "):
        found = text.rfind(border, start + (high - start) // 2, high)
        if found >= 0:
            cut = found + len(border)
            # a part without the space at its end never has more tokens but for rare merges: measured, not assumed
            if tokens(start, cut) <= limit:
                return cut
    return high
