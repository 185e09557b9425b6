"""Text as token ids, and which of them carry loss.

Text is tokenised segment by segment, cut where a span begins or ends, so that the ids of a prompt are the same
whether an answer follows (training) or is awaited (inference). Masks are by position, never by id: in many models
the padding token is the end token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from scripts.utils.chat import Prompt, Span
from scripts.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
