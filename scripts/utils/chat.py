"""Conversations as text: which chat template, what it makes of the messages, and where the loss belongs.

The one renderer of the project: render, eval, infer and merge all come here, so a conversation is the same text
on every way. Spans are found from the template itself, never by searching for marker strings: from its generation
markers where it has them, else by rendering the conversation up to each assistant turn (``spans.py``).
"""

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scripts.utils import literals, spans, template_child, template_guard
from scripts.utils.errors import UserError
from scripts.utils.files import REPO_ROOT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
TrainOn = Literal["assistant", "last_assistant", "completion", "all"]
TEMPLATES = REPO_ROOT / "chat_templates"
_SMOLLM2 = "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"  # sha256 of its template


@dataclass(frozen=True)
class Template:
    """A chat template: its Jinja text, where it came from, and the sha256 of the text."""

    text: str
    source: str
    hash: str


@dataclass(frozen=True)
class Rendered:
    """A whole conversation. Spans are [start, end) in characters of ``text``.

    ``spans`` carry loss; ``text[:prompt_end]`` is the prompt of the last assistant turn, whose content is
    ``reference``; ``prompt_spans`` are the assistant turns inside that prompt. ``literals`` are texts of messages
    that spell a control token and stay text.
    """

    text: str
    spans: list[Span]
    prompt_end: int
    prompt_spans: list[Span]
    reference: str
    literals: list[Span]


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends where the model is to answer; ``spans`` are the earlier assistant turns."""

    text: str
    spans: list[Span]
    literals: list[Span]


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a local model or adapter folder; raises ``UserError`` when there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no usable tokenizer ({error})", "give a complete model folder") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def choose_template(tokenizer: "PreTrainedTokenizerBase", setting: str) -> Template:
    """The template for ``render.template``: 'auto', a name in chat_templates/, or the path of a Jinja file."""
    if setting == "auto":
        if own := _own(tokenizer):
            return _template(own, "the model's own")
        plain = TEMPLATES / "plain.jinja"
        return _template(plain.read_text(encoding="utf-8"), "chat_templates/plain.jinja (the model has none)")
    path = Path(setting)
    named = TEMPLATES / f"{setting}.jinja"
    if not path.suffix and named.is_file():
        return _template(named.read_text(encoding="utf-8"), f"chat_templates/{setting}.jinja")
    try:
        return _template(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise UserError(
            f"render.template {setting!r} is neither a template file ({path.absolute()}) nor one of: {names}",
            "use auto for the model's own template",
        ) from error


def _own(tokenizer: Any) -> str | None:
    """The text of the template that the model brings."""
    own = tokenizer.chat_template
    return own.get("default") or next(iter(own.values()), None) if isinstance(own, dict) else own


def template_warnings(template: Template, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """What a person should know who chose another template than the model's own."""
    own = _own(tokenizer)
    if template.text == own:
        return []
    found = []
    if own:
        found.append(
            f"{template.source} is not the template that the model brings and was trained with; render.template: auto takes that one"
        )
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    markers = re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>", re.sub(r"{#.*?#}", "", template.text, flags=re.S))
    if unknown := sorted(set(markers) - known):
        found.append(
            f"{template.source} writes {', '.join(unknown)}, which this tokenizer has no token for: they are trained as letters"
        )
    return found


def _template(text: str, source: str) -> Template:
    return Template(text, source, hashlib.sha256(text.encode()).hexdigest())


def render_conversation(
    template: Template,
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    *,
    train_on: TrainOn = "assistant",
) -> Rendered:
    """Render a whole conversation and find its spans; raises ``UserError`` with the reason when it cannot."""
    wanted = _trained_turns(messages, train_on)
    messages, tools, guard = _prepared(template, tokenizer, messages, tools)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    text, marked = _render(template, tokenizer, messages, tools)

    def show(shown: list[dict[str, Any]], generation_prompt: bool = False) -> str:
        return _render(template, tokenizer, shown, tools, generation_prompt)[0]

    starts = [spans.answer_start(show, messages, turn, text) for turn in turns]
    found = marked or [
        spans.turn_span(show, tokenizer, messages, turn, text, start) for turn, start in zip(turns, starts, strict=True)
    ]
    found = [spans.without_trailing_space(tokenizer, text, span) for span in found]
    if not all(start < end for start, end in found) or any(a[1] > b[0] for a, b in zip(found, found[1:], strict=False)):
        raise UserError("the template does not let the assistant's turns be told apart", "use another render.template")
    owners = spans.owners(found, starts)
    last = max(number for number, yes in enumerate(wanted) if yes)
    first_of_last = next((span[0] for span, owner in zip(found, owners, strict=True) if owner == last), None)
    if first_of_last is None:
        raise UserError("the template does not show the turn that is to be learnt", "use another render.template")
    start = starts[last]
    prompt_end = first_of_last if start is None or marked else start
    found = [
        spans.without_empty_thought(show, messages, turns[owner], text, span)
        for span, owner in zip(found, owners, strict=True)
    ]
    earlier = [span for span in found if span[1] <= prompt_end]
    if train_on == "all":
        loss = spans.gaps([span for span, owner in zip(found, owners, strict=True) if not wanted[owner]], len(text))
    else:
        loss = [span for span, owner in zip(found, owners, strict=True) if wanted[owner]]
    clean, look_alikes = literals.find(guard, text)
    [(_, prompt_end)] = literals.shift(guard, text, [(0, prompt_end)])
    loss, earlier = literals.shift(guard, text, loss), literals.shift(guard, text, earlier)
    reference = str(messages[turns[last]].get("content") or "").replace(guard.sentinel, "")
    return Rendered(clean, loss, prompt_end, earlier, reference, look_alikes)


def _prepared(
    template: Template, tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[list[dict[str, Any]], list[Any] | None, literals.Guard]:
    """What the template is given: no ``train`` flags, look-alikes guarded, tools as text where it knows none."""
    shown = [{name: value for name, value in message.items() if name != "train"} for message in messages]
    shown, tools, guard = literals.guard(tokenizer, template.text, shown, tools)
    return *plain_tools(template, shown, tools), guard


def _trained_turns(messages: list[dict[str, Any]], train_on: TrainOn) -> list[bool]:
    """Which assistant turns carry loss, one entry each."""
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError("the conversation has no assistant turn", "every row needs an answer to learn from")
    if train_on == "all" and any(m.get("train") is False and m["role"] != "assistant" for m in messages):
        raise UserError('"train": false on a turn that is not the assistant\'s cannot be kept with train_on: all', "")
    asked = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=-1)
    first = {"last_assistant": turns[-1], "completion": asked + 1}.get(train_on, 0)
    wanted = [turn >= first and messages[turn].get("train") is not False for turn in turns]
    if not any(wanted):
        raise UserError(
            f'no turn of it carries loss ("train": false, with train_on: {train_on})', "see render.train_on"
        )
    return wanted


def with_flags(messages: list[dict[str, Any]], train_on: TrainOn) -> list[dict[str, Any]]:
    """The messages with ``"train": false`` on each assistant turn that carries no loss under ``train_on``."""
    wanted = iter(_trained_turns(messages, train_on))
    return [m if m["role"] != "assistant" or next(wanted) else {**m, "train": False} for m in messages]


def render_prompt(
    template: Template,
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
) -> Prompt:
    """Render a conversation that the model is to continue, with the template's generation prompt."""
    history, flat_tools, guard = _prepared(template, tokenizer, messages, tools)
    text, _ = _render(template, tokenizer, history, flat_tools, generation_prompt=True)
    text, found = literals.find(guard, text)
    earlier: list[Span] = []
    if any(message["role"] == "assistant" for message in history):
        # a template may show earlier turns differently once more follow, so they are looked for with an answer in place
        answered = [{**message, "train": None} for message in [*messages, {"role": "assistant", "content": "x"}]]
        known = render_conversation(template, tokenizer, answered, tools)
        if known.text.startswith(text):
            earlier = [span for span in known.spans if span[1] <= len(text)]
    return Prompt(text, earlier, found)


def _render(
    template: Template,
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    generation_prompt: bool = False,
) -> tuple[str, list[Span]]:
    """Text and the spans of the template's generation markers (none where it has no markers)."""
    from jinja2.exceptions import TemplateError

    special = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    call = {"messages": messages, "tools": tools, "generation_prompt": generation_prompt, "special": special}
    try:
        if template.hash in _known_hashes():
            return template_child.render(template.text, call)
        return template_guard.render_outside(template.text, template.source, call)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UserError(
            f"the chat template ({template.source}) refuses this conversation: {error}", "see render.template"
        ) from error


@functools.cache
def _known_hashes() -> frozenset[str]:
    """Templates that need no limits on time and memory: those in chat_templates/ and the embedded model's."""
    ours = (_template(path.read_text(encoding="utf-8"), path.name).hash for path in TEMPLATES.glob("*.jinja"))
    return frozenset((*ours, _SMOLLM2))


def plain_tools(
    template: Template, messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """For a template that knows no tools, write calls, results and the list of tools as text.

    The text has the widespread ``<tool_call>`` form, so that a model learns a format that parsers exist for.
    """
    uses_tools = bool(tools) or any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
    if not uses_tools or "tool_calls" in template.text:
        return messages, tools
    flat = [dict(message) for message in messages]
    for message in flat:
        for call in message.pop("tool_calls", None) or []:
            function = call.get("function", call)
            text = json.dumps(
                {"name": function["name"], "arguments": function.get("arguments", {})}, ensure_ascii=False
            )
            before = f"{message['content']}\n" if message.get("content") else ""
            message["content"] = f"{before}<tool_call>\n{text}\n</tool_call>"
        if message["role"] == "tool":
            message.update(role="user", content=f"<tool_response>\n{message.get('content') or ''}\n</tool_response>")
    if tools:
        listing = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = f'Tools, one JSON object a line. To call one, answer <tool_call>\n{{"name": …, "arguments": …}}\n</tool_call>\n{listing}'
        if flat and flat[0]["role"] == "system":
            flat[0]["content"] = f"{flat[0]['content']}\n\n{text}"
        else:
            flat.insert(0, {"role": "system", "content": text})
    return flat, None
