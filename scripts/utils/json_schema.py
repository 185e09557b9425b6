"""Answers that are JSON of a given shape: a JSON schema as a grammar that says which tokens may come next (llguidance).

The schema is read and checked before any model is loaded. Keys come in the order of the schema, in the spacing of
``json.dumps`` (and so of most training rows), for a small model may write spaces for ever where it is let.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from scripts.utils.errors import MachineError, UserError

if TYPE_CHECKING:
    import torch

# a second to make each; beside the tokenizers, for one that holds it can be copied no more
_KNOWN: "WeakKeyDictionary[Any, dict[Any, Any]]" = WeakKeyDictionary()
_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Schema:
    """A checked schema, made ready for a tokenizer. ``text`` is what stands in the file."""

    text: str
    grammar: str
    tokenizer: Any = None
    stop_ids: Sequence[int] = ()

    def ready(self, tokenizer: Any, stop_ids: Sequence[int]) -> "Schema":
        """The schema for this tokenizer's tokens, an answer ending with one of ``stop_ids``."""
        return Schema(self.text, self.grammar, tokenizer, tuple(stop_ids))

    def processor(self, rows: int) -> "WithinSchema":
        """What holds ``rows`` answers of a batch to the schema."""
        return WithinSchema(self, rows)


def read(path: Path) -> Schema:
    """The schema in a file; raises ``UserError`` where it is none, or has keys that cannot be held to."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the JSON schema {path.absolute()} cannot be read: {error}", "check --json-schema") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})", "mend the schema; nothing was generated") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON schema is an object, this is {type(value).__name__}", "see json-schema.org")
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise MachineError(
            "answers within a JSON schema need the package llguidance", "make install EXTRAS=json"
        ) from error
    grammar = LLMatcher.grammar_from_json_schema(text, overrides=_SPACING)
    wrong, said = LLMatcher.validate_grammar_with_warnings(grammar)
    if wrong:
        first = " ".join(said).strip()
        raise UserError(f"{path}: no JSON schema that answers can be held to: {first}", "mend or simplify the schema")
    return Schema(text, grammar)


class WithinSchema:
    """Leaves each row only the tokens with which its answer can still become JSON of the schema."""

    def __init__(self, schema: Schema, rows: int) -> None:
        self._schema, self._rows = schema, rows
        self._matchers: list[Any] = []
        self._ended: set[int] = set()

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """``input_ids``: int64 [rows, tokens], ``scores``: float [rows, vocabulary]."""
        import numpy as np
        import torch
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        if self._matchers:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                if row not in self._ended:
                    self._matchers[row].consume_token(token)
                if token in self._schema.stop_ids:
                    self._ended.add(row)
        else:
            self._matchers = self._begin(scores.shape[1])
        bits = allocate_token_bitmask(self._rows, scores.shape[1])
        for row, matcher in enumerate(self._matchers):
            if row not in self._ended and matcher.is_error():
                raise UserError(
                    f"the answer cannot be held to the JSON schema: {matcher.get_error()}", "simplify the schema"
                )
            if row not in self._ended:  # after its end token a row may hold whatever fills it up
                fill_next_token_bitmask(matcher, bits, row)
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, : scores.shape[1]]
        return scores.masked_fill(~torch.from_numpy(allowed.astype(bool)).to(scores.device), float("-inf"))

    def _begin(self, vocabulary: int) -> list[Any]:
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        schema = self._schema
        known = _KNOWN.setdefault(schema.tokenizer, {})
        key = (vocabulary, schema.stop_ids)
        if key not in known:
            try:
                known[key] = from_tokenizer(schema.tokenizer, n_vocab=vocabulary, eos_token=list(schema.stop_ids))
            except ValueError as error:
                raise MachineError(
                    f"llguidance cannot read this model's tokenizer: {error}", "leave --json-schema out"
                ) from error
        return [LLMatcher(known[key], schema.grammar) for _ in range(self._rows)]
