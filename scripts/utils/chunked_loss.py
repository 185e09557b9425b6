"""A linear head's cross entropy in chunks: the [tokens, vocabulary] matrix never exists, nor does its gradient.

Each chunk's gradient is computed right after its loss, while its logits are there, and only that of the hidden states (and of
the head's weights, where these are trained) is kept.
"""

from typing import Any

import torch
from torch.nn.functional import linear

from scripts.utils.autocast import computed_in

_CHUNK = 2**24  # logits at a time: 64 MiB in fp32
_FP16_BOOST = 1024.0  # gradients of logits times a head's weights fall below fp16's smallest number


class ChunkedLoss(torch.autograd.Function):
    """Sum of cross entropies of ``linear(hidden, weight, bias)``, its gradients computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        cap: float,
        scale: float,
    ) -> torch.Tensor:
        """``hidden``: [trained tokens, hidden size], ``weight``: [vocabulary, hidden size], ``targets``: int64 [trained tokens]."""
        wanted = ctx.needs_input_grad
        boost = _FP16_BOOST if computed_in(hidden) == torch.float16 else 1.0
        of_hidden = torch.empty_like(hidden, dtype=torch.float32 if boost > 1 else hidden.dtype) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = max(_CHUNK // weight.shape[0], 16)
        for start in range(0, len(hidden), size):
            part, target = hidden[start : start + size], targets[start : start + size, None]
            computed = linear(part, weight, bias)
            logits = computed.float()
            if scale != 1:
                logits *= scale
            if cap:
                logits = torch.tanh(logits / cap) * cap
            slope = 1 - (logits / cap).square() if cap and any(wanted) else None
            # not logsumexp minus target: a loss near zero would be the small difference of two large numbers
            likely = torch.log_softmax(logits, -1)
            del logits
            total -= likely.gather(1, target).sum()
            if not any(wanted):
                continue
            gradient = likely.exp_()
            gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
            if slope is not None:
                gradient *= slope
            if scale * boost != 1:
                gradient *= scale * boost
            gradient = gradient.to(computed.dtype)
            if of_hidden is not None:
                of_hidden[start : start + size] = (gradient @ weight).to(of_hidden.dtype) / boost
            if of_weight is not None:
                of_weight += (gradient.mT @ part).float() / boost
            if of_bias is not None:
                of_bias += gradient.float().sum(0) / boost
            del computed, likely, gradient  # else they lie beside the next chunk's
        ctx.gradients = of_hidden, of_weight, of_bias
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        found = (
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        return *found, None, None, None
