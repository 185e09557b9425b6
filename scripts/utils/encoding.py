"""Text as token ids: which carry loss, how examples share a row, and the loss over them.

Text is tokenised segment by segment, cut where a span begins or ends, so that the ids of a prompt are the same
whether an answer follows (training) or is awaited (inference). Masks are by position, never by id: in many models
the padding token is the end token.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from scripts.utils.chat import Prompt, Span
from scripts.utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Loss = Callable[[Any, dict[str, "torch.Tensor"]], "torch.Tensor"]
IGNORE = -100  # label of a position without loss, as torch's cross_entropy has it


@dataclass(frozen=True)
class Encoded:
    """One example: ``ids`` and, of equal length, whether each token carries loss (the first never can)."""

    ids: list[int]
    trained: list[bool]

    @property
    def trained_tokens(self) -> int:
        return sum(self.trained[1:])


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    spans: Iterable[Sequence[int]],
    literals: Iterable[Sequence[int]] = (),
    cuts: Iterable[int] = (),
) -> Encoded:
    """Token ids of ``text`` and which of them lie in ``spans``; both sorted, not overlapping, in characters.

    ``literals`` are look-alikes of control tokens (see ``literals.py``): never the token, always its letters.
    ``cuts`` are more places where the text is cut: the borders of turns without loss, which a prompt is cut at too.
    """
    trained_spans = [(span[0], span[1]) for span in spans]
    plain = [(span[0], span[1]) for span in literals]
    if _adds_prefix_space(tokenizer):
        return _encode_whole(tokenizer, text, trained_spans, plain)
    ids: list[int] = []
    trained: list[bool] = []
    borders = sorted({0, len(text), *cuts, *(border for span in (*trained_spans, *plain) for border in span)})
    for start, end in pairwise(borders):
        letters = any(a <= start and end <= b for a, b in plain)
        new = _letters(tokenizer, text[start:end]) if letters else _ids(tokenizer, text[start:end])
        ids += new
        trained += [any(a <= start and end <= b for a, b in trained_spans)] * len(new)
    return Encoded(ids, trained)


def _ids(tokenizer: Any, text: str, split_special_tokens: bool = False) -> list[int]:
    backend = _backend(tokenizer)
    if backend is None or backend.truncation or backend.padding:
        options = {"split_special_tokens": True} if split_special_tokens else {}
        return list(tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])
    if backend.encode_special_tokens != (wanted := split_special_tokens or tokenizer.split_special_tokens):
        backend.encode_special_tokens = wanted
    return list(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of the ids, with control tokens, as it is: no space is tidied away."""
    backend = _backend(tokenizer)
    if backend is None:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return str(backend.decode(ids, skip_special_tokens=False))


def _backend(tokenizer: Any) -> Any:
    """The tokenizer's compiled part where transformers adds nothing of its own, which saves most of a call; else None."""
    if "_sft_backend" not in tokenizer.__dict__:
        from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

        kind = type(tokenizer)
        plain = (
            isinstance(tokenizer, PreTrainedTokenizerFast)
            and kind.__call__ is PreTrainedTokenizerBase.__call__
            and kind.decode is PreTrainedTokenizerBase.decode
            and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
            and kind._decode is PreTrainedTokenizerFast._decode
        )
        tokenizer.__dict__["_sft_backend"] = tokenizer.backend_tokenizer if plain else None
    return tokenizer.__dict__["_sft_backend"]


def _letters(tokenizer: Any, text: str) -> list[int]:
    """Ids of a look-alike's letters. An added token that is not marked special has to be cut to come apart."""
    ids = _ids(tokenizer, text, split_special_tokens=True)
    if _holds_control_token(tokenizer, ids) and len(text) > 1:
        ids = [i for part in (text[0], text[1:]) for i in _ids(tokenizer, part, split_special_tokens=True)]
    if _holds_control_token(tokenizer, ids):
        raise UserError(f"a message spells the control token {text!r}, which has no other spelling", "take it out")
    return ids


def _holds_control_token(tokenizer: Any, ids: list[int]) -> bool:
    return any(i in tokenizer.added_tokens_decoder for i in ids)


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """Ids of a prompt, cut at the same places as in training."""
    return encode(tokenizer, prompt.text, prompt.spans, prompt.literals).ids


def _adds_prefix_space(tokenizer: Any) -> bool:
    """True for SentencePiece tokenizers that put a space before every text: segments would each gain one."""
    known = tokenizer.__dict__.get("_sft_prefix_space")
    if known is None:
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
        known = tokenizer.__dict__["_sft_prefix_space"] = first.startswith("▁")
    return bool(known)


