"""How far a saved model is from the model it was made of: log-probabilities of likely tokens on real rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.utils import console, files, stages
from scripts.utils.chat import Template, render_prompt
from scripts.utils.encoding import encode_prompt
from scripts.utils.rendered import to_examples

if TYPE_CHECKING:
    import torch

ROWS = 6  # rows to compare on, and the most tokens of each
TOKENS = 512
TOP = 10  # the likeliest tokens of the reference at each position are what is compared
LIKELY = 0.01  # probability from which a token counts for the largest difference
_BUILTIN = (
    "What is the capital of France?",
    "Write one sentence about rain.",
    "List three colours.",
    "What is 17 + 25?",
)


@dataclass(frozen=True)
class Reference:
    """The reference on one row: ``top`` int64 [tokens, 10] (its likeliest tokens), their log-probabilities and those
    that the base gives them (both float [tokens, 10]; equal where the reference has no adapter)."""

    ids: list[int]
    top: "torch.Tensor"
    adapted: "torch.Tensor"
    plain: "torch.Tensor"


def rows(step: str, facts: dict[str, Any], tokenizer: Any, template: Template) -> list[list[int]]:
    """Token ids of held-out rows that the run rendered; of built-in prompts, said aloud, where those are gone."""
    folder = stages.folder("render", facts["data"]["name"])
    for split in ("test", "val", "train"):
        path = folder / f"{split}.jsonl"
        found = [row for row, _ in zip(files.read_jsonl(path), range(ROWS), strict=False)] if path.is_file() else []
        if len(found) >= 4 or (found and split == "train"):
            console.note(step, f"proof on {len(found)} {split} rows of {folder}")
            return [example.ids[:TOKENS] for example in to_examples(tokenizer, found)]
    console.warn(f"the run's rendered rows are gone (looked in {folder.absolute()}): the proof uses built-in prompts")
    chats = [[{"role": "user", "content": text}] for text in _BUILTIN]
    return [encode_prompt(tokenizer, render_prompt(template, tokenizer, chat)) for chat in chats]


def reference(model: Any, rows: Sequence[list[int]]) -> list[Reference]:
    """What the model says on each row, and what it says with its adapter off, if it has one."""
    found = []
    for ids in rows:
        plain = adapted = log_probabilities(model, ids)
        top = adapted.topk(min(TOP, adapted.shape[-1])).indices
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                plain = log_probabilities(model, ids)
        found.append(Reference(ids, top, adapted.gather(-1, top), plain.gather(-1, top)))
    return found


def compare(model: Any, references: Sequence[Reference]) -> dict[str, float]:
    """Absolute differences of log-probabilities (nats) between ``model`` and the reference.

    ``mean_difference`` weighs each token by the probability that the reference gives it, for that is how often it
    would be written: rounding to bf16 moves the log-probability of a token of 0.1 % far more than anyone will ever
    see. ``max_difference`` is over tokens of at least 1 %. ``adapter_effect`` is the weighted mean between reference
    and base, as the measure of what would be lost.
    """
    import torch

    weights, differences, effects, agreed = [], [], [], []
    for known in references:
        now = log_probabilities(model, known.ids)
        weights.append(known.adapted.exp())
        differences.append((now.gather(-1, known.top) - known.adapted).abs())
        effects.append((known.plain - known.adapted).abs())
        agreed.append(now.argmax(-1) == known.top[:, 0])
    weight, difference, effect, same = (torch.cat(parts) for parts in (weights, differences, effects, agreed))
    return {
        "mean_difference": float((weight * difference).sum(-1).mean()),
        "max_difference": float(torch.where(weight >= LIKELY, difference, 0.0).max()),
        "adapter_effect": float((weight * effect).sum(-1).mean()),
        "greedy_agreement": float(same.float().mean()),
        "positions": same.numel(),
    }


def log_probabilities(model: Any, ids: list[int]) -> "torch.Tensor":
    """float32 [tokens, vocabulary] on the CPU."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
        return logits.float().log_softmax(-1).cpu()
