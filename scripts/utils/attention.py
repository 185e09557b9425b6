"""Attention in a packed row, one call a segment: an example attends to itself and to the prefix that it shares.

A mask over the whole row, as transformers makes it from restarting positions, costs the square of the row's length.
The functions below are registered with transformers under names of their own, for which it makes no mask: one goes segment
by segment through SDPA, the other hands all segments to torch's variable-length kernel (CUDA, 16 bit) in one call.
"""

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from scripts.utils.autocast import computed_in
from scripts.utils.errors import MachineError
from scripts.utils.offload import computing_device
from scripts.utils.packing import Segment

NAME, KERNEL_NAME = "sft_segments", "sft_varlen"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_SHORT = 512  # tokens up to which _ShortAttention was measured faster
_BLOCK = 128  # queries at a time in its gradient: small enough for the cache

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
    segments: Sequence[Segment] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """``query``: [1, heads, tokens, head size], ``key`` and ``value`` with their own number of heads; as transformers calls it."""
    segments = _require(segments, attention_mask, others)
    native = query.device.type == "cpu" and softcap is None
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not native:  # for all segments at once
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # cut once: a slice each would have a gradient as large as the row
    sizes = [end - start for start, end, _, _ in segments]
    queries, keys, values = (part.split(sizes, dim=2) for part in (query, key, value))
    at = {(start, end): number for number, (start, end, _, _) in enumerate(segments)}
    pieces = []
    for number, (_, _, prefix, prefix_end) in enumerate(segments):
        q, k, v = queries[number], keys[number], values[number]
        if before := prefix_end - prefix:
            first = at[prefix, prefix_end]
            k, v = torch.cat([keys[first], k], 2), torch.cat([values[first], v], 2)
        window = sliding_window if sliding_window and k.shape[2] > sliding_window else 0
        mask = _mask(q.shape[2], before, window, query.device) if before or window else None
        if softcap is not None:
            found = _capped(q, k, v, scaling, softcap, dropout, mask)
        elif native and q.dtype == torch.bfloat16 and k.shape[2] <= _SHORT and not dropout:
            found = _ShortAttention.apply(q, k, v, mask, q.shape[-1] ** -0.5 if scaling is None else scaling)
        else:
            found = scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=native and groups > 1
            )
        pieces.append(found.transpose(1, 2))
    return torch.cat(pieces, 1), None


def _require(
    segments: Sequence[Segment] | None, attention_mask: torch.Tensor | None, others: dict[str, Any]
) -> Sequence[Segment]:
    if attention_mask is not None or others.get("s_aux") is not None or others.get("position_bias") is not None:
        raise CannotSegment("this model's attention is more than causal", _PLAINLY)
    if segments is None:
        raise CannotSegment("this model does not hand on to its attention what its caller gives", _PLAINLY)
    return segments