def _encode_whole(tokenizer: Any, text: str, spans: list[Span], literals: list[Span]) -> Encoded:
    """Tokenise in one piece and map spans by offsets; refuses a row whose span borders fall inside a token.

    Look-alikes are held apart by a character that is taken out again: pieces would each gain a space.
    """
    apart = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text) if literals else ""
    for start, _ in reversed(literals):
        text = text[: start + 1] + apart + text[start + 1 :]
    cuts = [start + 1 + number for number, (start, _) in enumerate(literals)]
    spans = [tuple(border + sum(start < border for start, _ in literals) for border in span) for span in spans]  # type: ignore[misc]
    both = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, trained = [], []
    for token, (start, end) in zip(both["input_ids"], both["offset_mapping"], strict=True):
        if any(start <= cut < end for cut in cuts):
            if end - start > 1:
                raise UserError("a message spells a control token that does not come apart", "take it out")
            continue
        inside = [start < b and end > a and end > start for a, b in spans]
        if any(inside) and not any(a <= start and end <= b for a, b in spans):
            raise UserError("a token reaches over the border of an assistant turn", "use another render.template")
        ids.append(token)
        trained.append(any(inside))
    return Encoded(ids, trained)


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

    With packing a micro batch is one row of at most ``budget`` tokens; examples are shuffled before they are packed
    in windows, so that rows mix lengths and the order is random, but the same for the same seed.
    """
    order = list(range(len(examples)))
    shuffler = random.Random(seed)
    shuffler.shuffle(order)
    if not packing:
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rows: list[list[int]] = []
    window = 1024  # packs tightly enough and keeps best-fit's cost small on large data
    for start in range(0, len(order), window):
        part = order[start : start + window]
        rows += [[part[i] for i in row] for row in pack([len(examples[i].ids) for i in part], budget)]
    shuffler.shuffle(rows)
    return rows


def to_row(examples: Sequence[Encoded]) -> dict[str, "torch.Tensor"]:
    """Examples side by side in one row without padding.

    ``input_ids``, ``position_ids``, ``shift_labels``: int64 [1, tokens]. Positions restart at each example, which is
    how transformers knows that attention must not cross; ``shift_labels[t]`` is the token that position t must
    predict, or -100.
    """
    import torch

    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for example in examples:
        ids += example.ids
        positions += range(len(example.ids))
        labels += _shifted(example)
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "shift_labels": torch.tensor([labels]),
    }


def to_padded(examples: Sequence[Encoded], pad_id: int) -> dict[str, "torch.Tensor"]:
    """One example a row, padded on the right: int64 [examples, longest]."""
    import torch

    longest = max(len(example.ids) for example in examples)
    ids = [example.ids + [pad_id] * (longest - len(example.ids)) for example in examples]
    mask = [[1] * len(example.ids) + [0] * (longest - len(example.ids)) for example in examples]
    labels = [_shifted(example) + [IGNORE] * (longest - len(example.ids)) for example in examples]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "shift_labels": torch.tensor(labels)}


def _shifted(example: Encoded) -> list[int]:
    following = zip(example.ids[1:], example.trained[1:], strict=True)
    return [token if inside else IGNORE for token, inside in following] + [IGNORE]


def summed_loss(model: Any, row: dict[str, "torch.Tensor"]) -> "torch.Tensor":
    """Sum of the cross entropies (natural log) over the row's trained tokens, differentiable.

    Logits are computed only at positions where some label is, by the 1-D index that transformers' models take as
    ``logits_to_keep``; with most rows being prompt, that spares most of the [tokens, vocabulary] matrix.
    """
    import torch
    from torch.nn.functional import cross_entropy

    inputs = {name: value for name, value in row.items() if name != "shift_labels"}
    labels = row["shift_labels"]
    keep = torch.nonzero((labels != IGNORE).any(0)).squeeze(-1)
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    targets = labels[:, keep]
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def fused_loss(model: Any, row: dict[str, "torch.Tensor"]) -> "torch.Tensor":
    """The same sum from a model whose own forward computes the loss (Unsloth's fused one): unshifted labels, a mean."""
    import torch

    labels = torch.full_like(row["input_ids"], IGNORE)
    labels[:, 1:] = row["shift_labels"][:, :-1]
    inputs = {name: value for name, value in row.items() if name != "shift_labels"}
    return model(**inputs, labels=labels).loss * (labels != IGNORE).sum()


def batch_loss(
    model: Any, examples: Sequence[Encoded], budget: int, *, packing: bool = True, loss: Loss = summed_loss
) -> tuple[float, int]:
    """Summed loss over ``examples`` without gradients, and the number of trained tokens: eval and train agree by it."""
    import torch

    device = next(model.parameters()).device
    rows = pack([len(example.ids) for example in examples], budget) if packing else [[i] for i in range(len(examples))]
    total = 0.0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for indices in rows:
            row = {name: value.to(device) for name, value in to_row([examples[i] for i in indices]).items()}
            if bool((row["shift_labels"] != IGNORE).any()):
                total += float(loss(model, row))
    model.train(was_training)
    return total, sum(example.trained_tokens for example in examples)


def packing_is_exact(model: Any, examples: Sequence[Encoded], loss: Loss = summed_loss) -> bool:
    """Whether two examples in one row have the loss that they have alone, on this model, device and kernels."""
    pair = sorted(examples, key=lambda example: len(example.ids))[:2]
    if len(pair) < 2:
        return True
    together, _ = batch_loss(model, pair, budget=1 << 30, loss=loss)
    alone, _ = batch_loss(model, pair, budget=1, loss=loss)
    return abs(together - alone) <= 1e-2 * abs(alone)
