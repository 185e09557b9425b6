"""Near duplicates: a MinHash signature for each row, and bands that bring likely pairs together.

Two texts with the Jaccard similarity j agree in each of the 64 values with probability j, so the share of equal values
estimates it (standard error at most 0.06). 16 bands of 4 values find a pair of 0.8 with a probability of 99.98%
(Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3).
"""

import json
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils.errors import MachineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PERMUTATIONS = 64
BANDS = 16
SIGNATURE_BYTES = 4 * PERMUTATIONS
_SEED = 1
_FEW_WORDS = 20  # below: three words would make too few shingles
_LONG_WORDS = 20  # characters a word on average; above: a script without spaces


def messages_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A row's messages; a text to continue counts as one answer."""
    return content.get("messages") or [{"role": "assistant", "content": content["text"]}]


def text_of(messages: list[dict[str, Any]]) -> str:
    """What the row itself says. A system message is left out: shared by all rows, it would make all of them alike."""
    parts = []
    for message in messages:
        if message["role"] != "system":
            calls = message.get("tool_calls")
            parts += [message["content"], json.dumps(calls, ensure_ascii=False) if calls else ""]
    return "\n".join(part for part in parts if part)


def shingles(text: str) -> list[str]:
    """The overlapping pieces that are compared: three words each, or five characters where words are few or none."""
    words = text.casefold().split()
    if len(words) >= _FEW_WORDS and sum(map(len, words)) + len(words) - 1 <= _LONG_WORDS * len(words):
        return list(map(" ".join, zip(words, words[1:], words[2:], strict=False)))
    plain = " ".join(words)
    return [plain[at : at + 5] for at in range(max(len(plain) - 4, 1))]


def signature(messages: list[dict[str, Any]]) -> bytes:
    """The row's MinHash: 64 numbers of 32 bits, in this machine's byte order."""
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise MachineError(
            f"looking for near duplicates needs the package rensa ({error})",
            'run: make install; or go without: SET="data.near_duplicates=off"',
        ) from error

    sketch = RMinHash(num_perm=PERMUTATIONS, seed=_SEED)
    sketch.update(shingles(text_of(messages)))
    return array("I", sketch.digest()).tobytes()


def load(path: Path) -> "NDArray[np.uint32]":
    """The signatures in a file, one after another, as uint32 [rows, PERMUTATIONS]; read from the disk where needed."""
    import numpy as np

    return np.memmap(path, dtype=np.uint32, mode="r").reshape(-1, PERMUTATIONS)


def find_buckets(signatures: "NDArray[np.uint32]") -> "NDArray[np.int32]":
    """int32 [rows, BANDS]: in each band, the number of the bucket that a row shares with others, or -1 where it is alone."""
    import numpy as np

    found = np.full((len(signatures), BANDS), -1, dtype=np.int32)
    width, used = PERMUTATIONS // BANDS, 0
    for band in range(BANDS):
        halves = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width]).view(np.uint64)
        # a chance collision costs one comparison of signatures, no more
        keys = (halves[:, 0] * np.uint64(0x9E3779B97F4A7C15)) ^ halves[:, 1]
        _, bucket, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        shared = sizes > 1
        numbered = np.where(shared, np.cumsum(shared) - 1 + used, -1)
        found[:, band] = numbered[bucket]
        used += int(shared.sum())
    return found
