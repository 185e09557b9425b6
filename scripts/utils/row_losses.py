"""The loss of each row on its own, from the packed rows that training computes them in."""

from collections.abc import Sequence
from typing import Any

from scripts.utils.encoding import IGNORE, Encoded
from scripts.utils.loss import Exact, inputs, on_device, parts_of
from scripts.utils.packing import Segment, shared_prefixes, to_row


def losses_in_row(model: Any, examples: Sequence[Encoded], way: Exact) -> list[float]:
    """Summed loss (nats) over each example's trained tokens; the examples stand in one packed row, as ``way`` has it.

    What ``batch_loss`` sums: the same pass through the model, the same chunks of a linear head.
    """
    import torch

    from scripts.utils.attention import by_segment
    from scripts.utils.offload import computing_device

    if not any(example.trained_tokens for example in examples):
        return [0.0] * len(examples)
    row = on_device(to_row(examples, way.shared), computing_device(model))
    where = dict(zip(_order(examples, way.shared), _own(row["segments"]), strict=True))
    was_training = model.training
    model.eval()
    with torch.no_grad(), by_segment(model, way.segments, way.kernel):
        found = _by_span(model, row, [where[index] for index in range(len(examples))], way.chunked)
    model.train(was_training)
    return found


def _order(examples: Sequence[Encoded], shared: bool) -> list[int]:
    """The examples' numbers in the order in which ``to_row`` puts them."""
    groups = shared_prefixes(examples) if shared else [(0, list(range(len(examples))))]
    return [index for _, members in groups for index in members]


def _own(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Start and end of each example's own part: every segment but the prefixes that others attend to (no loss is there)."""
    prefixes = {(prefix, end) for _, _, prefix, end in segments if end > prefix}
    return [(start, end) for start, end, _, _ in segments if (start, end) not in prefixes]


def _by_span(model: Any, row: Any, spans: Sequence[tuple[int, int]], chunked: bool) -> list[float]:
    import torch
    from torch.nn.functional import cross_entropy

    from scripts.utils.chunked_loss import ChunkedLoss

    parts = parts_of(model) if chunked else None
    found = []
    if parts is not None:
        backbone, head, cap, scale = parts
        hidden = backbone(**inputs(model, row), use_cache=False).last_hidden_state[0]
        labels = row["shift_labels"][0].to(hidden.device)
        for start, end in spans:
            trained = labels[start:end] != IGNORE
            own, targets = hidden[start:end][trained], labels[start:end][trained]
            found.append(float(ChunkedLoss.apply(own, head.weight, head.bias, targets, cap, scale)))
        return found
    labels = row["shift_labels"][0]
    keep = torch.nonzero(labels != IGNORE).squeeze(-1)
    logits = model(**inputs(model, row), logits_to_keep=keep, use_cache=False).logits[0].float()
    for start, end in spans:
        own = (keep >= start) & (keep < end)
        found.append(float(cross_entropy(logits[own], labels[keep[own]].to(logits.device), reduction="sum")))
    return found
