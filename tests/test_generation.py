"""What generation promises, on a tiny Llama that was taught its answers with the real SmolLM2 tokenizer."""

import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.utils import generation, json_schema, sampling, streaming
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


# --- drawing


def test_what_a_row_draws_depends_on_its_own_seed_and_on_no_neighbour() -> None:
    model, prompts = tiny_llama(seed=3), [prompt_ids(text) for text in ("Anything", "Hi", "A longer prompt than those")]
    seeds = [11, 22, 33]
    settings: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 12, "stop_ids": []}
    together = answer(model, prompts, seeds=seeds, batch_size=3, **settings)
    alone = [answer(model, [p], seeds=[s], **settings)[0] for p, s in zip(prompts, seeds, strict=True)]
    back = answer(model, prompts[::-1], seeds=seeds[::-1], batch_size=2, **settings)[::-1]
    assert [g.ids for g in together] == [g.ids for g in alone] == [g.ids for g in back]
    assert answer(model, prompts[:1], seeds=[12], **settings)[0].ids != together[0].ids


@pytest.mark.parametrize("top_p", [1.0, 0.75])
def test_tokens_are_drawn_as_often_as_they_are_likely(top_p: float) -> None:
    import torch

    rows, chances = 20_000, [0.4, 0.3, 0.0, 0.2, 0.1]
    temperature = 2.0
    scores = (torch.tensor(chances).log() * temperature).repeat(rows, 1)
    draw = sampling.Draw(temperature, top_p, range(rows))
    found = torch.bincount(draw(torch.zeros((rows, 1), dtype=torch.long), scores).argmax(-1), minlength=5) / rows
    expected = torch.tensor(chances if top_p == 1 else [4 / 9, 3 / 9, 0.0, 2 / 9, 0.0])
    assert (found - expected).abs().max() < 0.015
    assert found[2] == 0


def test_a_draw_leaves_exactly_one_token_whatever_is_forbidden() -> None:
    import torch

    scores = torch.full((3, 1000), float("-inf"))
    scores[0, 999], scores[1, 0], scores[2, 500:] = 0.0, -1e4, 0.0
    for seed in range(50):
        left = sampling.Draw(0.7, 0.9, [seed] * 3)(torch.zeros((3, 1), dtype=torch.long), scores)
        assert (left == 0).sum(-1).tolist() == [1, 1, 1]
        assert left[0].argmax() == 999 and left[1].argmax() == 0 and left[2].argmax() >= 500


# --- stop texts

TEXT = st.text(alphabet="ab\n🙂", max_size=20)
STOPS = st.lists(st.text(alphabet="ab\n🙂", min_size=1, max_size=4), max_size=3)


@given(TEXT, STOPS)
def test_a_text_is_cut_at_the_first_stop(text: str, stops: list[str]) -> None:
    kept, stopped = sampling.cut_at(text, stops)
    assert text.startswith(kept) and not any(stop in kept for stop in stops)
    assert stopped == any(stop in text for stop in stops) == any(text[len(kept) :].startswith(s) for s in stops)


@given(TEXT, TEXT, STOPS)
def test_what_is_not_held_back_can_never_become_part_of_a_stop(text: str, more: str, stops: list[str]) -> None:
    text = sampling.cut_at(text, stops)[0]
    shown = text[: len(text) - sampling.held_back(text, stops)]
    assert sampling.cut_at(text + more, stops)[0].startswith(shown)


@pytest.mark.parametrize("stop", [" four", "two\nth", "e", "\n", "три", "🙂", "вет 🙂 你"])
def test_an_answer_ends_before_a_stop_text_however_its_tokens_lie(taught: Any, stop: str) -> None:
    """In batches as in pieces; a character of several tokens is no exception."""
    found = answer(taught, [prompt_ids(q) for q in ANSWERS], stop=["no such text", stop])
    assert [g.text for g in found] == [text.partition(stop)[0] for text in ANSWERS.values()]
    assert all(g.finished for g in found)
    for question, text in ANSWERS.items():
        pieces, ends = streamed(taught, prompt_ids(question), stop=["no such text", stop])
        assert "".join(pieces) == text.partition(stop)[0] and ends == [True]


