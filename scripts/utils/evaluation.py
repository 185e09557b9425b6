"""What one side, base or tuned, makes of the rows: the loss of each over its trained tokens, and its greedy answer.

Both sides come from one load of the model where an adapter can be switched off, and go through the same encoding as
training did. What was computed before is taken from the cache (answer_cache.py), batch by batch.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from scripts.utils import console, files, rendered, stamp
from scripts.utils.answer_cache import AnswerCache, unit_keys
from scripts.utils.generation import batches, check_lengths, context_limit, generate
from scripts.utils.loss import find_exact
from scripts.utils.packing import rows_in_order
from scripts.utils.row_losses import losses_in_row
from scripts.utils.trained import Trained, adapter_off

if TYPE_CHECKING:
    from scripts.utils.schema import EvalSection

Side = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")


@dataclass(frozen=True)
class Answer:
    """``tokens`` without the stop token; ``seconds``: the row's share of the time that its batch took."""

    text: str
    tokens: int
    finished: bool
    seconds: float


@dataclass(frozen=True)
class Answers:
    """What one side gave: summed loss (nats) and trained tokens, one a row; answers, one a row that asks (``asking``).

    ``answers`` is empty with eval.generate: false.
    """

    losses: list[float]
    tokens: list[int]
    answers: list[Answer]


@contextmanager
def answering_as(trained: Trained, side: Side) -> Iterator[None]:
    """With the adapter on for tuned, off for base; a model without an adapter is what it is."""
    with adapter_off(trained.model) if side == "base" and trained.kind == "adapter" else nullcontext():
        yield


def asking(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a prompt to answer: all but texts that are only continued."""
    return [row for row in rows if row["prompt_end"]]


def identity(trained: Trained, side: Side) -> str:
    """Hash of what decides this side's figures, rows and settings aside: weights, precision, device, libraries."""
    import torch

    facts = trained.stamp
    weights = sorted(stamp.adapter_folder(trained.run).glob("*.safetensors")) if side == "tuned" else []
    versions = {name: version for name, version in stamp.library_versions().items() if name != "python"}
    return files.sha256_json(
        {
            "base": [facts["model"]["name"], facts["model"].get("revision"), facts["model"].get("path_hash")],
            "tuned": [files.sha256_file(path) for path in weights],
            "four bits": facts["tuning"]["mode"] == "qlora",
            "precision": trained.precision,
            "device": trained.device,
            "threads": torch.get_num_threads(),  # sums are rounded in another order with another number
            "versions": versions,
        }
    )


def evaluate(
    trained: Trained, side: Side, rows: list[dict[str, Any]], settings: "EvalSection", cache: AnswerCache
) -> Answers:
    """Loss over the rows' trained tokens, then greedy answers to their last prompts.

    Raises ``UserError`` for a prompt that leaves no room for an answer, before anything is computed.
    """
    asked = asking(rows)
    prompts = rendered.to_prompts(trained.tokenizer, asked)
    names = [f"row {row['id'][:12]} ({row['source']['file']}:{row['source']['line']})" for row in asked]
    if settings.generate and asked:
        check_lengths(trained.model, prompts, names)
    who = identity(trained, side)
    losses, tokens = _losses(trained, side, rows, cache, who)
    if not settings.generate or not asked:
        return Answers(losses, tokens, [])
    return Answers(losses, tokens, _answers(trained, side, asked, prompts, settings, cache, who))


def _losses(
    trained: Trained, side: Side, rows: list[dict[str, Any]], cache: AnswerCache, who: str
) -> tuple[list[float], list[int]]:
    """Summed loss and trained tokens of each row."""
    examples = rendered.to_examples(trained.tokenizer, rows)
    budget = min(trained.stamp["render"]["max_length"], trained.max_length)
    way = find_exact(trained.model, examples)
    order = range(len(examples))
    packed = rows_in_order(examples, order, budget, way.shared) if way.packing else [[number] for number in order]
    progress = console.Progress(f"eval {side}", "rows (loss)", len(rows))
    losses = [0.0] * len(rows)
    for members in packed:
        content = [[examples[number].ids, examples[number].trained] for number in members]
        keys = unit_keys(who, f"loss {way}", content)
        known = cache.unit(keys)
        if known is None:
            found = losses_in_row(trained.model, [examples[number] for number in members], way)
            known = [
                {"side": side, "row": rows[number]["id"], "loss": loss}
                for number, loss in zip(members, found, strict=True)
            ]
            cache.add(keys, known)
        for number, entry in zip(members, known, strict=True):
            losses[number] = entry["loss"]
        progress.advance(len(members))
    progress.close()
    return losses, [example.trained_tokens for example in examples]


def _answers(
    trained: Trained,
    side: Side,
    asked: list[dict[str, Any]],
    prompts: list[list[int]],
    settings: "EvalSection",
    cache: AnswerCache,
    who: str,
) -> list[Answer]:
    """A greedy answer to each prompt. Which rows share a batch depends on all rows, never on what is in the cache."""
    how = f"greedy {settings.max_new_tokens} {trained.stop_ids}"
    units = []
    for batch in batches(prompts, settings.batch_size, settings.max_new_tokens, context_limit(trained.model)):
        keys = unit_keys(who, how, [prompts[number] for number in batch])
        units.append((batch, keys, cache.unit(keys)))
    missing = sum(len(batch) for batch, _, known in units if known is None)
    if missing < len(asked):
        console.note(f"eval {side}", f"{len(asked) - missing:,} of {len(asked):,} answers are there from before")
    progress = console.Progress(f"eval {side}", "answers", missing)
    found: dict[int, Answer] = {}
    for batch, keys, known in units:
        if known is None:
            started = time.monotonic()
            generated = generate(
                trained.model,
                trained.tokenizer,
                [prompts[number] for number in batch],
                max_new_tokens=settings.max_new_tokens,
                temperature=0.0,
                top_p=1.0,
                seed=0,
                stop_ids=trained.stop_ids,
                batch_size=len(batch),
            )
            seconds = (time.monotonic() - started) / len(batch)
            known = [
                {
                    "side": side,
                    "row": asked[number]["id"],
                    "text": answer.text,
                    "tokens": len(answer.ids),
                    "finished": answer.finished,
                    "seconds": seconds,
                }
                for number, answer in zip(batch, generated, strict=True)
            ]
            cache.add(keys, known)
            progress.advance(len(batch))
        for number, entry in zip(batch, known, strict=True):
            found[number] = Answer(entry["text"], entry["tokens"], entry["finished"], entry["seconds"])
    progress.close()
    return [found[number] for number in range(len(asked))]
