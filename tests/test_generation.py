"""What generation promises, on a tiny Llama that was taught its answers with the real SmolLM2 tokenizer."""

import threading
import time
from contextlib import closing
from typing import Any

import pytest

from scripts.utils import generation
from scripts.utils.errors import UserError
from tests.tiny_models import smollm2_tokenizer, teach, tiny_llama

GREEDY: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.0, "top_p": 1.0, "seed": 0}
# the second answer spells the end marker out in letters; the third holds a special token that is no stop token
ANSWERS = {
    "What is the capital of Norway, the long country in the north of Europe?": "Oslo",
    "Spell the marker": "It is < | im _ end | > and more <| im_end |> text",
    "Three": "one two\nthree  four ",
    "Hi": "Привет 🙂 你好",
}


def prompt_ids(text: str) -> list[int]:
    return smollm2_tokenizer()(
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
    )["input_ids"]


@pytest.fixture(scope="module")
def taught() -> Any:
    tokenizer = smollm2_tokenizer()
    pairs = [(prompt_ids(q), tokenizer(a, add_special_tokens=False)["input_ids"] + [2]) for q, a in ANSWERS.items()]
    return teach(tiny_llama(), pairs)


def answer(model: Any, prompts: list[list[int]], **changes: Any) -> list[generation.Generated]:
    settings = {**GREEDY, "stop_ids": [2], "batch_size": 4, **changes}
    return generation.generate(model, smollm2_tokenizer(), prompts, **settings)


def test_answers_hold_no_prompt_no_stop_token_and_no_padding(taught: Any) -> None:
    found = answer(taught, [prompt_ids(q) for q in ANSWERS])
    assert [g.text for g in found] == list(ANSWERS.values())
    assert all(g.finished and 2 not in g.ids for g in found)


def test_order_is_kept_whatever_the_lengths_and_the_batch_size(taught: Any) -> None:
    questions = [*ANSWERS, *reversed(ANSWERS), "Hi"]
    for batch_size in (1, 2, 5, 64):
        counts: list[int] = []
        found = answer(taught, [prompt_ids(q) for q in questions], batch_size=batch_size, on_done=counts.append)
        assert [g.text for g in found] == [ANSWERS[q] for q in questions]
        assert sum(counts) == len(questions)
        assert max(counts) <= batch_size


def test_an_answer_stops_at_the_whole_stop_token_not_at_pieces_of_the_marker(taught: Any) -> None:
    tokenizer = smollm2_tokenizer()
    question = "Spell the marker"
    pieces = set(tokenizer("< | im _ end | > <| im_end |>", add_special_tokens=False)["input_ids"])
    (found,) = answer(taught, [prompt_ids(question)])
    assert pieces & set(found.ids)
    assert found.text == ANSWERS[question]


def test_an_end_token_in_the_prompt_is_neither_padding_nor_a_stop(taught: Any) -> None:
    """In SmolLM2 pad and end are one id: with a mask made from ids, the prompt's own end tokens would vanish."""
    import torch

    long, short = prompt_ids(next(iter(ANSWERS))), prompt_ids("Hi")
    assert 2 in short
    kept = torch.ones((1, len(short)), dtype=torch.long)
    with torch.no_grad():
        alone = taught(input_ids=torch.tensor([short]), attention_mask=kept).logits[0, -1].argmax()
    (_, batched) = answer(taught, [long, short])
    assert batched.ids[0] == int(alone)
    assert batched.text == ANSWERS["Hi"]


def test_temperature_zero_is_greedy_whatever_the_model_or_the_seed_say(taught: Any) -> None:
    import torch
    from transformers import GenerationConfig

    model = tiny_llama(seed=3)
    prompt = prompt_ids("Anything")
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=0, repetition_penalty=5.0, eos_token_id=ids[-2]
    )
    for seed in (0, 1):
        (found,) = answer(model, [prompt], max_new_tokens=12, stop_ids=[], seed=seed)
        assert found.ids == ids[len(prompt) :]
    assert model.generation_config.repetition_penalty == 5.0


