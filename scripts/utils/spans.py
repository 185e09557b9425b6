"""Where the assistant's turns lie in a rendered conversation, found by rendering it in other ways and comparing.

``show(messages, generation_prompt)`` renders; nothing here knows a template's text.
"""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

from scripts.utils.errors import UserError

Span = tuple[int, int]
Messages = list[dict[str, Any]]
Show = Callable[..., str]
_PRIVATE_USE = range(0xE000, 0xF8FF)
_EMPTY_THOUGHT = re.compile(r"\s*<([\w:]+)>\s*</\1>\s*")


def answer_start(show: Show, messages: Messages, turn: int, text: str) -> int | None:
    """Where the model begins to write in turn ``turn``, or None where the template rewrites what came before."""
    prompt = show(messages[:turn], generation_prompt=True)
    return len(prompt) if text.startswith(prompt) else None


def turn_span(show: Show, tokenizer: Any, messages: Messages, turn: int, text: str, start: int | None) -> Span:
    """The assistant turn ``turn`` with its end-of-turn token, by rendering the conversation up to its end."""
    if start is not None and turn + 1 == len(messages):
        return start, _end_of_last(show, tokenizer, messages, text, start)
    if start is not None and (end := _end_as_last(show, messages, turn, text, start)):
        return start, end
    if messages[turn].get("tool_calls"):
        raise UserError(
            "the template rewrites an earlier tool call when the conversation goes on", "use another render.template"
        )
    # the template shows this turn differently once more turns follow: change its content and see what moves
    content = str(messages[turn].get("content") or "")
    probe = _probe(messages, text)
    changed = show(_with_probe(messages, turn, probe))
    begin = changed.find(probe)
    end = len(text) - (len(changed) - begin - len(probe))
    if begin < 0 or changed.count(probe) != 1 or end < begin or text[begin:end] not in content:
        raise UserError("the template does not show where this assistant turn lies", "use another render.template")
    lead = _lead(show, messages, turn, probe)
    if text.endswith(lead, 0, begin):
        begin -= len(lead)
    return begin, end + _end_token_length(tokenizer, text, end)


def _probe(messages: Messages, text: str) -> str:
    """A content to look for: two letters that stand nowhere in the conversation."""
    whole = {*text, *json.dumps(messages, ensure_ascii=False, default=str)}
    letters = [letter for code in _PRIVATE_USE if (letter := chr(code)) not in whole][:2]
    if len(letters) < 2:
        raise UserError("the conversation holds every private-use character", "take some of them out")
    return "".join(letters)


def _with_probe(messages: Messages, turn: int, probe: str) -> Messages:
    return [*messages[:turn], {**messages[turn], "content": probe}, *messages[turn + 1 :]]


def _end_as_last(show: Show, messages: Messages, turn: int, text: str, start: int) -> int | None:
    """The end of an earlier turn that stands in ``text`` as it does when it is the last.

    Reasoning, and an empty one that the template writes itself, may stand in the last turn only.
    """
    bare = {name: value for name, value in messages[turn].items() if name != "reasoning_content"}
    for message in [messages[turn]] if len(bare) == len(messages[turn]) else [messages[turn], bare]:
        upto = show([*messages[:turn], message])
        if not upto.startswith(text[:start]):
            continue
        said = upto[start:]
        if text.startswith(said, start):
            return start + len(said)
        empty = _EMPTY_THOUGHT.match(said)
        if empty and text.startswith(said[empty.end() :], start):
            return start + len(said) - empty.end()
    return None


def _end_of_last(show: Show, tokenizer: Any, messages: Messages, text: str, start: int) -> int:
    """The end of the last turn, without what the template closes every text with (Phi: ``<|end|>``, then ``<|endoftext|>``)."""
    names = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    if not messages[-1].get("tool_calls") and (found := _closing(frozenset(names)).search(text, start)):
        longer = show([*messages, {"role": "user", "content": "x"}], generation_prompt=True)
        if longer.startswith(text[: found.end()]) and not longer.startswith(text.rstrip()):
            return found.end()
    return len(text)


@functools.lru_cache(64)
def _closing(names: frozenset[str]) -> re.Pattern[str]:
    """The first of several control tokens that close a text."""
    special = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
    return re.compile(rf"(?:{special})(?=(?:\s*(?:{special}))+\s*\Z)")


def _lead(show: Show, messages: Messages, turn: int, probe: str) -> str:
    """What the model itself writes before the content of its answer, such as a space."""
    prompt, probed = show(messages[:turn], generation_prompt=True), show(_with_probe(messages[: turn + 1], turn, probe))
    if not probed.startswith(prompt) or probe not in probed:
        return ""
    lead = probed[len(prompt) : probed.find(probe)]
    return "" if _EMPTY_THOUGHT.fullmatch(lead) else lead


def without_empty_thought(show: Show, messages: Messages, turn: int, text: str, span: Span) -> Span:
    """Cut an empty ``<think></think>`` that the template itself writes before the answer: nobody thought it."""
    written = _EMPTY_THOUGHT.match(text, *span)
    own = _EMPTY_THOUGHT.match(str(messages[turn].get("content") or ""))
    if not written or (own and own[1] == written[1]):
        return span
    probe = _probe(messages, text)
    changed = show(_with_probe(messages, turn, probe))
    begin = changed.find(probe)
    if begin > span[0] and text.startswith(changed[:begin]) and _EMPTY_THOUGHT.fullmatch(text, span[0], begin):
        return begin, span[1]
    return span


def owners(spans: list[Span], starts: list[int | None]) -> list[int]:
    """The assistant turn that each span belongs to: one each, or, where markers stand otherwise, by the turns' starts."""
    if len(spans) == len(starts):
        return list(range(len(starts)))
    known = [start for start in starts if start is not None]
    if len(known) < len(starts) or (spans and spans[0][0] < known[0]):
        raise UserError("the template's generation markers do not fit the turns", "use another render.template")
    return [sum(start <= span[0] for start in known) - 1 for span in spans]


def gaps(spans: list[Span], length: int) -> list[Span]:
    """What of a text of ``length`` lies outside the spans."""
    borders = [0, *(border for span in spans for border in span), length]
    return [(a, b) for a, b in zip(borders[::2], borders[1::2], strict=True) if a < b]


def _end_token_length(tokenizer: Any, text: str, end: int) -> int:
    """Length of the special token that stands at ``end`` (0 where none does)."""
    names = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return max((len(name) for name in names if text.startswith(name, end)), default=0)


def without_trailing_space(tokenizer: Any, text: str, span: Span) -> Span:
    """Cut what the template adds after the end-of-turn token, such as a line break: the model never writes it."""
    kept = text[span[0] : span[1]].rstrip()
    specials = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if any(kept.endswith(name) for name in specials):
        return span[0], span[0] + len(kept)
    return span
