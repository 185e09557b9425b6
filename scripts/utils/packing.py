"""Which examples share a row, and the row as tensors.

Examples stand side by side without padding. Those of a row that begin with the same tokens, such as a style's system
message, can share one copy of this prefix: each attends to the prefix and to itself (attention.py), so what is learnt is
the same and the prefix is computed once.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from scripts.utils.encoding import IGNORE, Encoded

Row = dict[str, Any]
Segment = tuple[int, int, int, int]  # start and end of a piece of a row, and of the prefix before it (0, 0: none)
_LEAST_SHARED = 16  # tokens; a shorter prefix is not worth the smaller pieces that attention falls into
_WINDOW = 1024  # examples packed together: enough to pack tightly, few enough to keep best-fit cheap


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: put examples (by index) into rows of at most ``budget`` tokens.

    An example longer than the budget gets a row of its own. Deterministic.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = [(left, number) for number, left in enumerate(room) if left >= length]
        if fitting:
            _, number = min(fitting)
            rows[number].append(index)
            room[number] -= length
        else:
            rows.append([index])
            room.append(budget - length)
    return rows


def make_rows(
    examples: Sequence[Encoded], *, budget: int, batch_size: int, packing: bool, seed: int
) -> list[list[int]]:
    """The micro batches of one pass over the data, each a list of example indices.

    With packing a micro batch is one row of at most ``budget`` tokens; examples are shuffled before they are packed in
    windows, so that rows mix lengths and the order is random, but the same for the same seed. Shared prefixes have no say
    in it: what a step learns from must not depend on how it is computed.
    """
    order = list(range(len(examples)))
    shuffler = random.Random(seed)
    shuffler.shuffle(order)
    if not packing:
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rows = rows_in_order(examples, order, budget)
    shuffler.shuffle(rows)
    return rows


def rows_in_order(
    examples: Sequence[Encoded], order: Sequence[int], budget: int, shared: bool = False
) -> list[list[int]]:
    """The examples with the numbers in ``order``, packed without chance; with ``shared`` a common prefix counts once."""
    rows: list[list[int]] = []
    for start in range(0, len(order), _WINDOW):
        part = order[start : start + _WINDOW]
        if not shared:
            rows += [[part[i] for i in row] for row in pack([len(examples[i].ids) for i in part], budget)]
            continue
        groups = shared_prefixes([examples[i] for i in part])
        pieces: list[tuple[int, list[int]]] = []  # tokens, and the examples
        for prefix, members in groups:
            lengths = [len(examples[part[i]].ids) - prefix for i in members]
            for row in pack(lengths, max(budget - prefix, 1)):
                pieces.append((prefix + sum(lengths[i] for i in row), [part[members[i]] for i in row]))
        # what the groups left over of their rows
        rows += [[i for number in row for i in pieces[number][1]] for row in pack([size for size, _ in pieces], budget)]
    return rows


def shared_prefixes(examples: Sequence[Encoded]) -> list[tuple[int, list[int]]]:
    """Groups of examples that begin alike: the length of what they share, and their indices; 0: those that share nothing.

    A prefix ends before the first token that carries loss in any of them, so that no label depends on whose turn it is.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    alone: list[int] = []
    for index, example in enumerate(examples):
        if _head(example) >= _LEAST_SHARED:
            groups.setdefault(tuple(example.ids[:_LEAST_SHARED]), []).append(index)
        else:
            alone.append(index)
    found = []
    for members in groups.values():
        if len(members) == 1:
            alone += members
            continue
        heads = [examples[i].ids[: _head(examples[i])] for i in members]
        first, last = min(heads), max(heads)
        equal = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        found.append((min(equal, len(last)), members))
    return [*found, *([(0, sorted(alone))] if alone else [])]


def _head(example: Encoded) -> int:
    """How many tokens come before the one that predicts the first trained token, at most all but the last."""
    trained = example.trained.index(True, 1) if True in example.trained[1:] else len(example.ids)
    return max(trained - 1, 0)


def to_row(examples: Sequence[Encoded], shared: bool = False) -> Row:
    """Examples side by side in one row without padding.

    ``input_ids``, ``position_ids``, ``shift_labels``: int64 [1, tokens]. Positions restart at each example, or go on
    after the prefix that it shares; ``shift_labels[t]`` is the token that position t must predict, or -100.
    ``segments`` say what attends to what.
    """
    import torch

    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    segments: list[Segment] = []

    def add(example: Encoded, start: int, end: int, prefix: tuple[int, int]) -> None:
        segments.append((len(ids), len(ids) + end - start, *prefix))
        ids.extend(example.ids[start:end])
        positions.extend(range(start, end))
        labels.extend(_shifted(example)[start:end])

    for length, members in shared_prefixes(examples) if shared else [(0, list(range(len(examples))))]:
        begin = len(ids)
        if length:
            add(examples[members[0]], 0, length, (0, 0))
        for index in members:
            add(examples[index], length, len(examples[index].ids), (begin, begin + length) if length else (0, 0))
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "shift_labels": torch.tensor([labels]),
        "segments": segments,
    }


def to_padded(examples: Sequence[Encoded], pad_id: int) -> Row:
    """One example a row, padded on the right: int64 [examples, longest]."""
    import torch

    longest = max(len(example.ids) for example in examples)
    ids = [example.ids + [pad_id] * (longest - len(example.ids)) for example in examples]
    mask = [[1] * len(example.ids) + [0] * (longest - len(example.ids)) for example in examples]
    labels = [_shifted(example) + [IGNORE] * (longest - len(example.ids)) for example in examples]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "shift_labels": torch.tensor(labels)}


def split_indices(row: Sequence[int], parts: int, lengths: Iterable[int]) -> list[list[int]]:
    """Cut a micro batch into at most ``parts`` of whole examples, about equally long."""
    lengths = list(lengths)
    parts = min(parts, len(row))
    pieces: list[list[int]] = [[]]
    done, size = 0, sum(lengths) / max(parts, 1)
    for number, (index, length) in enumerate(zip(row, lengths, strict=True)):
        left = len(row) - number
        if pieces[-1] and len(pieces) < parts and (done >= size * len(pieces) or left <= parts - len(pieces)):
            pieces.append([])
        pieces[-1].append(index)
        done += length
    return pieces


def _shifted(example: Encoded) -> list[int]:
    following = zip(example.ids[1:], example.trained[1:], strict=True)
    return [token if inside else IGNORE for token, inside in following] + [IGNORE]
