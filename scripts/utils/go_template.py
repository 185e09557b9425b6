"""A chat template as Ollama's: a Go template, found from what the Jinja template makes of conversations.

A template is taken apart by rendering conversations whose messages are known words, and looking at what stands between
them: a beginning, a default system message, and text before and after each role's messages. That covers the forms that
are in use (ChatML, Llama 3, Gemma, headings, …). What is put together again must give the same text as the Jinja
template on sample conversations, else it is refused; nothing is guessed from the template's source.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.utils.chat import Template, render_prompt
from scripts.utils.errors import UserError

Messages = list[dict[str, str]]
_WORDS = {"system": "qzsystemzq", "user": "qzuserzq", "assistant": "qzanswerzq"}


@dataclass(frozen=True)
class Form:
    """The template in parts. ``before`` and ``after`` by role; ``opening`` stands first of all, then ``default`` where no
    system message is given; ``prompt`` ends every prompt. ``joined``: a system message opens the user's turn."""

    opening: str
    default: str
    before: dict[str, str]
    after: dict[str, str]
    prompt: str
    joined: bool

    def render(self, messages: Messages) -> str:
        """What the Go template of these parts makes of ``messages``."""
        text = self.opening
        if self.default and messages[0]["role"] != "system":
            text += self.default
        previous = ""
        for message in messages:
            role = message["role"]
            opened = self.joined and role == "user" and previous == "system"
            text += ("" if opened else self.before[role]) + message["content"] + self.after[role]
            previous = role
        return text + self.prompt


def form_of(template: Template, tokenizer: Any) -> tuple[Form, list[str]]:
    """The parts, and what they cannot say (for a person). Raises ``UserError`` where the template cannot be said so."""

    def show(messages: Messages) -> str:
        return render_prompt(template, tokenizer, messages).text

    try:
        form = _taken_apart(show)
    except (ValueError, UserError) as error:
        raise UserError(
            f"the chat template ({template.source}) cannot be written as a Go template: {error}",
            "use the GGUF file with llama.cpp, which reads the template itself, or write a TEMPLATE by hand",
        ) from error
    wrong = [sample for sample in samples() if _differs(show, form, sample)]
    if wrong:
        raise UserError(
            f"the chat template ({template.source}) cannot be written as a Go template: {len(wrong)} of {len(samples())} "
            f"sample conversations come out otherwise, the first with the roles {', '.join(m['role'] for m in wrong[0])}",
            "use the GGUF file with llama.cpp, which reads the template itself, or write a TEMPLATE by hand",
        )
    notes = []
    if _differs(show, form, [{"role": "user", "content": "  spaced \n"}]):
        notes.append("the run's template trims spaces around a message, this one does not")
    if "strftime_now" in template.text and re.search(
        r"\d\d? \w{3} \d{4}", form.opening + form.default + form.before["system"]
    ):
        notes.append("the run's template writes today's date, here it is the date of this export")
    if "tools" in template.text:
        notes.append("tools are not in this template")
    return form, notes


def _differs(show: Callable[[Messages], str], form: Form, messages: Messages) -> bool:
    try:
        return show(messages) != form.render(messages)
    except UserError:
        return True


def _between(text: str, roles: Sequence[str]) -> list[str]:
    """The texts before, between and after the known words of ``roles``, in turn."""
    parts, rest = [], text
    for role in roles:
        before, word, rest = rest.partition(_WORDS[role])
        if not word:
            raise ValueError(f"it does not show every {role} message as it is")
        parts.append(before)
    return [*parts, rest]


