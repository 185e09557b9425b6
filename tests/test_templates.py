"""The templates in chat_templates/: whole text, loss on each answer with its end token, begin token once."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import process, render
from scripts.utils.chat import TEMPLATES, choose_template, render_conversation, render_prompt, template_warnings
from scripts.utils.encoding import encode, encode_prompt
from scripts.utils.errors import UserError
from tests.test_chat import AGENT, chat, expressible, template
from tests.test_render import step
from tests.tiny_models import smollm2_tokenizer

# name: begin token, end token, and the other control tokens of the family
FAMILIES = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "gemma": ("<bos>", "<end_of_turn>", ["<start_of_turn>"]),
    "alpaca": ("<s>", "</s>", []),
    "chatml": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "plain": ("<s>", "</s>", []),
}


@functools.cache
def family_tokenizer(name: str) -> Any:
    """SmolLM2's tokenizer with a family's control tokens; the padding token is the end token."""
    return tokenizer_with(*FAMILIES[name])


def tokenizer_with(begin: str, end: str, others: list[str]) -> Any:
    tokenizer = copy.deepcopy(smollm2_tokenizer())
    tokenizer.add_special_tokens(
        {"bos_token": begin, "eos_token": end, "pad_token": end, "extra_special_tokens": others}
    )
    tokenizer.chat_template = None
    return tokenizer


WHOLE = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
    ),
    "gemma": "<bos><start_of_turn>user\ns\n\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n",
    "alpaca": "s\n\n### Instruction:\nq\n\n### Response:\na</s>\n\n",
    "chatml": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n",
    "plain": "s\n\n### User:\nq\n\n### Assistant:\na</s>\n\n",
}


def test_each_template_in_the_folder_is_tested_here() -> None:
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES) == set(WHOLE)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_has_the_familys_text(name: str) -> None:
    tokenizer = family_tokenizer(name)
    t = choose_template(tokenizer, name)
    assert render_conversation(t, tokenizer, chat("q", "a", system="s")).text == WHOLE[name]


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=40)
def test_the_trained_tokens_are_the_answers_with_their_end_tokens(name: str, data: st.DataObject) -> None:
    tokenizer, (begin, end, others) = family_tokenizer(name), FAMILIES[name]
    t = choose_template(tokenizer, name)
    letters = st.characters(exclude_categories=("Cs",)).filter(expressible)
    texts = st.lists(
        letters | st.sampled_from([begin, end, *others, "\n", " ", "### Response:\n"]), min_size=1, max_size=8
    )
    contents = data.draw(st.lists(texts.map("".join), min_size=2, max_size=6))
    contents = contents[: len(contents) // 2 * 2]
    messages = chat(*contents, system=data.draw(st.none() | st.just("") | texts.map("".join)))
    done = render_conversation(t, tokenizer, messages)
    encoded = encode(tokenizer, done.text, done.spans, done.literals)
    trained = [i for i, inside in zip(encoded.ids, encoded.trained, strict=True) if inside]
    assert tokenizer.decode(trained) == "".join(content + end for content in contents[1::2])
    assert tokenizer.decode(encoded.ids) == done.text
    assert trained.count(tokenizer.eos_token_id) == len(contents) // 2, "pad = end: it is trained all the same"
    assert encoded.ids.count(tokenizer.bos_token_id) == ("bos_token" in t.text)
    prompt = encode_prompt(tokenizer, render_prompt(t, tokenizer, messages[:-1]))
    assert encoded.ids[: len(prompt)] == prompt and encoded.trained[len(prompt)]


@pytest.mark.parametrize("name", FAMILIES)
def test_calls_and_results_become_text(name: str) -> None:
    tokenizer = family_tokenizer(name)
    done = render_conversation(choose_template(tokenizer, name), tokenizer, AGENT)
    texts = [done.text[a:b] for a, b in done.spans]
    assert len(texts) == 3 and "<tool_call>" in texts[1] and "<tool_response>\nsunny\n</tool_response>" in done.text
    assert not any("sunny" in text for text in texts)


@pytest.mark.parametrize("name", ["gemma", "alpaca", "plain"])
def test_a_role_that_the_form_has_not_is_refused(name: str) -> None:
    tokenizer = family_tokenizer(name)
    with pytest.raises(UserError, match=f"{name}.jinja knows system, user and assistant, not critic"):
        render_conversation(
            choose_template(tokenizer, name), tokenizer, [{"role": "critic", "content": "?"}, *chat("q", "a")]
        )


def test_another_template_than_the_models_own_is_said_with_the_markers_that_it_has_no_tokens_for() -> None:
    tokenizer = smollm2_tokenizer()
    assert template_warnings(choose_template(tokenizer, "auto"), tokenizer) == []
    [other] = template_warnings(choose_template(tokenizer, "chatml"), tokenizer)
    assert "chat_templates/chatml.jinja is not the template that the model brings" in other
    _, unknown = template_warnings(choose_template(tokenizer, "llama3"), tokenizer)
    assert "writes <|end_header_id|>, <|eot_id|>, <|start_header_id|>, which" in unknown
    for name in FAMILIES:  # without a template of its own there is none to differ from
        assert template_warnings(choose_template(family_tokenizer(name), name), family_tokenizer(name)) == []
    assert len(template_warnings(template("{# <|eot_id|> #}{{ messages }}"), tokenizer)) == 1


def test_render_warns_of_another_template(project: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    project()
    step(process)
    step(render)
    assert "is not the template" not in capsys.readouterr().err
    step(render, overrides="render.template=plain")
    assert "plain.jinja is not the template that the model brings" in capsys.readouterr().err
