"""Reads a GGUF file: its metadata and its tensors, dequantised to float32 with NumPy.

Only what the embedded model needs (little-endian version 3; F32, F16, Q4_1 and Q8_0 tensors), so that the
project carries no further dependency for one file whose checksum is pinned. Compared value by value with
the `gguf` package 0.19.0. Format: docs/gguf.md and ggml-common.h in ggml-org/llama.cpp.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from scripts.utils.errors import RefusedError

if TYPE_CHECKING:
    import numpy as np

# GGUF's metadata value types; 8 is a string and 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# ggml tensor type -> (name, bytes a block, weights a block)
_TENSOR_TYPES = {0: ("F32", 4, 1), 1: ("F16", 2, 1), 3: ("Q4_1", 20, 32), 8: ("Q8_0", 34, 32)}


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]  # rows first, as PyTorch has it; GGUF writes the dimensions the other way round
    type: int
    offset: int  # bytes from the start of the data section


class GGUFFile:
    """An open GGUF file; use it as a context manager.

    ``metadata`` maps GGUF keys to Python values. Raises ``RefusedError`` where the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._at = 0
        with self.path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
                raise RefusedError(f"{self.path.absolute()}: not a readable GGUF file (it is empty)")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            magic, version = self._bytes[:4], struct.unpack_from("<I", self._bytes, 4)[0]
            if magic != b"GGUF" or version != 3:
                raise ValueError(f"begins with {magic!r}, version {version}; expected GGUF version 3")
            self._at = 8
            tensor_count, key_count = self._scalar("Q"), self._scalar("Q")
            self.metadata: dict[str, Any] = {}
            for _ in range(key_count):
                key = self._string()
                self.metadata[key] = self._value(self._scalar("I"))
            self._tensors = [self._tensor_entry() for _ in range(tensor_count)]
            alignment = self.metadata.get("general.alignment", 32)
            self._data = (self._at + alignment - 1) // alignment * alignment
        except (struct.error, ValueError, KeyError) as error:
            self._bytes.close()
            raise RefusedError(f"{self.path.absolute()}: not a readable GGUF file ({error})") from error

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bytes.close()

    def tensors(self) -> Iterator[tuple[str, "np.ndarray"]]:
        """Yield each tensor's GGUF name with its weights as float32, rows first."""
        for tensor in self._tensors:
            yield tensor.name, self._dequantised(tensor)

    def _scalar(self, letter: str) -> Any:
        value = struct.unpack_from("<" + letter, self._bytes, self._at)[0]
        self._at += struct.calcsize("<" + letter)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        raw = self._bytes[self._at : self._at + length]
        if len(raw) != length:
            raise ValueError("the file is cut short")
        self._at += length
        return raw.decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            of, count = self._scalar("I"), self._scalar("Q")
            return [self._value(of) for _ in range(count)]
        return self._scalar(_SCALARS[kind])

    def _tensor_entry(self) -> _Tensor:
        name = self._string()
        dimensions = [self._scalar("Q") for _ in range(self._scalar("I"))]
        kind, offset = self._scalar("I"), self._scalar("Q")
        if kind not in _TENSOR_TYPES:
            raise ValueError(f"tensor {name} has ggml type {kind}, which is not read here")
        return _Tensor(name, tuple(reversed(dimensions)), kind, offset)

    def _dequantised(self, tensor: _Tensor) -> "np.ndarray":
        import numpy as np

        name, block_bytes, block_weights = _TENSOR_TYPES[tensor.type]
        blocks = int(np.prod(tensor.shape)) // block_weights
        start = self._data + tensor.offset
        raw = self._bytes[start : start + blocks * block_bytes]
        if len(raw) != blocks * block_bytes:
            raise RefusedError(f"{self.path.absolute()}: the file is cut short at tensor {tensor.name}")
        if name in ("F32", "F16"):
            return np.frombuffer(raw, dtype="<f4" if name == "F32" else "<f2").astype(np.float32).reshape(tensor.shape)
        block = np.frombuffer(raw, dtype=np.uint8).reshape(blocks, block_bytes)
        scale = block[:, :2].copy().view("<f2").astype(np.float32)
        if name == "Q8_0":  # weight = scale * int8
            return (scale * block[:, 2:].view(np.int8).astype(np.float32)).reshape(tensor.shape)
        # Q4_1: weight = scale * nibble + minimum; the low nibbles are weights 0-15, the high ones 16-31
        minimum = block[:, 2:4].copy().view("<f2").astype(np.float32)
        packed = block[:, 4:]
        nibbles = np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32)
        return (scale * nibbles + minimum).reshape(tensor.shape)
