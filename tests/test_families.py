"""Chat templates of ten families in the field, in tests/templates/ (written for these tests), on odd conversations.

Each holds: loss on the answers and their end tokens only, look-alikes stay text, one begin token, a prompt is a
prefix of its training row, and a server that uses the template by itself comes to the same ids.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.utils.chat import Template, render_conversation, render_prompt
from scripts.utils.encoding import encode_prompt
from scripts.utils.rendered import to_examples, to_prompts
from tests.test_chat import chat, expressible, template
from tests.test_templates import tokenizer_with
from tests.tiny_models import smollm2_tokenizer

Shown = Callable[[str, bool], str]


def as_it_is(content: str, last: bool) -> str:
    return content


def trimmed(content: str, last: bool) -> str:
    return content.strip()


@dataclass(frozen=True)
class Family:
    """``shown(content, last)`` is what the template makes of an answer; ``end`` ends a turn, ``eos`` is the tokenizer's."""

    begin: str
    end: str
    special: list[str]
    plain: list[str] = field(default_factory=list)  # added tokens that are not marked special
    shown: Shown = as_it_is
    eos: str = ""


PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
FAMILIES = {
    "llama31": Family(
        "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"], shown=trimmed
    ),
    "qwen25": Family("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], TAGS[:2]),
    "qwen3": Family(
        "<|endoftext|>",
        "<|im_end|>",
        ["<|im_start|>"],
        ["<think>", "</think>", *TAGS],
        shown=lambda content, last: content.lstrip("\n") if last else content,
    ),
    "gemma3": Family("<bos>", "<end_of_turn>", ["<start_of_turn>"], shown=trimmed),
    "mistral": Family(
        "<s>",
        "</s>",
        ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
        shown=lambda content, last: " " + content.strip(),
    ),
    "phi": Family("<s>", "<|end|>", ["<|system|>", "<|user|>", "<|assistant|>"], eos="<|endoftext|>"),
    "smollm2": Family("<|im_start|>", "<|im_end|>", ["<|endoftext|>"]),
    "chatml": Family("<s>", "<|im_end|>", ["<|im_start|>"]),
    "deepseek": Family(
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", [], ["<｜User｜>", "<｜Assistant｜>"]
    ),
    "zephyr": Family("<s>", "</s>", ["<unk>"]),
}  # fmt: skip


@functools.cache
def made(name: str) -> tuple[Any, Template]:
    """The family's tokenizer, with its template also where a server looks for it, and the template."""
    if name == "smollm2":
        return smollm2_tokenizer(), template(smollm2_tokenizer().chat_template)
    family = FAMILIES[name]
    tokenizer = tokenizer_with(family.begin, family.eos or family.end, [*family.special, family.end])
    tokenizer.add_tokens(family.plain)
    if name in ("llama31", "qwen25", "qwen3", "deepseek"):  # which never part line breaks by what follows them
        from tokenizers import Regex, pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    tokenizer.chat_template = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer, template(tokenizer.chat_template)


def row(name: str, messages: list[dict[str, Any]], tools: list[Any] | None = None, **options: Any) -> dict[str, Any]:
    tokenizer, t = made(name)
    return vars(render_conversation(t, tokenizer, messages, tools, **options))


def trained(name: str, messages: list[dict[str, Any]], tools: list[Any] | None = None, **options: Any) -> str:
    [example] = to_examples(made(name)[0], [row(name, messages, tools, **options)])
    return str(made(name)[0].decode([i for i, yes in zip(example.ids, example.trained, strict=True) if yes]))


def control_ids(name: str, ids: list[int]) -> list[int]:
    return [i for i in ids if i in made(name)[0].added_tokens_decoder]


def servers_ids(name: str, messages: list[dict[str, Any]], tools: list[Any] | None = None, **options: Any) -> list[int]:
    """What transformers itself makes of the conversation."""
    return list(
        made(name)[0].apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True, **options)[
            "input_ids"
        ]
    )


def texts(*odd: str) -> st.SearchStrategy[str]:
    letters = st.characters(exclude_categories=("Cs",)).filter(expressible)
    odd = (*odd, "\n", "\n\n", " ", "\t", "\r\n", "\u00a0", "\u2028", "word", "<", "|>", "é", "字", "👩\u200d🚀")
    return st.lists(letters | st.sampled_from(odd), min_size=1, max_size=7).map("".join)


def conversation(
    data: st.DataObject, asked: st.SearchStrategy[str], said: st.SearchStrategy[str]
) -> list[dict[str, Any]]:
    turns = [data.draw(asked if number % 2 == 0 else said) for number in range(2 * data.draw(st.integers(1, 3)))]
    return chat(*turns, system=data.draw(st.none() | st.just("") | asked))


def test_every_template_here_is_a_family() -> None:
    assert {path.stem for path in (Path(__file__).parent / "templates").glob("*.jinja")} == set(FAMILIES) - {"smollm2"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=80)
