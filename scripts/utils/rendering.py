"""Rows in messages become rendered rows: the work of the step render on a few lines at a time, in whatever process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.utils import chat, continued, files, lengths
from scripts.utils.encoding import decode
from scripts.utils.errors import UserError
from scripts.utils.rendered import encode_row

if TYPE_CHECKING:
    from scripts.utils.schema import RenderSection

Lines = tuple[int, list[bytes]]  # the number of the first line, and the lines


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row: finished ``lines`` with their (all, trained) ``tokens``, or the line and reason of a rejected one.

    ``how`` is cut, split or nothing; ``lossy``: the vocabulary cannot spell its text. ``place`` is file:line; ``system`` the
    row's system message.
    """

    place: str
    lines: tuple[bytes, ...] = ()
    tokens: tuple[tuple[int, int], ...] = ()
    how: str = ""
    lossy: bool = False
    system: str = ""
    rejected: bytes = b""
    reason: str = ""
    too_long: bool = False


def renderer(
    template: chat.Template, tokenizer: Any, settings: "RenderSection", path: str, split: str
) -> Callable[[Lines], list[Outcome]]:
    """Return what renders the lines of one file; raises ``UserError`` where a line is no JSON."""

    def render_lines(chunk: Lines) -> list[Outcome]:
        first, lines = chunk
        outcomes = []
        for number, line in enumerate(lines, first):
            row = files.parse_line(path, number, line, "run: make process FORCE=1")
            outcomes.append(_outcome(template, tokenizer, row, settings, split))
        return outcomes

    return render_lines


def _outcome(
    template: chat.Template, tokenizer: Any, row: dict[str, Any], settings: "RenderSection", split: str
) -> Outcome:
    place = f"{row['source']['file']}:{row['source']['line']}"
    try:
        made, how = render_row(template, tokenizer, row, settings)
    except UserError as problem:
        too_long = isinstance(problem, lengths.TooLong)
        why = {"split": split, "reason": problem.message, **({"too_long": True} if too_long else {})}
        return Outcome(place, rejected=files.json_line({**why, **row}), reason=problem.message, too_long=too_long)
    exact = [part.pop("exact") for part in made]
    tokens = tuple((part["tokens"], part["trained_tokens"]) for part in made)
    return Outcome(place, tuple(map(files.json_line, made)), tokens, how, not all(exact), _system(row))


def _system(row: dict[str, Any]) -> str:
    first = row.get("messages", [{}])[0]
    return str(first["content"]) if first.get("role") == "system" else ""


def render_row(
    template: chat.Template, tokenizer: Any, row: dict[str, Any], settings: "RenderSection"
) -> tuple[list[dict[str, Any]], str]:
    """The rendered rows of one row, and how it was made to fit: cut, split, or not at all ("").

    ``exact`` in each says whether the vocabulary can spell its text. Raises ``UserError`` with the reason why the
    row cannot be used.
    """

    def render(messages: list[dict[str, Any]], train_on: chat.TrainOn = settings.train_on) -> dict[str, Any]:
        done = chat.render_conversation(template, tokenizer, messages, row.get("tools"), train_on=train_on)
        rendered = {
            "text": done.text,
            "spans": done.spans,
            "prompt_end": done.prompt_end,
            "prompt_spans": done.prompt_spans,
            "reference": done.reference,
            **({"literals": done.literals} if done.literals else {}),
        }
        return finished(rendered)

    def finished(rendered: dict[str, Any]) -> dict[str, Any]:
        encoded = encode_row(tokenizer, rendered)
        return {
            "id": row["id"],
            **rendered,
            "tokens": len(encoded.ids),
            "trained_tokens": encoded.trained_tokens,
            "source": row["source"],
            "exact": decode(tokenizer, encoded.ids) == rendered["text"],
        }

    if "text" in row:
        parts = continued.render_texts(
            tokenizer, row["text"], settings.max_length, lambda part: len(encode_row(tokenizer, part).ids)
        )
        if len(parts) > 1 and settings.too_long == "error":
            raise lengths.too_long(settings.max_length)
        made = [finished(part) for part in parts]
        return _numbered(made) if len(made) > 1 else made, "split" if len(made) > 1 else ""
    messages, limit = row["messages"], settings.max_length
    made, how = [render(messages)], ""
    if made[0]["tokens"] > limit:
        if settings.too_long in ("drop", "error"):
            raise lengths.too_long(limit)
        if settings.too_long == "split_turns":
            # only what would carry loss in the whole conversation may do so in its parts
            made, how = (
                lengths.in_parts(
                    chat.with_flags(messages, settings.train_on),
                    limit,
                    measure=lambda part: render([{**message, "train": None} for message in part]),
                    render=lambda part: render(part, "all" if settings.train_on == "all" else "assistant"),
                ),
                "split",
            )
            made = _numbered(made)
        else:
            shorten = lengths.without_start if settings.too_long == "truncate_start" else lengths.without_end
            made, how = [shorten(messages, limit, render)], "cut"
    if not all(part["trained_tokens"] for part in made):
        raise UserError("no token of it carries loss", "see render.train_on")
    return made, how


def _numbered(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**part, "id": f"{part['id']}-{number}"} for number, part in enumerate(parts, 1)]
