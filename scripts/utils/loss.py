"""The loss over a row: the sum of the cross entropies over its trained tokens, whatever shares the row.

``summed_loss`` computes logits at trained positions only, a chunk at a time, with their gradient at once, so the
[tokens, vocabulary] matrix never exists; ``whole_loss`` is the plain way, which it is compared with at the start of each run.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.utils import sharding
from scripts.utils.encoding import IGNORE, Encoded
from scripts.utils.packing import Row, rows_in_order, to_row

if TYPE_CHECKING:
    import torch

Loss = Callable[[Any, Row], "torch.Tensor"]
Dealt = list[tuple[list[int], int]]  # rows by their examples' numbers, and how often each counts


def whole_loss(model: Any, row: Row) -> "torch.Tensor":
    """By the model's own logits, at the positions where some label is."""
    import torch
    from torch.nn.functional import cross_entropy

    labels = row["shift_labels"]
    keep = torch.nonzero((labels != IGNORE).any(0)).squeeze(-1)
    logits = model(**inputs(model, row), logits_to_keep=keep, use_cache=False).logits
    targets = labels[:, keep]
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def summed_loss(model: Any, row: Row) -> "torch.Tensor":
    """As ``whole_loss``, in chunks; a model that is not built of a backbone and a linear head has its loss the plain way."""
    from scripts.utils.chunked_loss import ChunkedLoss

    parts = parts_of(model)
    if parts is None:
        return whole_loss(model, row)
    backbone, head, cap, scale = parts
    hidden = backbone(**inputs(model, row), use_cache=False).last_hidden_state
    labels = row["shift_labels"].to(hidden.device)
    trained = labels != IGNORE
    with sharding.gathered(head):
        return ChunkedLoss.apply(hidden[trained], head.weight, head.bias, labels[trained], cap, scale)


def fused_loss(model: Any, row: Row) -> "torch.Tensor":
    """The same sum from a model whose own forward computes the loss (Unsloth's fused one): unshifted labels, a mean."""
    import torch

    labels = torch.full_like(row["input_ids"], IGNORE)
    labels[:, 1:] = row["shift_labels"][:, :-1]
    return model(**inputs(model, row), labels=labels).loss * (labels != IGNORE).sum()


def inputs(model: Any, row: Row) -> dict[str, Any]:
    from scripts.utils.attention import is_segmented

    leave_out = {"shift_labels"} if is_segmented(model) else {"shift_labels", "segments"}
    return {name: value for name, value in row.items() if name not in leave_out}


def parts_of(model: Any) -> tuple[Any, Any, float, float] | None:
    """Backbone, linear head, the cap of the logits (0: none) and their factor; None where the model is built otherwise."""
    import torch

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(causal, getattr(causal, "base_model_prefix", ""), None)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    # FSDP gives a module that it shards a class of its own, with this name
    if backbone is None or (type(head) is not torch.nn.Linear and type(head).__name__ != "FSDPLinear"):
        return None
    config = causal.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return backbone, head, getattr(config, "final_logit_softcapping", None) or 0.0, scale


@dataclass(frozen=True)
class Exact:
    """What was compared on the loaded model and found to change no loss, and what was not."""

    packing: bool
    segments: bool
    shared: bool
    chunked: bool
    lean: bool = False
    kernel: bool = False  # attention by segment in one call of a variable-length kernel
    fused: str | None = None  # whose kernels stand in for the model's own norms and such


def batch_loss(
    model: Any,
    examples: Sequence[Encoded],
    budget: int,
    *,
    loss: Loss = summed_loss,
    exact: Exact | None = None,
    deal: Callable[[list[list[int]]], Dealt] | None = None,
) -> tuple[float, int]:
    """Summed loss over ``examples`` without gradients, and the number of trained tokens: eval and train agree by it.

    ``exact`` says in which ways; without it, in packed rows by the model's own attention. ``deal`` takes a rank's share of
    the rows: the loss is that of the share, the number of tokens that of all.
    """
    import torch

    from scripts.utils.attention import by_segment
    from scripts.utils.offload import computing_device

    device = computing_device(model)
    way = exact or Exact(packing=True, segments=False, shared=False, chunked=False)
    order = range(len(examples))
    rows = rows_in_order(examples, order, budget, way.shared) if way.packing else [[i] for i in order]
    rows = [row for row in rows if any(examples[i].trained_tokens for i in row)]
    total = 0.0
    was_training = model.training
    model.eval()
    with torch.no_grad(), by_segment(model, way.segments, way.kernel):
        for indices, times in deal(rows) if deal else [(row, 1) for row in rows]:
            row = on_device(to_row([examples[i] for i in indices], way.shared), device)
            total += float(loss(model, row)) * times
    model.train(was_training)
    return total, sum(example.trained_tokens for example in examples)


