"""One answer from a model, piece by piece as it is written."""

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from scripts.utils.generation import check_lengths, greedy, memory_errors, own_settings, processors_of, room
from scripts.utils.sampling import cut_at, held_back

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

    from scripts.utils.json_schema import Schema


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
    stop: Sequence[str] = (),
    schema: "Schema | None" = None,
    stopped: threading.Event | None = None,
) -> Generator[str, None, None]:
    """Yield one answer piece by piece; the pieces joined are what ``generate`` gives.

    Closing the iterator, setting ``stopped``, or an exception in it such as Ctrl-C, stops the model after its current
    token. ``on_end`` is called with ``finished`` (see ``Generated``) when the answer came to an end by itself. Raises as
    ``generate`` does.
    """
    ended: list[bool] = []
    processors = processors_of(temperature, top_p, [seed], schema)
    pieces = _pieces(model, tokenizer, prompt, max_new_tokens, stop_ids, processors, stopped, ended.append)
    waiting = ""
    with contextlib.closing(pieces):
        for piece in pieces:
            waiting, at_stop = cut_at(waiting + piece, stop)
            if at_stop:
                ended = [True]
                break
            safe = len(waiting) - held_back(waiting, stop)
            if safe:
                yield waiting[:safe]
            waiting = waiting[safe:]
    if waiting:
        yield waiting
    if on_end and ended:
        on_end(ended[0])


def _pieces(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: list[int],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    processors: "LogitsProcessorList",
    stopped: threading.Event | None,
    on_end: Callable[[bool], None],
) -> Generator[str, None, None]:
    """The text as the model writes it, in a thread of its own, up to a stop id, the token limit or ``stopped``."""
    import torch
    from transformers import TextIteratorStreamer

    check_lengths(model, [prompt])
    outcome: dict[str, Any] = {"finished": False}
    closed = threading.Event()

    class Pieces(TextIteratorStreamer):
        def put(self, value: Any) -> None:
            # a stop id need not be a special token, so skip_special_tokens is not enough to keep it out
            if not self.next_tokens_are_prompt and int(value.reshape(-1)[-1]) in stop_ids:
                outcome["finished"] = True
                return
            super().put(value)

    def stop(input_ids: Any, scores: Any, **_: Any) -> Any:
        over = closed.is_set() or (stopped is not None and stopped.is_set())
        return torch.full((input_ids.shape[0],), over, device=input_ids.device)

    pieces = Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    config = greedy(room(model, len(prompt), max_new_tokens), stop_ids)
    ids = torch.tensor([prompt], device=model.device)

    def answer() -> None:
        try:
            with memory_errors(), own_settings(model):
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    streamer=pieces,
                    logits_processor=processors,
                    stopping_criteria=[stop],
                )
        except BaseException as error:  # handed to the reader, in whose thread it can be dealt with
            outcome["error"] = error
            pieces.on_finalized_text("", stream_end=True)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in pieces if piece)
    finally:
        closed.set()
        thread.join()
    if "error" in outcome:
        raise outcome["error"]
    on_end(outcome["finished"])
