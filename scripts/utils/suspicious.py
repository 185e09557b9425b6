"""What looks wrong in a row that can be used all the same: texts a person should look at before training on them."""

import re
from typing import Any

# leftovers of other templates; the model would learn to write them out
_CONTROL = re.compile(
    r"<\|[A-Za-z_][\w-]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|^<s>|</s>\s*$|###\s*(?:Response|Instruction|Input)\s*:",
    re.IGNORECASE,
)
# UTF-8 that was once read as Latin-1 or Windows-1252: é as Ã©, ’ as â€™, a no-break space as Â
_MOJIBAKE = re.compile("Ã[\u0080-\u00bf]|â€[\u0080-\u00bf\u0152-\u2122]|Â[\u00a0-\u00bf]|ï»¿")
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_REFUSAL = re.compile(r"\bas an? (?:AI|artificial intelligence)(?: language)? (?:model|assistant)\b", re.IGNORECASE)
_REPEATED = 30  # characters of a question from which an answer that begins with it repeats it


REASONS = (
    "the answer repeats the question",
    "control tokens or a template's headings in a text",
    "a character was lost (U+FFFD)",
    "wrongly decoded text (such as Ã© for é)",
    "a code block is opened and not closed",
    'an answer speaks "as an AI language model"',
)


def find(messages: list[dict[str, Any]]) -> list[str]:
    """The reasons to look at a row, of REASONS, in that order."""
    texts = [message["content"] for message in messages]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    # most rows hold none of this, and a plain search says so ten times faster than a pattern
    odd = [text for text in texts if not text.isascii()]
    found = (
        _repeats(messages),
        any(_CONTROL.search(text) for text in texts if "<" in text or "[" in text or "###" in text),
        any("\ufffd" in text for text in odd),
        any(_MOJIBAKE.search(text) for text in odd),
        any(len(_FENCE.findall(text)) % 2 for text in answers if "```" in text),
        any(_REFUSAL.search(text) for text in answers if "as a" in text.casefold()),
    )
    return [reason for reason, yes in zip(REASONS, found, strict=True) if yes]


def _repeats(messages: list[dict[str, Any]]) -> bool:
    """Whether the last answer is, or begins with, the user message before it."""
    question = next((message["content"] for message in reversed(messages[:-1]) if message["role"] == "user"), "")
    first, other = (text.lstrip()[:1].casefold()[:1] for text in (question, messages[-1]["content"]))
    if first != other:  # most rows: no need to look at all of both
        return False
    asked, answered = (" ".join(text.casefold().split()) for text in (question, messages[-1]["content"]))
    return bool(asked) and (asked == answered or (len(asked) >= _REPEATED and answered.startswith(asked)))