def on_device(row: Row, device: Any) -> Row:
    import torch

    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in row.items()}


def plain_loss(model: Any, examples: Sequence[Encoded]) -> float:
    """The loss of the two shortest examples, each alone, by the model's own logits: what other ways are compared with."""
    return _total(model, [[example] for example in _shortest(examples)], whole_loss)


def tolerance(model: Any) -> float:
    """How far two ways of computing the same loss may lie apart, as a share of it."""
    import torch

    return 1e-4 if next(model.parameters()).dtype == torch.float32 else 2e-2


def _shortest(examples: Sequence[Encoded]) -> list[Encoded]:
    return sorted(examples, key=lambda example: len(example.ids))[:2]


def _total(
    model: Any,
    rows: Sequence[Sequence[Encoded]],
    way: Loss,
    segmented: bool = False,
    shared: bool = False,
    kernel: bool = False,
) -> float:
    import torch

    from scripts.utils.attention import by_segment
    from scripts.utils.offload import computing_device

    was_training, device = model.training, computing_device(model)
    model.eval()
    with torch.no_grad(), by_segment(model, segmented, kernel):
        found = sum(float(way(model, on_device(to_row(row, shared), device))) for row in rows)
    model.train(was_training)
    return found


def find_exact(model: Any, examples: Sequence[Encoded], loss: Loss = summed_loss, *, fused: bool = False) -> Exact:
    """Compare the ways of computing the loss of a few short examples with the plain one, each alone.

    ``fused``: ``loss`` is the backend's own, and nothing but packing is compared with it.
    """
    from scripts.utils.attention import CannotSegment, can_segment, has_kernel

    pair = _shortest(examples)
    if not pair:
        return Exact(packing=True, segments=False, shared=False, chunked=not fused)
    allowed = tolerance(model)
    alone = [[example] for example in pair]
    plain = _total(model, alone, loss if fused else whole_loss)

    def same(found: float, wanted: float = plain) -> bool:
        return abs(found - wanted) <= allowed * abs(wanted) + 1e-6

    if fused:
        return Exact(same(_total(model, [pair], loss)), segments=False, shared=False, chunked=False)
    chunked = same(_total(model, alone, summed_loss))
    way = loss if chunked else whole_loss
    segments = False
    with suppress(CannotSegment):
        segments = can_segment(model) and same(_total(model, [pair], way, True))
    packing = segments or same(_total(model, [pair], way))
    once = _total(model, [[pair[0]]], way)
    twice = [[pair[0], pair[0]]]
    shared = segments and same(_total(model, twice, way, True, shared=True), 2 * once)
    kernel = False
    if segments and has_kernel(model):
        with suppress(RuntimeError, CannotSegment):  # it refuses what it was not built for
            kernel = same(_total(model, [pair], way, True, kernel=True)) and same(
                _total(model, twice, way, True, shared=shared, kernel=True), 2 * once
            )
    return Exact(packing, segments, shared, chunked, lean=_lean_is_exact(model, pair[0], way), kernel=kernel)


def _lean_is_exact(model: Any, example: Encoded, loss: Loss) -> bool:
    """Whether a lean adapter gives the gradients that PEFT's own code gives, to the rounding of the model's precision."""
    import torch

    from scripts.utils.lean_lora import lean, lean_layers

    if not lean_layers(model):
        return False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    row, was_training = on_device(to_row([example]), trained[0].device), model.training
    model.train()  # as it trains, with its checkpoints

    def gradients(wanted: bool) -> torch.Tensor:
        with lean(model, wanted):
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, row), trained)]).float()

    try:
        plain, found = gradients(False), gradients(True)
    except torch.OutOfMemoryError:  # training itself says what to do about it
        return False
    finally:
        model.train(was_training)
    # 16 bit round each gradient by several per cent; a wrong one is off by as much as itself
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.2
    return float((found - plain).norm()) <= tolerance * float(plain.norm()) + 1e-6
