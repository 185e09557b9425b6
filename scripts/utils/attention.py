"""Attention in a packed row, one call a segment: an example attends to itself and to the prefix that it shares.

A mask over the whole row, as transformers makes it from restarting positions, costs the square of the row's length.
The function below is registered with transformers under a name of its own, for which it makes no mask.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from scripts.utils.errors import MachineError

NAME = "sft_segments"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


_PLAINLY = "set train.packing: false"


class CannotSegment(MachineError):
    """The model calls its attention in a way that attention by segment does not know."""


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Sequence[tuple[int, int, int, int]] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """``query``: [1, heads, tokens, head size], ``key`` and ``value`` with their own number of heads; as transformers calls it."""
    if attention_mask is not None or others.get("s_aux") is not None or others.get("position_bias") is not None:
        raise CannotSegment("this model's attention is more than causal", _PLAINLY)
    if segments is None:
        raise CannotSegment("this model does not hand on to its attention what its caller gives", _PLAINLY)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # for all segments at once
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    pieces = []
    for start, end, prefix, prefix_end in segments:
        q, k, v = (part[:, :, start:end] for part in (query, key, value))
        before = prefix_end - prefix
        if before:
            k, v = (torch.cat([part[:, :, prefix:prefix_end], part[:, :, start:end]], 2) for part in (key, value))
        window = sliding_window if sliding_window and before + end - start > sliding_window else 0
        mask = _mask(end - start, before, window, query.device) if before or window else None
        if softcap is not None:
            pieces.append(_capped(q, k, v, scaling, softcap, dropout, mask))
        else:
            pieces.append(
                scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None
                )
            )
    return torch.cat(pieces, 2).transpose(1, 2).contiguous(), None


@functools.lru_cache(32)
def _mask(tokens: int, before: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [tokens, before + tokens]: what each token sees, of at most the last ``window`` (0: all) up to itself."""
    seen = torch.ones(tokens, before + tokens, dtype=torch.bool, device=device).tril(before)
    return seen.triu(before - window + 1) if window else seen


def _capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    softcap: float,
    dropout: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attention whose scores are capped (Gemma 2), which no fused kernel of torch knows."""
    scores = q @ k.transpose(2, 3) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    seen = mask if mask is not None else _mask(q.shape[2], 0, 0, q.device)
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf).float(), -1).to(q.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ v


def can_segment(model: Any) -> bool:
    """Whether the model's layers are of kinds whose attention is known here, and go through transformers' SDPA."""
    configs = _configs(model)
    kinds = {kind for config in configs for kind in getattr(config, "layer_types", None) or ()}
    chunked = any(getattr(config, "attention_chunk_size", None) for config in configs)
    own = any(type(m).forward.__module__.startswith("unsloth") for m in model.modules())
    return kinds <= _KNOWN_LAYERS and not chunked and not own and model.config._attn_implementation in ("sdpa", NAME)


def is_segmented(model: Any) -> bool:
    return bool(model.config._attn_implementation == NAME)


@contextmanager
def by_segment(model: Any, wanted: bool = True) -> Iterator[None]:
    """Inside, a model that ``can_segment`` takes rows with ``segments``, and nothing else."""
    if not wanted or is_segmented(model):
        yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _forward)
    configs = [config for config in _configs(model) if config._attn_implementation == "sdpa"]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"


def _configs(model: Any) -> list[Any]:
    from transformers import PreTrainedConfig

    found = {
        id(module.config): module.config
        for module in model.modules()
        if isinstance(getattr(module, "config", None), PreTrainedConfig)
    }
    return list(found.values())