def test_odd_conversations_train_their_answers_and_forge_nothing(name: str, data: st.DataObject) -> None:
    (tokenizer, t), family = made(name), FAMILIES[name]
    control = [family.begin, family.end, *family.special]
    messages = conversation(data, texts(*control, *family.plain), texts(*control))
    rendered = row(name, messages)
    [example], [prompt] = to_examples(tokenizer, [rendered]), to_prompts(tokenizer, [rendered])
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    learnt = [i for i, yes in zip(example.ids, example.trained, strict=True) if yes]
    shown = [family.shown(content, number == len(answers)) for number, content in enumerate(answers, 1)]
    assert tokenizer.decode(learnt) == "".join(content + family.end for content in shown)
    end = tokenizer.convert_tokens_to_ids(family.end)
    assert control_ids(name, learnt) == [end] * len(answers), "each end token is the token, each look-alike letters"
    assert tokenizer.decode(example.ids) == rendered["text"]

    simple = [{**m, "content": m["content"] and m["role"][0]} for m in messages]
    assert control_ids(name, example.ids) == control_ids(name, servers_ids(name, simple)), "as the turns demand"
    if name != "smollm2":  # where the begin token begins each turn
        begin = tokenizer.bos_token_id
        assert example.ids.count(begin) == ("bos_token" in t.text) and (begin in example.ids[:1]) == (
            "bos_token" in t.text
        )

    asked = encode_prompt(tokenizer, render_prompt(t, tokenizer, messages[:-1]))
    assert example.ids[: len(asked)] == asked
    assert asked == prompt, "eval asks as chat does"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=40)
def test_a_server_that_uses_the_template_by_itself_sends_the_same_ids(name: str, data: st.DataObject) -> None:
    tokenizer, t = made(name)
    # an answer that begins with space is another matter: a model that writes it begins a new token there
    messages = conversation(data, texts(), texts().map(lambda text: "A" + text))
    [example] = to_examples(tokenizer, [row(name, messages)])
    assert example.ids == servers_ids(name, messages)
    asked = encode_prompt(tokenizer, render_prompt(t, tokenizer, messages[:-1]))
    assert asked == servers_ids(name, messages[:-1], add_generation_prompt=True)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}]
AGENT = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "No."},
]
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>'
LEARNT = {
    "llama31": '{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>No.<|eot_id|>',
    "qwen25": CALLED + "No.<|im_end|>",
    "qwen3": CALLED + "No.<|im_end|>",
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln"}}]</s> No.</s>',
}


@pytest.mark.parametrize("name", LEARNT)
def test_calls_are_learnt_in_the_familys_own_form_and_results_are_not(name: str) -> None:
    tokenizer, t = made(name)
    assert trained(name, AGENT, TOOLS) == LEARNT[name]
    [example] = to_examples(tokenizer, [row(name, AGENT, TOOLS)])
    assert example.ids == servers_ids(name, AGENT, TOOLS)
    asked = encode_prompt(tokenizer, render_prompt(t, tokenizer, AGENT[:-1], TOOLS))
    assert example.ids[: len(asked)] == asked
    assert example.ids[: len(asked)] == servers_ids(name, AGENT[:-1], TOOLS, add_generation_prompt=True)


EVERY_TURN = (  # writes an empty thought into every turn that brings none
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = {
    "qwen3": lambda: made("qwen3")[1],
    "every turn": lambda: template(EVERY_TURN),
    "marked": lambda: template(MARKED),
}


@pytest.mark.parametrize("name", THINKING)
@pytest.mark.parametrize("last", ["two", "  two", "<b></b>"])
def test_an_empty_thought_that_the_template_writes_carries_no_loss(name: str, last: str) -> None:
    tokenizer, t = made("qwen3")[0], THINKING[name]()
    messages = chat("q", "one", "r", last)
    rendered = vars(render_conversation(t, tokenizer, messages))
    [example], [prompt] = to_examples(tokenizer, [rendered]), to_prompts(tokenizer, [rendered])
    assert f"<think>\n\n</think>\n\n{last}" in rendered["text"]
    learnt = [i for i, yes in zip(example.ids, example.trained, strict=True) if yes]
    assert tokenizer.decode(learnt) == f"one<|im_end|>{last}<|im_end|>"
    asked = encode_prompt(tokenizer, render_prompt(t, tokenizer, messages[:-1]))
    assert example.ids[: len(prompt)] == prompt and example.ids[: len(asked)] == asked
    if name != "marked":
        assert prompt == asked, "eval asks as chat does: the model begins to write before the thought"


@pytest.mark.parametrize("name", THINKING)
def test_reasoning_that_the_row_brings_is_learnt_where_the_template_shows_it(name: str) -> None:
    messages = [
        {**m, "reasoning_content": "hm"} if m["role"] == "assistant" else m for m in chat("q", "one", "r", "two")
    ]
    done = render_conversation(THINKING[name](), made("qwen3")[0], messages)
    thought = "<think>\nhm\n</think>\n\n"
    first = "one<|im_end|>" if name == "qwen3" else f"{thought}one<|im_end|>"
    assert [done.text[a:b] for a, b in done.spans] == [first, f"{thought}two<|im_end|>"]


def test_an_empty_thought_that_the_answer_itself_spells_is_learnt() -> None:
    assert trained("qwen3", chat("q", "<think>\n\n</think>\n\nyes")) == "<think>\n\n</think>\n\nyes<|im_end|>"


@pytest.mark.parametrize("name", ["llama31", "qwen3", "gemma3"])
def test_where_transformers_mask_is_all_zeros_ours_lies_on_the_answers(name: str) -> None:
    messages = chat("q", "one", "r", "two")
    theirs = made(name)[0].apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    assert sum(theirs) == 0, "transformers finds answers by generation markers only"
    end = FAMILIES[name].end
    assert trained(name, messages) == f"one{end}two{end}"