def _taken_apart(show: Callable[[Messages], str]) -> Form:
    def parts(*roles: str) -> list[str]:
        return _between(show([{"role": role, "content": _WORDS[role]} for role in roles]), roles)

    start, tail = parts("user")
    long_start, to_answer, to_user, long_tail = parts("user", "assistant", "user")
    told_start, told_user, told_tail = parts("system", "user")
    if {long_tail, told_tail} != {tail} or long_start != start:
        raise ValueError("it writes the first or last message otherwise in a longer conversation")
    before_user = _common_end(start, to_user)
    if not before_user:
        raise ValueError("nothing marks a user's turn")
    joined = not told_user.endswith(before_user)
    after_user = _end_of_turn(_common_start(to_answer, tail))
    prompt, before_answer = tail.removeprefix(after_user), to_answer.removeprefix(after_user)
    if after_user and before_user.startswith(after_user):  # a default system message ends as the other turns do
        before_user = before_user.removeprefix(after_user)
    beginning, after_answer = start.removesuffix(before_user), to_user.removesuffix(before_user)
    marker = _common_start(before_user, prompt)  # what begins a turn
    opening = told_start.partition(marker)[0] if marker and marker in told_start else ""
    if joined or not (marker and beginning.startswith(opening)):
        opening = beginning if joined else _common_start(beginning, told_start)
    if not told_start.startswith(opening):
        raise ValueError("a system message changes the beginning")
    return Form(
        opening=opening,
        default=beginning.removeprefix(opening),
        before={"system": told_start.removeprefix(opening), "user": before_user, "assistant": before_answer},
        after={
            "system": told_user if joined else told_user.removesuffix(before_user),
            "user": after_user,
            "assistant": after_answer,
        },
        prompt=prompt,
        joined=joined,
    )


def _end_of_turn(common: str) -> str:
    """Where the user's turn ends and the next begins: after the end token and its line, or after empty lines.

    Any cut gives the same text; this one reads as people write it.
    """
    found = re.match(r"<[^<>]*(?:end|eot)[^<>]*>\n?|</s>\n?|\n+", common)
    return found.group(0) if found else ""


def _common_start(one: str, other: str) -> str:
    count = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:count]


def _common_end(one: str, other: str) -> str:
    """The longest common end that does not begin within a <tag>."""
    common = _common_start(one[::-1], other[::-1])[::-1]
    head = one[: len(one) - len(common)]
    return common.partition(">")[2] if head.rfind("<") > head.rfind(">") else common


def samples() -> list[Messages]:
    """Conversations to compare on: one and more turns, with and without a system message, odd characters."""
    odd = 'Zeile 1\nLine 2: {"a": [1, 2]} «é» 日本 {{ .Content }} ### 5 < 6 & `x` \\n'
    talks: list[Messages] = [
        [{"role": "user", "content": "Hello"}],
        [{"role": "user", "content": odd}],
        [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Two"},
            {"role": "user", "content": "Three"},
        ],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": odd},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": odd},
        ],
    ]
    return [*talks, *([{"role": "system", "content": text}, *talk] for talk in talks for text in ("Be short.", odd))]


def go_text(form: Form, bos: str = "") -> str:
    """The parts as Ollama's template. ``bos``: a begin token that the runtime adds by itself, so it is left out here.

    Text stands in Go strings and each line begins with a tag that eats the line break before it: no space is by chance.
    """
    opening = form.opening.removeprefix(bos) if bos else form.opening
    lines = [f"{{{{- {_quoted(opening)} }}}}"] if opening else []
    if form.default:
        lines.append(f"{{{{- if not .System }}}}{_literal(form.default)}{{{{ end }}}}")
    if form.joined:
        lines.append("{{- $opened := false }}")
    lines.append("{{- range .Messages }}")
    for role in ("system", "user", "assistant"):
        start = _literal(form.before[role])
        if form.joined and role == "user":
            start = f"{{{{ if not $opened }}}}{start}{{{{ end }}}}{{{{ $opened = false }}}}"
        elif form.joined:
            start += f"{{{{ $opened = {str(role == 'system').lower()} }}}}"
        test = f'if eq .Role "{role}"' if role == "system" else f'else if eq .Role "{role}"'
        lines.append(f"{{{{- {test} }}}}{start}{{{{ .Content }}}}{_literal(form.after[role])}")
    lines += ["{{- end }}", "{{- end }}"]
    if form.prompt:
        lines.append(f"{{{{- {_quoted(form.prompt)} }}}}")
    return "\n".join(lines)


def _literal(text: str) -> str:
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _quoted(text: str) -> str:
    """A Go string literal."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(c, c) for c in text) + '"'