def test_sampling_depends_on_the_seed_and_repeats_with_it() -> None:
    model, prompt = tiny_llama(seed=3), prompt_ids("Anything")
    runs = [answer(model, [prompt], temperature=1.0, max_new_tokens=12, seed=seed)[0].ids for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_top_p_narrows_sampling_to_the_likeliest_token() -> None:
    model, prompt = tiny_llama(seed=3), prompt_ids("Anything")
    greedy = answer(model, [prompt], max_new_tokens=8)[0].ids
    assert answer(model, [prompt], max_new_tokens=8, temperature=1.0, top_p=1e-6, seed=9)[0].ids == greedy


def test_generation_leaves_the_programs_random_state_alone() -> None:
    import torch

    state = torch.random.get_rng_state()
    answer(tiny_llama(), [prompt_ids("Hi")], temperature=1.0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_answer_cut_at_the_limit_says_so(taught: Any) -> None:
    (found,) = answer(taught, [prompt_ids("Three")], max_new_tokens=2)
    assert not found.finished
    assert len(found.ids) == 2


def test_special_tokens_never_appear_in_the_text(taught: Any) -> None:
    """With <|im_end|> not among the stop ids the model runs over it; the text still has no marker."""
    (found,) = answer(taught, [prompt_ids("Hi")], stop_ids=[])
    assert 2 in found.ids
    assert "<|im" not in found.text


def test_a_prompt_beyond_the_context_limit_is_an_error_before_anything_is_generated() -> None:
    done: list[int] = []
    with pytest.raises(UserError, match=r"prompt 2 has 40 tokens.*limit is 32"):
        answer(tiny_llama(context=32), [[5] * 8, [5] * 40], on_done=done.append)
    assert not done
    with pytest.raises(UserError, match="prompt 1 is empty"):
        answer(tiny_llama(), [[]])


def test_a_long_prompt_shortens_only_its_own_answer() -> None:
    model = tiny_llama(context=32)
    found = answer(model, [[5] * 28, [5] * 8], stop_ids=[], max_new_tokens=16)
    assert [len(g.ids) for g in found] == [4, 16]
    assert not found[0].finished


def test_adapter_models_answer_without_the_base_models_own_settings() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GenerationConfig

    base = tiny_llama(seed=3)
    greedy = answer(base, [prompt_ids("Hi")], max_new_tokens=8)[0].ids
    base.generation_config = GenerationConfig(do_sample=True, repetition_penalty=9.0)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert answer(wrapped, [prompt_ids("Hi")], max_new_tokens=8)[0].ids == greedy
    assert base.generation_config.repetition_penalty == 9.0


# --- streaming


def streamed(model: Any, prompt: list[int], **changes: Any) -> tuple[list[str], list[bool]]:
    ends: list[bool] = []
    settings = {**GREEDY, "stop_ids": [2], "on_end": ends.append, **changes}
    return list(generation.stream(model, smollm2_tokenizer(), prompt, **settings)), ends


@pytest.mark.parametrize("question", ANSWERS)
def test_streamed_pieces_join_to_the_same_answer(taught: Any, question: str) -> None:
    pieces, ends = streamed(taught, prompt_ids(question))
    assert "".join(pieces) == ANSWERS[question]
    assert ends == [True]


def test_a_stop_id_that_is_no_special_token_is_not_streamed(taught: Any) -> None:
    tokenizer = smollm2_tokenizer()
    stop = tokenizer(" four", add_special_tokens=False)["input_ids"]
    pieces, ends = streamed(taught, prompt_ids("Three"), stop_ids=stop)
    assert "".join(pieces) == "one two\nthree "
    assert ends == [True]


def test_a_streamed_answer_cut_at_the_limit_says_so(taught: Any) -> None:
    _, ends = streamed(taught, prompt_ids("Three"), max_new_tokens=2)
    assert ends == [False]


def test_closing_a_stream_stops_the_model() -> None:
    model = tiny_llama(seed=3)
    running, steps = threading.active_count(), [0]

    def count(*_: Any) -> None:
        steps[0] += 1
        time.sleep(0.01)  # else a model this small has written everything before the reader can stop it

    model.register_forward_hook(count)
    settings = {**GREEDY, "max_new_tokens": 200}
    with closing(generation.stream(model, smollm2_tokenizer(), prompt_ids("Hi"), **settings, stop_ids=[])) as pieces:
        next(pieces)
    assert threading.active_count() == running
    assert steps[0] < 150


def test_a_fault_while_streaming_reaches_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    model.lm_head = None
    with pytest.raises(TypeError):
        streamed(model, prompt_ids("Hi"))
