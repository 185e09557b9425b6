"""Writes a safetensors file tensor by tensor, so that no more than one tensor need be in memory.

The library's own writer takes all tensors of a file at once. Format: 8 bytes length of the header, the header as JSON
(name, type, shape, place of each tensor), the tensors without gaps (github.com/huggingface/safetensors).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.utils import files

if TYPE_CHECKING:
    import torch

_TYPES = {"F32": 4, "BF16": 2, "F16": 2}


def write(path: Path, shapes: Mapping[str, Sequence[int]], kind: str, tensors: "Iterable[torch.Tensor]") -> None:
    """Write ``tensors``, which come in the order of ``shapes`` (name to shape), all of type ``kind`` (F32, BF16, F16)."""
    import torch

    wanted = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[kind]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * _TYPES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with files.atomic_writer(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            if tensor.dtype != wanted or list(tensor.shape) != list(shape):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, announced was {kind} {list(shape)}")
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
