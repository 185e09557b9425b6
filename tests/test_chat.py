"""Templates and spans: the loss lies on the assistant's words and end tokens, and nowhere else."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.utils.chat import Template, choose_template, render_conversation, render_prompt
from scripts.utils.encoding import encode, encode_prompt
from scripts.utils.errors import UserError
from tests.tiny_models import smollm2_tokenizer

# shapes of templates in the field, written for these tests
LLAMA_STYLE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|sep|>\\n\\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|sep|>\\n\\n' }}{% endif %}"
)
REASONING_STYLE = (  # takes the reasoning out of earlier turns, puts an empty one into the last
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT_STYLE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def template(text: str) -> Template:
    return Template(text, "test", hashlib.sha256(text.encode()).hexdigest())


def expressible(text: str) -> bool:
    """SmolLM2's vocabulary lacks some bytes, such as 0x1d: render warns of rows that hold them."""
    tokenizer = smollm2_tokenizer()
    return bool(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text)


def own() -> Template:
    return choose_template(smollm2_tokenizer(), "auto")


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def trained_texts(t: Template, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    done = render_conversation(t, smollm2_tokenizer(), messages, **options)
    return [done.text[start:end] for start, end in done.spans]


ALL = {
    "own": own,
    "chatml": lambda: choose_template(smollm2_tokenizer(), "chatml"),
    "plain": lambda: choose_template(smollm2_tokenizer(), "plain"),
    "llama": lambda: template(LLAMA_STYLE),
    "reasoning": lambda: template(REASONING_STYLE),
    "strict": lambda: template(STRICT_STYLE),
}


@pytest.mark.parametrize("name", ALL)
def test_loss_lies_on_each_answer_with_its_end_token(name: str) -> None:
    texts = trained_texts(ALL[name](), chat("Hello?", "Yes.", "And now?", "No."))
    assert [text.replace("<think>\n\n</think>\n\n", "") for text in texts] == ["Yes.<|im_end|>", "No.<|im_end|>"]


@pytest.mark.parametrize("name", ALL)
def test_training_and_inference_send_the_same_ids(name: str) -> None:
    tokenizer, t = smollm2_tokenizer(), ALL[name]()
    messages = chat("Count: 12 345", "\n one", "x\n\n", " two ", "?", "three")
    done = render_conversation(t, tokenizer, messages)
    whole = encode(tokenizer, done.text, done.spans).ids
    prompt = encode(tokenizer, done.text[: done.prompt_end], done.prompt_spans).ids
    assert whole[: len(prompt)] == prompt
    if name != "reasoning":  # it shows the last turn differently than the generation prompt says
        assert encode_prompt(tokenizer, render_prompt(t, tokenizer, messages[:-1])) == prompt


@pytest.mark.parametrize("name", ["own", "chatml", "plain"])
@given(
    contents=st.lists(
        st.text(st.characters(exclude_categories=("Cs",)).filter(expressible), min_size=1, max_size=30),
        min_size=2,
        max_size=6,
    )
)
@settings(max_examples=60)
def test_decoded_trained_tokens_are_the_answers_and_their_end_tokens(name: str, contents: list[str]) -> None:
    tokenizer, t = smollm2_tokenizer(), ALL[name]()
    contents = contents[: len(contents) // 2 * 2]
    messages = chat(*contents)
    done = render_conversation(t, tokenizer, messages)
    encoded = encode(tokenizer, done.text, done.spans)
    trained = tokenizer.decode([i for i, inside in zip(encoded.ids, encoded.trained, strict=True) if inside])
    assert trained == "".join(text + "<|im_end|>" for text in contents[1::2])
    assert tokenizer.decode(encoded.ids) == done.text


def test_a_break_after_the_end_token_carries_no_loss() -> None:
    done = render_conversation(own(), smollm2_tokenizer(), chat("a", "b"))
    assert done.text.endswith("<|im_end|>\n") and done.spans[-1][1] == len(done.text) - 1


def test_the_prompt_ends_where_the_model_writes_and_the_reference_is_the_last_answer() -> None:
    done = render_conversation(own(), smollm2_tokenizer(), chat("a", "b", "c", "d", system="s"))
    assert done.text[: done.prompt_end].endswith("<|im_start|>assistant\n")
    assert done.reference == "d" and [done.text[a:b] for a, b in done.prompt_spans] == ["b<|im_end|>"]


def test_train_on_all_puts_loss_on_the_whole_text_and_keeps_the_prompt() -> None:
    done = render_conversation(own(), smollm2_tokenizer(), chat("a", "b"), train_on="all")
    assert done.spans == [(0, len(done.text))] and done.text[done.prompt_end :].startswith("b")


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
AGENT = [
    *chat("Hello?", "Yes.", "Rain?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "No."},
]
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", ["Yes.<|im_end|>", CALLED, "No.<|im_end|>"]),
        ("last_assistant", ["No.<|im_end|>"]),
        ("completion", [CALLED, "No.<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("name", ["own", "chatml", "plain", "llama"])
def test_train_on_chooses_the_turns_that_carry_loss(name: str, train_on: Any, expected: list[str]) -> None:
    assert trained_texts(ALL[name](), AGENT, train_on=train_on) == expected
    tools = [{"type": "function", "function": {"name": "weather"}}]
    assert trained_texts(ALL[name](), AGENT, tools=tools, train_on=train_on) == expected


def without_loss(messages: list[dict[str, Any]], *turns: int) -> list[dict[str, Any]]:
    return [{**m, "train": False} if n in turns else m for n, m in enumerate(messages)]


@pytest.mark.parametrize("name", ["own", "chatml", "plain", "llama"])
def test_a_message_with_train_false_carries_no_loss(name: str) -> None:
    t, messages = ALL[name](), chat("a", "bb", "c", "dd", "e", "ff")
    assert trained_texts(t, without_loss(messages, 3)) == ["bb<|im_end|>", "ff<|im_end|>"]
    first, second = trained_texts(t, without_loss(messages, 3), train_on="all")
    whole = render_conversation(t, smollm2_tokenizer(), messages).text
    assert first + "dd<|im_end|>" + second == whole, "the flag itself is never shown"
    done = render_conversation(t, smollm2_tokenizer(), without_loss(messages, 5))
    assert done.reference == "dd" and done.text[done.prompt_end :].startswith("dd"), "eval asks for what was learnt"


@pytest.mark.parametrize("train_on", ["last_assistant", "completion"])
def test_a_conversation_in_which_no_turn_trains_is_refused_with_its_reason(train_on: Any) -> None:
    with pytest.raises(UserError, match="no turn of it carries loss"):
        trained_texts(own(), without_loss(chat("a", "b", "c", "d"), 3), train_on=train_on)
    with pytest.raises(UserError, match="train_on: all"):
        trained_texts(own(), without_loss(chat("a", "b"), 0), train_on="all")


def test_markers_that_stand_twice_in_a_turn_still_belong_to_it() -> None:
    t = template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content[0] }}{% endgeneration %}-{% generation %}{{ m.content[1:] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = chat("a", "bcd", "e", "fgh")
    assert trained_texts(t, messages, train_on="last_assistant") == ["f", "gh<|im_end|>"]
    assert trained_texts(t, without_loss(messages, 3)) == ["b", "cd<|im_end|>"]


def test_a_conversation_that_the_template_refuses_gives_its_reason() -> None:
    with pytest.raises(UserError, match="roles must alternate"):
        render_conversation(template(STRICT_STYLE), smollm2_tokenizer(), chat("a", "b", system="s"))


def test_a_conversation_without_an_answer_is_refused() -> None:
    with pytest.raises(UserError, match="no assistant turn"):
        render_conversation(own(), smollm2_tokenizer(), chat("a"))


def test_a_template_that_reaches_outside_is_refused(tmp_path: Path) -> None:
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="unsafe"):
        render_conversation(template(evil), smollm2_tokenizer(), chat("a", "b"))


def test_tools_become_text_where_the_template_knows_none() -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "No."},
    ]
    done = render_conversation(own(), smollm2_tokenizer(), messages, tools)
    texts = [done.text[a:b] for a, b in done.spans]
    assert texts[0] == '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>'
    assert texts[1] == "No.<|im_end|>"
    assert '"name": "weather", "parameters"' in done.text and "sunny" in done.text
    assert messages[1]["content"] == "", "the caller's rows must stay as they are"


def test_the_template_is_the_models_own_by_default_and_the_configs_where_it_says_so(tmp_path: Path) -> None:
    tokenizer = smollm2_tokenizer()
    assert own().text == tokenizer.chat_template
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert choose_template(tokenizer, str(path)).text == path.read_text()
    with pytest.raises(UserError, match=r"alpaca, chatml, gemma, llama3, plain"):
        choose_template(tokenizer, "no-such-template")


def test_a_model_without_a_template_gets_the_plain_one() -> None:
    import copy

    bare = copy.deepcopy(smollm2_tokenizer())
    bare.chat_template = None
    assert "plain.jinja" in choose_template(bare, "auto").source


def test_private_use_letters_in_a_conversation_hide_no_turn() -> None:
    """The probe that finds a rewritten turn is made of such letters: others than those that the conversation holds."""
    closed = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
    )
    messages = chat("\ue000 and \ue001", "\ue001one\ue000", "r", "\ue000\ue001")
    done = render_conversation(template(closed), smollm2_tokenizer(), messages)
    assert [done.text[a:b] for a, b in done.spans] == ["\ue001one\ue000<|im_end|>", "\ue000\ue001<|im_end|>"]
