"""Answers from a model to batches of prompts, used by eval and infer alike; streaming.py writes one piece by piece.

The prompt is cut off by position, never searched for in the text. An answer ends at a whole stop id, at a text that
was asked for, or at the token limit, never at a piece of a marker. Padding is known by its position: in SmolLM2 the pad token is the end token.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts.utils.errors import MachineError, UserError
from scripts.utils.sampling import Draw, StopAtText, cut_at

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

    from scripts.utils.json_schema import Schema


@dataclass(frozen=True)
class Generated:
    """One answer: text and ids without prompt, stop token and padding.

    ``finished`` is False where the answer was cut at the token limit.
    """

    text: str
    ids: list[int]
    finished: bool


def context_limit(model: "PreTrainedModel") -> int | None:
    """The most tokens, prompt and answer together, that the model was built for; None when its config has no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit) if limit else None


def check_lengths(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], names: Sequence[str] | None = None
) -> None:
    """Raise ``UserError`` for an empty prompt, or one that leaves no room for an answer; ``names`` says where each is from."""
    limit = context_limit(model)
    for number, prompt in enumerate(prompts):
        name = names[number] if names else f"prompt {number + 1}"
        if not prompt:
            raise UserError(f"{name} is empty: it has no tokens", "write something to answer")
        if limit and len(prompt) >= limit:
            raise UserError(
                f"{name} has {len(prompt):,} tokens, and this model's limit is {limit:,} with the answer included",
                "shorten the prompt, or split it",
            )


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop_ids: Sequence[int],
    batch_size: int,
    on_done: Callable[[int], None] | None = None,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    schema: "Schema | None" = None,
) -> list[Generated]:
    """Answer every prompt (token ids); answer ``i`` belongs to prompt ``i``.

    ``temperature`` 0 takes the likeliest token each time. Above it, prompt ``i`` draws with ``seeds[i]`` (``seed + i``
    where none are given), whatever its batch. ``stop``: texts that end an answer and are no part of it; ``schema``:
    every answer is JSON of that shape. ``on_done`` is called after each batch with the number of answers in it. Raises
    ``UserError`` for a prompt beyond the context limit, before anything is generated, and ``MachineError`` when the
    device's memory is full.
    """
    import torch

    check_lengths(model, prompts)
    answers: dict[int, Generated] = {}
    for batch in batches(prompts, batch_size, max_new_tokens, context_limit(model)):
        longest = max(len(prompts[row]) for row in batch)
        # any id will do for padding: the attention mask says where it lies
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(batch):
            ids[line, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
            mask[line, longest - len(prompts[row]) :] = 1
        config = greedy(room(model, longest, max_new_tokens), stop_ids)
        own_seeds = [seeds[row] if seeds else seed + row for row in batch]
        processors = processors_of(temperature, top_p, own_seeds, schema)
        at_text = StopAtText(functools.partial(decode, tokenizer), stop, longest) if stop else None
        with memory_errors(), own_settings(model):
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=[at_text] if at_text else None,
            )
        for line, (row, new) in enumerate(zip(batch, output[:, longest:].tolist(), strict=True)):
            answers[row] = _cut(tokenizer, new[: at_text.ends.get(line) if at_text else None], stop_ids, stop)
        if on_done:
            on_done(len(batch))
    return [answers[row] for row in range(len(prompts))]


def batches(
    prompts: Sequence[list[int]], batch_size: int, max_new_tokens: int, limit: int | None
) -> Iterator[list[int]]:
    """Row numbers in batches of like length, the longest first, so that a lack of memory shows at once.

    A prompt so long that the context limit shortens its answer goes alone and shortens no other row's answer.
    """
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    alone = [row for row in order if limit and len(prompts[row]) + max_new_tokens > limit]
    yield from ([row] for row in alone)
    rest = order[len(alone) :]
    for start in range(0, len(rest), batch_size):
        yield rest[start : start + batch_size]


def processors_of(
    temperature: float, top_p: float, seeds: Sequence[int], schema: "Schema | None"
) -> "LogitsProcessorList":
    from transformers import LogitsProcessorList

    within = [schema.processor(len(seeds))] if schema else []
    return LogitsProcessorList(within + ([Draw(temperature, top_p, seeds)] if temperature > 0 else []))


def room(model: "PreTrainedModel", prompt_tokens: int, max_new_tokens: int) -> int:
    limit = context_limit(model)
    return min(max_new_tokens, limit - prompt_tokens) if limit else max_new_tokens


def _cut(
    tokenizer: "PreTrainedTokenizerBase", new: list[int], stop_ids: Sequence[int], stop: Sequence[str]
) -> Generated:
    """The answer up to its first stop id (what follows is padding), its text up to the first stop."""
    end = next((position for position, token in enumerate(new) if token in stop_ids), None)
    ids = new if end is None else new[:end]
    text, stopped = cut_at(decode(tokenizer, ids), stop)
    return Generated(text, ids, end is not None or stopped)


def decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """Text of ``ids`` without special tokens, spaces left as the model wrote them."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def greedy(max_new_tokens: int, stop_ids: Sequence[int]) -> "GenerationConfig":
    """Greedy: where a token is drawn, ``Draw`` leaves one possible."""
    from transformers import GenerationConfig

    stops = list(stop_ids) or None
    return GenerationConfig(
        max_new_tokens=max_new_tokens, num_beams=1, do_sample=False, eos_token_id=stops, pad_token_id=0
    )


@contextlib.contextmanager
def own_settings(model: "PreTrainedModel") -> Iterator[None]:
    """Generate without the model's own generation config, in eval mode.

    transformers fills whatever a generation config leaves open from the model's (a repetition penalty, top-k), so
    that temperature 0 would not be greedy and the config file would not say what happens.
    """
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    owners = [owner for owner in {id(m): m for m in (model, base)}.values() if hasattr(owner, "generation_config")]
    kept = [owner.generation_config for owner in owners]
    training = model.training
    model.eval()
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in zip(owners, kept, strict=True):
            owner.generation_config = config
        model.train(training)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(
            "the device's memory is full", "lower eval.batch_size or infer.batch_size, or max_new_tokens"
        ) from error
