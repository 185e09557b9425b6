"""Text in a message that spells a control token of the tokenizer (``<|im_end|>``) stays text: it forges no turn.

Before the template is rendered, a sentinel, a private-use character that occurs nowhere in the conversation, is put
inside each such look-alike, so that it survives whatever the template trims or moves. Afterwards the sentinels are
taken out and the look-alikes' places are known: their ``literals``, which the encoding tokenises as plain text.
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.utils.errors import UserError

Span = tuple[int, int]
_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # Unicode's plane 15


@dataclass(frozen=True)
class Guard:
    """``pattern`` finds look-alikes; ``sentinel`` stands after the first character of each (empty: there were none)."""

    pattern: re.Pattern[str]
    sentinel: str


def guard(
    tokenizer: Any, template: str, messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[list[dict[str, Any]], list[Any] | None, Guard]:
    """The conversation with a sentinel inside each look-alike, in texts, calls, results and tools alike.

    In an assistant's message added tokens that are not marked special stay what they are: ``<think>`` and
    ``<tool_call>`` are what such a model writes itself. Elsewhere those that the template uses are look-alikes too.
    """
    special, written = _tokens(tokenizer, template)
    answers, others = _pattern(special), _pattern(special + written)
    whole = json.dumps([messages, tools], ensure_ascii=False, default=str)
    sentinel = next((chr(code) for code in _PRIVATE_USE if chr(code) not in whole), None)
    if sentinel is None:
        raise UserError("the conversation holds every private-use character", "take some of them out")
    guarded = [
        {
            name: value
            if name == "role"
            else _mark(value, answers if message["role"] == "assistant" else others, sentinel)
            for name, value in message.items()
        }
        for message in messages
    ]
    guarded_tools = _mark(tools, others, sentinel)
    found = guarded != messages or guarded_tools != tools
    return guarded, guarded_tools, Guard(others, sentinel if found else "")


def find(guard: Guard, text: str) -> tuple[str, list[Span]]:
    """The rendered ``text`` without sentinels, and where the look-alikes lie in it."""
    if not guard.sentinel:
        return text, []
    if json.dumps(guard.sentinel).strip('"') in text:
        raise UserError("the template writes a message's letters as escapes", "use another render.template")
    pieces = text.split(guard.sentinel)
    clean, at = "".join(pieces), 0
    literals: list[Span] = []
    for piece in pieces[:-1]:
        at += len(piece)
        found = guard.pattern.match(clean, max(at - 1, 0))
        # a template may show a part of a text only: then it is no look-alike any more
        if found and (not literals or found.start() >= literals[-1][1]):
            literals.append((found.start(), found.end()))
    return clean, literals


def shift(guard: Guard, text: str, spans: Iterable[Sequence[int]]) -> list[Span]:
    """``spans`` of the text with sentinels as spans of the text without."""
    if not guard.sentinel:
        return [(span[0], span[1]) for span in spans]
    return [
        (span[0] - text.count(guard.sentinel, 0, span[0]), span[1] - text.count(guard.sentinel, 0, span[1]))
        for span in spans
    ]


def within(literals: Iterable[Sequence[int]], start: int, end: int) -> list[Span]:
    """The literals inside ``text[start:end]``, counted from ``start``."""
    return [(span[0] - start, span[1] - start) for span in literals if start <= span[0] and span[1] <= end]


def _tokens(tokenizer: Any, template: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Special tokens, and added ones that are not marked so but that the template writes (``<｜User｜>``)."""
    known = tokenizer.__dict__.setdefault("_sft_control_tokens", {})
    key = (template, len(tokenizer))
    if key not in known:
        added = list(tokenizer.added_tokens_decoder.values())
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        written = {token.content for token in added if token.content.strip() and token.content in template} - special
        known[key] = tuple(filter(None, special)), tuple(written)
    return known[key]


@functools.lru_cache(64)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # the second matches nothing


def _mark(value: Any, pattern: re.Pattern[str], sentinel: str) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda found: f"{found[0][0]}{sentinel}{found[0][1:]}", value)
    if isinstance(value, dict):
        return {_mark(name, pattern, sentinel): _mark(inner, pattern, sentinel) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_mark(inner, pattern, sentinel) for inner in value]
    return value