def _by_kernel(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Sequence[Segment] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As ``_forward``, in one call for all segments; its causal mask ends where keys and queries end."""
    from torch.nn.attention.varlen import varlen_attn

    segments = _require(segments, attention_mask, others)
    if softcap is not None or dropout:
        raise CannotSegment("torch's variable-length kernel has neither capped scores nor dropout", _PLAINLY)
    cuts = _cuts(tuple(segments), query.device)
    dtype = computed_in(value)
    q, k, v = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))  # [tokens, heads, size]
    if cuts.keys is not None:
        k, v = k[cuts.keys], v[cuts.keys]
    found = varlen_attn(
        q,
        k,
        v,
        cuts.of_queries,
        cuts.of_keys,
        *cuts.longest,
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        **_grouped(varlen_attn),
    )
    return found[None], None


@functools.cache  # each layer of each row would ask again
def _grouped(kernel: Any) -> dict[str, bool]:
    """What tells the kernel that keys have fewer heads than queries; where it has no such argument it sees so itself."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(kernel).parameters else {}


@dataclass(frozen=True)
class _Cuts:
    """Where segments begin, int32 [segments + 1], among queries and keys; ``keys``: which token each key is of (None: its own)."""

    of_queries: torch.Tensor
    of_keys: torch.Tensor
    longest: tuple[int, int]
    keys: torch.Tensor | None


@functools.lru_cache(8)  # each layer of a row asks again
def _cuts(segments: tuple[Segment, ...], device: torch.device) -> _Cuts:
    queries = [end - start for start, end, _, _ in segments]
    keys = [end - start + prefix_end - prefix for start, end, prefix, prefix_end in segments]

    def begins(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device)

    order = None
    if queries != keys:
        pieces = [
            piece
            for start, end, prefix, prefix_end in segments
            for piece in (range(prefix, prefix_end), range(start, end))
        ]
        order = torch.tensor([token for piece in pieces for token in piece]).to(device)
    return _Cuts(begins(queries), begins(keys), (max(queries), max(keys)), order)


class _ShortAttention(torch.autograd.Function):
    """SDPA whose gradient is made of a few large products: on a CPU, in bf16, torch's own takes longer up to ``_SHORT`` tokens."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """``q``: [1, heads, tokens, size], ``k`` and ``v``: [1, groups of heads, before + tokens, size]."""
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask = ctx.saved_tensors
        with torch.autocast(upstream.device.type, enabled=False):
            return *_short_gradients(q, k, v, mask, upstream, ctx.scale), None, None


def _short_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    upstream: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of q, k and v; as in ``_ShortAttention``."""
    (_, heads, tokens, size), groups = q.shape, k.shape[1]
    split = (groups, heads // groups)
    before = k.shape[2] - tokens
    plain_k, plain_v = k[0], v[0]
    exact_k = plain_k.float().transpose(1, 2)
    of_q = torch.empty_like(q)
    of_k, of_v = (torch.zeros(plain_k.shape, dtype=torch.float32) for _ in "kv")
    for start in range(0, tokens, _BLOCK):  # the heads of a group stand below one another
        end = min(start + _BLOCK, tokens)
        rows, seen = end - start, before + end
        part, above = (whole[0, :, start:end].unflatten(0, split).reshape(groups, -1, size) for whole in (q, upstream))
        part = part * scale
        # in fp32: a score's error is its weight's relative one
        scores = (part.float() @ exact_k[:, :, :seen]).view(*split, rows, seen)
        if mask is None:  # only the last block is not seen whole
            scores[..., before + start :].masked_fill_(_later(rows, q.device), -torch.inf)
        else:
            scores.masked_fill_(~mask[start:end, :seen], -torch.inf)
        weights = torch.softmax(scores, -1).to(q.dtype).view(groups, -1, seen)
        of_v[:, :seen] += weights.transpose(1, 2) @ above
        of_weights = above @ plain_v[:, :seen].transpose(1, 2)
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, q.dtype)
        of_q[0, :, start:end] = (of_scores @ plain_k[:, :seen]).mul_(scale).view(heads, rows, size)
        of_k[:, :seen] += of_scores.transpose(1, 2) @ part
    return of_q, of_k.to(k.dtype)[None], of_v.to(v.dtype)[None]


@functools.lru_cache(32)
def _later(tokens: int, device: torch.device) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)


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
    return (
        kinds <= _KNOWN_LAYERS
        and not chunked
        and not own
        and model.config._attn_implementation in ("sdpa", NAME, KERNEL_NAME)
    )


def has_kernel(model: Any) -> bool:
    """Whether torch's variable-length kernel is worth a try: an NVIDIA card from Ampere on, weights in 16 bit, heads of up to 256."""
    embeddings, device = next(model.parameters()), computing_device(model)  # 4-bit weights tell no precision
    if embeddings.dtype not in (torch.bfloat16, torch.float16) or device.type != "cuda":
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    with suppress(ImportError):
        from torch.nn.attention import varlen  # noqa: F401  # torch 2.10 brought it

        sizes = {getattr(module, "head_dim", 0) for module in model.modules()}
        return max(sizes) <= 256
    return False


def is_segmented(model: Any) -> bool:
    return model.config._attn_implementation in (NAME, KERNEL_NAME)


@contextmanager
def by_segment(model: Any, wanted: bool = True, kernel: bool = False) -> Iterator[None]:
    """Inside, a model that ``can_segment`` takes rows with ``segments``, and nothing else; all in one call with ``kernel``."""
    if not wanted or is_segmented(model):
        yield
        return
    from transformers import AttentionInterface

    name = KERNEL_NAME if kernel else NAME
    AttentionInterface.register(name, _by_kernel if kernel else _forward)
    configs = [config for config in _configs(model) if config._attn_implementation == "sdpa"]
    for config in configs:
        config._attn_implementation = name
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