def test_a_stop_text_in_the_prompt_or_in_the_padding_stops_nothing() -> None:
    """Token 0 fills up a row that has ended; here it is a letter like any other."""
    model = tiny_llama(seed=3)
    prompts = [prompt_ids("stop right here"), prompt_ids("Hi")]
    plain = answer(model, prompts, max_new_tokens=6, stop_ids=[])
    first = smollm2_tokenizer().decode(plain[1].ids[:2])
    stopped = answer(model, prompts, max_new_tokens=6, stop_ids=[], stop=["stop right", first])
    assert stopped[0].ids == plain[0].ids and not stopped[0].finished
    assert len(stopped[1].ids) == 2 and stopped[1].text == "" and stopped[1].finished


# --- JSON


def schema(text: str, tmp_path: Path) -> json_schema.Schema:
    (tmp_path / "s.json").write_text(text)
    return json_schema.read(tmp_path / "s.json").ready(smollm2_tokenizer(), [2])


def test_a_schema_holds_in_batches_and_pieces_alike(tmp_path: Path) -> None:
    import json

    held = schema('{"type": "array", "items": {"enum": ["a", 1, null]}, "minItems": 2, "maxItems": 4}', tmp_path)
    model, prompts = tiny_llama(seed=3), [prompt_ids(text) for text in ("Anything", "Hi", "List three of them")]
    settings: dict[str, Any] = {"temperature": 3.0, "max_new_tokens": 40, "schema": held, "stop_ids": [2]}
    found = answer(model, prompts, seeds=[1, 2, 3], **settings)
    for given_answer in found:
        assert given_answer.finished
        values = json.loads(given_answer.text)
        assert 2 <= len(values) <= 4 and all(value in ("a", 1, None) for value in values)
    pieces, ends = streamed(model, prompts[1], seed=2, **settings)
    assert "".join(pieces) == found[1].text and ends == [True]


# --- streaming


def streamed(model: Any, prompt: list[int], **changes: Any) -> tuple[list[str], list[bool]]:
    ends: list[bool] = []
    settings = {**GREEDY, "stop_ids": [2], "on_end": ends.append, **changes}
    return list(streaming.stream(model, smollm2_tokenizer(), prompt, **settings)), ends


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
    with closing(streaming.stream(model, smollm2_tokenizer(), prompt_ids("Hi"), **settings, stop_ids=[])) as pieces:
        next(pieces)
    assert threading.active_count() == running
    assert steps[0] < 150


def test_a_fault_while_streaming_reaches_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    model.lm_head = None
    with pytest.raises(TypeError):
        streamed(model, prompt_ids("Hi"))


def test_an_event_stops_a_stream_and_says_that_it_is_not_whole() -> None:
    model, stopped = tiny_llama(seed=3), threading.Event()
    model.register_forward_hook(lambda *_: time.sleep(0.01))
    pieces = []
    ends: list[bool] = []
    settings = {**GREEDY, "max_new_tokens": 200, "stop_ids": [], "on_end": ends.append, "stopped": stopped}
    for piece in streaming.stream(model, smollm2_tokenizer(), prompt_ids("Hi"), **settings):
        pieces.append(piece)
        stopped.set()
    assert len(pieces) < 20 and ends == [False]


def test_a_tokenizer_that_answered_within_a_schema_can_still_be_copied(tmp_path):
    """Seen: what the grammar library makes of a tokenizer lay in the tokenizer, and could not be copied with it."""
    import copy

    import torch

    processor = schema('{"type": "object", "properties": {"a": {"type": "integer"}}}', tmp_path).processor(1)
    processor(torch.tensor([[5]]), torch.zeros(1, len(smollm2_tokenizer())))
    assert len(copy.deepcopy(smollm2_tokenizer())) == len(smollm2_tokenizer())
