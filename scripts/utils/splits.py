"""Which split a row belongs to: by the name of its file where the files say so, else by the hash of its question.

The question is the conversation before the last assistant turn. Its hash (or that of the conversation's id) decides,
unless an earlier row that it belongs with has been placed already (grouping.py), so adding rows moves no old row.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.utils import unpacked

_NAMES = {
    "train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test",
}  # fmt: skip
_SORTED = json.JSONEncoder(sort_keys=True).encode  # one for all rows: json.dumps makes one each time
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")  # as the hub names the parts of a split: train-00000-of-00002


def given_splits(paths: Sequence[Path]) -> dict[Path, str]:
    """Files named train, val (valid, validation, dev) or test → that split; the others are split by hash.

    Empty unless one file is val or test and another can be trained on: a lone ``train.jsonl`` is split by hash.
    """
    stems = {path: unpacked.inner(path).stem.lower() for path in paths}
    stems = {path: _SHARD.sub("", stem) for path, stem in stems.items()}
    named = {path: _NAMES[stem] for path, stem in stems.items() if stem in _NAMES}
    held_out = [path for path, split in named.items() if split != "train"]
    return named if held_out and len(held_out) < len(set(paths)) else {}


def reading_order(paths: Sequence[Path], given: dict[Path, str]) -> list[Path]:
    """Test first, then val, then the rest: a row that stands twice is kept where it is held out, and leaves train."""
    rank = {"test": 0, "val": 1, "train": 2}
    return sorted(paths, key=lambda path: rank[given[path]] if path in given else 3)


def question_hash(content: dict[str, Any], seed: int) -> bytes:
    """16 bytes that depend on ``seed`` and on every message before the last one, the answer; of a text on all of it."""
    asked = content["messages"][:-1] if "messages" in content else content["text"]
    text = _SORTED(asked)
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()[:16]


def group_hash(group: str, seed: int) -> bytes:
    """16 bytes that depend on ``seed`` and the id of a conversation; zeros where it is empty."""
    if not group:
        return bytes(16)
    return hashlib.sha256(f"{seed}:conversation:{group}".encode("utf-8", "surrogatepass")).digest()[:16]


def split_of(question: bytes, val_fraction: float, test_fraction: float) -> str:
    """The split of a question: its hash, as a number in [0, 1), falls into test, then val, then train."""
    place = int.from_bytes(question[:8]) / 2**64
    if place < test_fraction:
        return "test"
    return "val" if place < test_fraction + val_fraction else "train"
