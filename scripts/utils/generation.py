"""Answers from a model: batches of prompts, or one answer piece by piece. Used by eval and infer alike.

The prompt is cut off by position, never searched for in the text. An answer ends at a whole stop id or at the token
limit, never at a piece of a marker. Padding is known by its position: in SmolLM2 the pad token is the end token.
"""

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.utils.errors import MachineError, UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


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
) -> list[Generated]:
    """Answer every prompt (token ids); answer ``i`` belongs to prompt ``i``.

    ``temperature`` 0 takes the likeliest token each time. Sampling repeats with the same seed, prompts and batch
    size. ``on_done`` is called after each batch with the number of answers in it. Raises ``UserError`` for a
    prompt beyond the context limit, before anything is generated, and ``MachineError`` when the device's memory is full.
    """
    import torch

    check_lengths(model, prompts)
    answers: dict[int, Generated] = {}
    for number, batch in enumerate(batches(prompts, batch_size, max_new_tokens, context_limit(model))):
        longest = max(len(prompts[row]) for row in batch)
        # any id will do for padding: the attention mask says where it lies
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(batch):
            ids[line, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
            mask[line, longest - len(prompts[row]) :] = 1
        config = _settings(_room(model, longest, max_new_tokens), temperature, top_p, stop_ids)
        with _seeded(model, seed + number), _memory_errors(), _own_settings(model):
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
        for row, new in zip(batch, output[:, longest:].tolist(), strict=True):
            answers[row] = _cut(tokenizer, new, stop_ids)
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


def _room(model: "PreTrainedModel", prompt_tokens: int, max_new_tokens: int) -> int:
    limit = context_limit(model)
    return min(max_new_tokens, limit - prompt_tokens) if limit else max_new_tokens


def _cut(tokenizer: "PreTrainedTokenizerBase", new: list[int], stop_ids: Sequence[int]) -> Generated:
    """The answer up to its first stop id; what follows is padding."""
    end = next((position for position, token in enumerate(new) if token in stop_ids), None)
    ids = new if end is None else new[:end]
    return Generated(decode(tokenizer, ids), ids, end is not None)


def decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """Text of ``ids`` without special tokens, spaces left as the model wrote them."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _settings(max_new_tokens: int, temperature: float, top_p: float, stop_ids: Sequence[int]) -> "GenerationConfig":
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        # top_k: transformers' default is 50, and nobody asked for it
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    stops = list(stop_ids) or None
    return GenerationConfig(max_new_tokens=max_new_tokens, num_beams=1, eos_token_id=stops, pad_token_id=0, **sampling)


@contextlib.contextmanager
def _own_settings(model: "PreTrainedModel") -> Iterator[None]:
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
def _seeded(model: "PreTrainedModel", seed: int) -> Iterator[None]:
    """Draw from ``seed`` and leave the program's own random state as it was."""
    import torch

    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(
            "the device's memory is full", "lower eval.batch_size or infer.batch_size, or max_new_tokens"
        ) from error


def stream(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop_ids: Sequence[int],
    on_end: Callable[[bool], None] | None = None,
) -> Generator[str, None, None]:
    """Yield one answer piece by piece; the pieces joined are what ``generate`` gives.

    Closing the iterator, or an exception in it such as Ctrl-C, stops the model after its current token.
    ``on_end`` is called with ``finished`` (see ``Generated``) when the answer came to an end by itself. Raises as
    ``generate`` does.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    check_lengths(model, [prompt])
    stopped = threading.Event()
    outcome: dict[str, Any] = {"finished": False}

    class Pieces(TextIteratorStreamer):
        def put(self, value: Any) -> None:
            # a stop id need not be a special token, so skip_special_tokens is not enough to keep it out
            if not self.next_tokens_are_prompt and int(value.reshape(-1)[-1]) in stop_ids:
                outcome["finished"] = True
                return
            super().put(value)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

    pieces = Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    config = _settings(_room(model, len(prompt), max_new_tokens), temperature, top_p, stop_ids)
    ids = torch.tensor([prompt], device=model.device)

    def answer() -> None:
        try:
            with _seeded(model, seed), _memory_errors(), _own_settings(model):
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    streamer=pieces,
                    stopping_criteria=StoppingCriteriaList([Stop()]),
                )
        except BaseException as error:  # handed to the reader, in whose thread it can be dealt with
            outcome["error"] = error
            pieces.on_finalized_text("", stream_end=True)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in pieces if piece)
    finally:
        stopped.set()
        thread.join()
    if "error" in outcome:
        raise outcome["error"]
    if on_end:
        on_end(outcome["finished"])
