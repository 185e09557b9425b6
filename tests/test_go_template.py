"""Chat templates as Ollama's Go templates: the same text for the forms in use, refused where the form cannot be said."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.utils import chat, go_template, modelfile
from scripts.utils.errors import UserError
from tests import go_subset
from tests.test_templates import FAMILIES, family_tokenizer, tokenizer_with
from tests.tiny_models import smollm2_tokenizer

PUBLISHED = {
    "chatml": ("<|endoftext|>", "<|im_end|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "gemma3": ("<bos>", "<end_of_turn>"),
    "llama31": ("<|begin_of_text|>", "<|eot_id|>"),
    "phi": ("<|endoftext|>", "<|end|>"),
    "qwen25": ("<|endoftext|>", "<|im_end|>"),
    "qwen3": ("<|endoftext|>", "<|im_end|>"),
    "zephyr": ("<s>", "</s>"),
}


def template(text: str) -> chat.Template:
    return chat._template(text, "a test")


def published(name: str) -> tuple[chat.Template, Any]:
    text = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text()
    return template(text), tokenizer_with(*PUBLISHED.get(name, ("<s>", "</s>")), [])


def form_of(name: str) -> tuple[go_template.Form, list[str], chat.Template, Any]:
    if name == "smollm2":
        tokenizer = smollm2_tokenizer()
        chosen = chat.choose_template(tokenizer, "auto")
    elif name in PUBLISHED:
        chosen, tokenizer = published(name)
    else:
        tokenizer = family_tokenizer(name)
        chosen = chat.choose_template(tokenizer, name)
    return *go_template.form_of(chosen, tokenizer), chosen, tokenizer


@pytest.mark.parametrize("name", ["smollm2", *FAMILIES, *(name for name in PUBLISHED if name not in FAMILIES)])
def test_the_go_template_writes_what_the_run_was_trained_with(name: str) -> None:
    form, _, chosen, tokenizer = form_of(name)
    text = go_template.go_text(form)
    for sample in go_template.samples():
        assert go_subset.render(text, sample) == chat.render_prompt(chosen, tokenizer, sample).text


def test_what_the_go_template_cannot_say_is_said() -> None:
    assert form_of("smollm2")[1] == []
    notes = form_of("llama31")[1]
    assert any("trims" in note for note in notes) and any("tools" in note for note in notes)
    dated = template("{{ strftime_now('%d %b %Y') }}|{% for m in messages %}<u>{{ m.content }}</u>\n{% endfor %}<a>")
    notes = go_template.form_of(dated, smollm2_tokenizer())[1]
    assert any("date" in note for note in notes), notes


@pytest.mark.parametrize(
    "text",
    [
        (
            Path(__file__).parent / "templates" / "mistral.jinja"
        ).read_text(),  # the system message goes into the last turn
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}A:",
        "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}<a>",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.content|length > 9 %}!{% endif %}{% endfor %}<a>",
        "hello",
    ],
    ids=["mistral", "last only", "numbered", "capitals", "by length", "constant"],
)
def test_a_form_that_cannot_be_said_is_refused_with_the_way_out(text: str) -> None:
    with pytest.raises(UserError, match="cannot be written as a Go template") as caught:
        go_template.form_of(template(text), tokenizer_with("<s>", "</s>", []))
    assert "llama.cpp" in caught.value.hint


def test_a_begin_token_that_the_runtime_adds_is_left_out() -> None:
    form = form_of("llama3")[0]
    one = [{"role": "user", "content": "hi"}]
    whole = go_subset.render(go_template.go_text(form), one)
    assert whole == "<|begin_of_text|>" + go_subset.render(go_template.go_text(form, "<|begin_of_text|>"), one)


odd_text = st.text(alphabet='ab <|>"\\\n\t{}#.é', max_size=8)
roles = st.fixed_dictionaries(dict.fromkeys(("system", "user", "assistant"), odd_text))


@settings(max_examples=200)
@given(
    form=st.builds(
        go_template.Form,
        opening=odd_text,
        default=odd_text,
        before=roles,
        after=roles,
        prompt=odd_text,
        joined=st.booleans(),
    ),
    talk=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), odd_text), min_size=1, max_size=4),
    system=st.text(min_size=1, max_size=5) | st.none(),
)
def test_any_text_in_the_parts_comes_out_as_it_is(
    form: go_template.Form, talk: list[tuple[str, str]], system: str | None
) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": role, "content": content} for role, content in talk]
    assert go_subset.render(go_template.go_text(form), messages) == form.render(messages)


def test_a_modelfile_is_read_back_as_it_was_meant() -> None:
    form = form_of("smollm2")[0]
    meant = modelfile.Settings(0.0, 0.9, 4096, ["<|im_end|>", "</s>"], "Answer as the desk.\nBriefly.")
    text = modelfile.text_of("../gguf/a b.gguf", form, meant, comments=["run x"], bos="")
    found = modelfile.read(text)
    assert ("FROM", "../gguf/a b.gguf") in found and ("SYSTEM", meant.system) in found
    assert ("TEMPLATE", go_template.go_text(form)) in found
    assert [value for name, value in found if name == "PARAMETER"] == [
        ("stop", "<|im_end|>"),
        ("stop", "</s>"),
        ("temperature", 0.0),
        ("top_p", 0.9),
        ("num_ctx", 4096.0),
    ]
    with pytest.raises(UserError, match="Modelfile cannot hold"):
        modelfile.text_of("x", form, modelfile.Settings(0, 1, 1, [], 'Say """'), comments=[], bos="")
    with pytest.raises(ValueError, match="not a line"):
        modelfile.read("FROM x\nTEMPLAT y\n")
