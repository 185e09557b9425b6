"""The precision that products are computed in, where it is not that of the weights (torch.autocast)."""

from collections.abc import Callable
from typing import Any

import torch


def computed_in(tensor: torch.Tensor) -> torch.dtype:
    """What a product with ``tensor`` is computed in here."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def mixed(loss: Callable[..., torch.Tensor], device: str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """``loss``, computed by a model whose weights stay in fp32 while its products are in ``dtype``.

    Neither transformers nor Accelerate does it for us: the one does nothing, the other wraps the model's own forward, which
    the loss in chunks does not call.
    """
    if dtype == torch.float32:
        return loss

    def computed(*given: Any) -> torch.Tensor:
        with torch.autocast(device, dtype=dtype):
            return loss(*given)

    return computed
