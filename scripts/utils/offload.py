"""Two levers for small cards: input embeddings that stay in the host's memory, and activations that wait there.

Neither changes a number: the same values are looked up, copied out and copied back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LEAST = 2**20  # bytes; smaller tensors are not worth the way
Packed = tuple[torch.device, torch.Tensor]


def keep_embeddings_on_host(model: Any) -> None:
    """Move the input embeddings to the CPU: token ids go there, the rows that they name come back to the ids' device.

    Only for frozen embeddings that the head does not share. Call before hooks that want the rows on the device are put on.
    """
    table = model.get_input_embeddings()
    table.to("cpu")
    table._apply = lambda *_, **__: table  # the Trainer moves the whole model to its device, but not this

    def to_host(module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        module.ids_device = arguments[0].device
        return (arguments[0].cpu(), *arguments[1:])

    def to_device(module: Any, _: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(module.ids_device)

    table.register_forward_pre_hook(to_host)
    table.register_forward_hook(to_device)


def computing_device(model: Any) -> torch.device:
    """Where the model computes; its first parameters, the embeddings, may lie on the host."""
    return list(model.parameters())[-1].device


@contextmanager
def activations_on_host(model: Any, wanted: bool = True) -> Iterator[None]:
    """Inside, what autograd saves for backward lies in host memory until backward asks for it.

    As ``torch.autograd.graph.save_on_cpu`` does it, but the model's own weights, which are saved too, stay where they are.
    """
    if not wanted:
        yield
        return
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor | Packed:
        if tensor.nbytes < _LEAST or tensor.untyped_storage().data_ptr() in weights:
            return tensor
        copy = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=tensor.is_cuda)
        copy.copy_(tensor)
        return tensor.device, copy

    def unpack(packed: torch.Tensor | Packed) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, copy = packed
        return copy.to(device, non_blocking=copy.is_pinned())

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
