"""Rows over render.max_length: what is cut away is said by the config; an answer is kept whole or the row is not used.

An exchange is a user's message with all that follows it up to the next one: answers, tool calls and their results.
"""

from collections.abc import Callable, Sequence
from typing import Any

from scripts.utils.errors import UserError

Message = dict[str, Any]
Row = dict[str, Any]  # a rendered row, with the number of its "tokens"
Render = Callable[[list[Message]], Row]


class TooLong(UserError):
    """The row is longer than render.max_length, and may not or cannot be made shorter."""


def too_long(limit: int, why: str = "") -> TooLong:
    return TooLong(f"longer than render.max_length ({limit} tokens){why}", "raise it, or shorten the row")


def without_start(messages: list[Message], limit: int, render: Render) -> Row:
    """Cut the oldest exchanges after the system message; from the last one, if need be, the start of its question."""
    system, exchanges = split_exchanges(messages)
    question, *answers = exchanges[-1]
    if not _learns(answers):
        raise too_long(limit, ", and its last exchange, which would be kept, carries no loss")
    row = _first_that_fits(
        len(exchanges) - 1,
        lambda number: [*system, *(message for exchange in exchanges[number + 1 :] for message in exchange)],
        limit,
        render,
    ) or _first_that_fits(
        len(question["content"]) - 1,
        lambda number: [*system, {**question, "content": question["content"][number + 1 :]}, *answers],
        limit,
        render,
    )
    if row is None:
        raise too_long(limit, " without the start of its prompt too")
    return row


def without_end(messages: list[Message], limit: int, render: Render) -> Row:
    """Cut the end of the last question."""
    system, exchanges = split_exchanges(messages)
    question, *answers = exchanges[-1]
    before = [*system, *(message for exchange in exchanges[:-1] for message in exchange)]
    row = _first_that_fits(
        len(question["content"]) - 1,
        lambda number: [*before, {**question, "content": question["content"][: -number - 1]}, *answers],
        limit,
        render,
    )
    if row is None:
        raise too_long(limit, " without the end of its last question too")
    return row


def in_parts(messages: list[Message], limit: int, measure: Render, render: Render) -> list[Row]:
    """Several rows of as many whole exchanges as fit, each after the system message: each answer stands in one of them.

    ``measure`` gives the length of any part; ``render`` makes the rows of those in which a turn is to be learnt.
    """
    system, exchanges = split_exchanges(messages)
    parts: list[list[Message]] = []
    for exchange in exchanges:
        longer = [*parts[-1], *exchange] if parts else []
        if longer and measure(longer)["tokens"] <= limit:
            parts[-1] = longer
        else:
            parts.append([*system, *exchange])
            if measure(parts[-1])["tokens"] > limit:
                raise too_long(limit, ", a single exchange of it too")
    rows = [render(part) for part in parts if _learns(part)]
    if any(row["tokens"] > limit for row in rows):
        raise too_long(limit, ", a part of it too")
    return rows


def split_exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """What stands before the first user's message, and the exchanges. Raises ``TooLong`` where no user asks."""
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if not starts:
        raise TooLong("longer than render.max_length, and it has no question that could be cut", "shorten the row")
    ends = [*starts[1:], len(messages)]
    return list(messages[: starts[0]]), [list(messages[a:b]) for a, b in zip(starts, ends, strict=True)]


def _first_that_fits(count: int, make: Callable[[int], list[Message]], limit: int, render: Render) -> Row | None:
    """The row of the least number below ``count`` that fits, each being shorter than the one before; None: none does."""
    low, high, found = 0, count, None
    while low < high:
        middle = (low + high) // 2
        messages = make(middle)
        row = render(messages)
        if row["tokens"] <= limit:
            high, found = middle, row if _asks(messages) else None
        else:
            low = middle + 1
    return found


def _learns(messages: list[Message]) -> bool:
    return any(message["role"] == "assistant" and message.get("train") is not False for message in messages)


def _asks(messages: list[Message]) -> bool:
    """Whether there is a letter in each question: an answer to nothing teaches nothing."""
    return all(str(message["content"]).strip() for message in messages if message["role"] == "user")
