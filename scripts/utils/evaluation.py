"""Base and tuned on the same rows: loss over the trained tokens, greedy answers, their scores, and sample rows.

Both sides come from one load of the model where an adapter can be switched off, and go through the same encoding as
training did.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from scripts.utils import console, metrics, rendered
from scripts.utils.generation import Generated, check_lengths, generate
from scripts.utils.loss import batch_loss, find_exact, summed_loss, whole_loss
from scripts.utils.trained import Trained, adapter_off

if TYPE_CHECKING:
    from scripts.utils.schema import Config

Side = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")
TAIL = 2000  # characters of a prompt kept in samples.jsonl
_CHUNK = 32  # rows between two signs of progress


@dataclass(frozen=True)
class Answers:
    """What one side gave: the scores by metric, and its answers (none with eval.generate: false)."""

    scores: dict[str, metrics.Score]
    generated: list[Generated]


@contextmanager
def answering_as(trained: Trained, side: Side) -> Iterator[None]:
    """With the adapter on for tuned, off for base; a model without an adapter is what it is."""
    with adapter_off(trained.model) if side == "base" and trained.kind == "adapter" else nullcontext():
        yield


def evaluate(trained: Trained, side: Side, rows: list[dict[str, Any]], config: "Config") -> Answers:
    """Loss over the rows' trained tokens, then greedy answers to their last prompts, scored."""
    asked = asking(rows)
    prompts = rendered.to_prompts(trained.tokenizer, asked)
    names = [f"row {row['id'][:12]} ({row['source']['file']}:{row['source']['line']})" for row in asked]
    if config.eval.generate and asked:
        check_lengths(trained.model, prompts, names)
    progress = console.Progress(f"eval {side}", "rows (loss)", len(rows))
    total, count = 0.0, 0
    budget = min(trained.stamp["render"]["max_length"], trained.max_length)
    examples = rendered.to_examples(trained.tokenizer, rows)
    exact = find_exact(trained.model, examples)
    way = summed_loss if exact.chunked else whole_loss
    for start in range(0, len(rows), _CHUNK):
        part = examples[start : start + _CHUNK]
        loss, tokens = batch_loss(trained.model, part, budget, loss=way, exact=exact)
        total, count = total + loss, count + tokens
        progress.advance(len(part))
    progress.close()
    scores = loss_scores(total, count)
    if not config.eval.generate or not asked:
        why = "the rows are texts, which ask nothing" if config.eval.generate else "eval.generate is false"
        return Answers(
            scores | {name: metrics.Score(None, why) for name in metrics.METRICS if name not in scores},
            [],
        )
    progress = console.Progress(f"eval {side}", "answers", len(asked))
    generated = generate(
        trained.model,
        trained.tokenizer,
        prompts,
        max_new_tokens=config.eval.max_new_tokens,
        temperature=0.0,
        top_p=1.0,
        seed=0,
        stop_ids=trained.stop_ids,
        batch_size=config.eval.batch_size,
        on_done=progress.advance,
    )
    progress.close()
    texts, references = [answer.text for answer in generated], [row["reference"] for row in asked]
    tokens_each, finished = [len(answer.ids) for answer in generated], [answer.finished for answer in generated]
    return Answers(scores | metrics.score_answers(texts, references, tokens_each, finished), generated)


def asking(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a prompt to answer: all but texts that are only continued."""
    return [row for row in rows if row["prompt_end"]]


def loss_scores(total: float, tokens: int) -> dict[str, metrics.Score]:
    """Mean loss a trained token (nats) and its exponential; missing where that is no finite number."""
    loss = total / tokens if tokens else math.nan
    if not math.isfinite(loss):
        reason = "no token carries loss" if not tokens else f"the loss is {loss}"
        return {"loss": metrics.Score(None, reason), "perplexity": metrics.Score(None, reason)}
    high = metrics.Score(None, "the loss is too high for it") if loss > 700 else metrics.Score(math.exp(loss))
    return {"loss": metrics.Score(loss), "perplexity": high}


def samples(rows: list[dict[str, Any]], answers: dict[Side, Answers]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(asking(rows)):
        prompt = row["text"][: row["prompt_end"]]
        sample = {
            "id": row["id"],
            "source": row["source"],
            "prompt": prompt[-TAIL:],
            "prompt_cut": len(prompt) > TAIL,
            "reference": row["reference"],
        }
        for side in SIDES:
            if answers[side].generated:
                answer = answers[side].generated[number]
                flags = metrics.json_flags(answer.text, row["reference"])
                sample |= {side: answer.text, f"{side}_exact": metrics.exact_match(answer.text, row["reference"])}
                sample |= {
                    f"{side}_json_exact": flags and flags[1],
                    f"{side}_tokens": len(answer.ids),
                    f"{side}_finished": answer.finished,
                }
        yield sample
