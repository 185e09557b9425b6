"""A tokenizer as GGUF describes it: tokens with their kinds, merges or scores, special ids, how text is cut, template.

Two kinds: byte-level BPE (GPT-2's, Llama 3, Qwen, SmolLM) and BPE with byte fallback as SentencePiece makes it (Llama 2,
Mistral). How text is cut into words has a name in GGUF and a rule in each runtime; a rule without a known name is refused.
"""

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.utils.chat import Template, render_prompt
from scripts.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
# llama.cpp's name of a rule: the steps of the tokenizer's pre_tokenizer that it stands for
_RULES: "dict[str, list[tuple[str, Any]]]" = {
    "gpt-2": [("ByteLevel", True)],
    "smollm": [("Digits", True), ("ByteLevel", True)],
    "llama-bpe": [
        ("Split", rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"),
        ("ByteLevel", False),
    ],
    "qwen2": [("Split", rf"{_SHORT}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"), ("ByteLevel", False)],
    "tekken": [("Split", rf"{_TEKKEN}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"), ("ByteLevel", False)],
}
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # GGUF's kinds of a token
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """``model``: gpt2 (byte-level) or llama (SentencePiece); ``scores`` only for the latter, ``merges`` for the former."""

    model: str
    rule: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    add_bos: bool
    add_space: bool
    template: str


def describe(tokenizer: Any, template: Template, size: int, stop_ids: "Sequence[int]") -> Vocabulary:
    """``size``: rows of the embeddings. Raises ``UserError`` for a tokenizer that GGUF cannot describe."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise _refused(f"its tokenizer is of type {model['type']}, not BPE")
    steps = _steps(parts)
    sentencepiece = bool(model.get("byte_fallback"))
    rule = "default" if sentencepiece else _rule(steps)
    tokens, kinds = _tokens(model, parts["added_tokens"], size)
    if sentencepiece:
        _check_sentencepiece(parts)
        kinds = [_BYTE if _BYTE_TOKEN.fullmatch(t) else kind for t, kind in zip(tokens, kinds, strict=True)]
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        rule=rule,
        tokens=tokens,
        kinds=kinds,
        merges=[] if sentencepiece else [" ".join(pair) for pair in pairs],
        scores=_scores(tokens, pairs) if sentencepiece else [],
        special=_special(tokenizer, stop_ids),
        add_bos=adds_bos(tokenizer, template),
        add_space=sentencepiece and _adds_space(parts),
        template=without_generation_tags(template.text),
    )


def _refused(why: str) -> UserError:
    return UserError(
        f"the model cannot be exported to GGUF here: {why}",
        "convert it with llama.cpp's own converter: CONVERTER=path/to/convert_hf_to_gguf.py",
    )


def _steps(parts: dict[str, Any]) -> list[tuple[str, Any]]:
    """The pre_tokenizer as (kind, what decides); steps within a Sequence one after the other."""
    found: list[tuple[str, Any]] = []

    def walk(step: dict[str, Any] | None) -> None:
        if step is None:
            return
        kind = step["type"]
        if kind == "Sequence":
            for inner in step["pretokenizers"]:
                walk(inner)
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            found.append((kind, step["use_regex"]))
        elif kind == "Digits":
            found.append((kind, step["individual_digits"]))
        elif kind == "Split" and step["behavior"] in ("Isolated", "Removed") and "Regex" in step["pattern"]:
            # "removed, inverted" and "isolated" cut alike where the rule leaves nothing between its matches
            if (step["behavior"] == "Removed") != step["invert"]:
                found.append(("?", step))
            else:
                found.append((kind, step["pattern"]["Regex"]))
        else:
            found.append(("?", step))

    walk(parts["pre_tokenizer"])
    return found


def _rule(steps: list[tuple[str, Any]]) -> str:
    for name, known in _RULES.items():
        if steps == known:
            return name
    raise _refused("its tokenizer cuts text by a rule that has no name known here")


def _check_sentencepiece(parts: dict[str, Any]) -> None:
    """What SentencePiece's BPE does in a runtime: spaces become ▁, nothing else is changed or cut."""
    normal = json.dumps(parts["normalizer"]) + json.dumps(parts["pre_tokenizer"])
    kinds = set(re.findall(r'"type": "(\w+)"', normal)) - {"Sequence"}
    if not kinds <= {"Prepend", "Replace", "Metaspace"} or "\\u2581" not in normal:
        raise _refused(f"its tokenizer changes text in a way that has no name in GGUF ({', '.join(sorted(kinds))})")


def _adds_space(parts: dict[str, Any]) -> bool:
    normal = json.dumps(parts["normalizer"])
    return '"Prepend"' in normal or (parts["pre_tokenizer"] or {}).get("prepend_scheme") in ("always", "first")


def _tokens(model: dict[str, Any], added: list[dict[str, Any]], size: int) -> tuple[list[str], list[int]]:
    """Every id's text and kind, also of ids that have a row in the embeddings and no token."""
    by_id = {number: (text, _NORMAL) for text, number in model["vocab"].items()}
    by_id |= {entry["id"]: (entry["content"], _CONTROL if entry["special"] else _USER) for entry in added}
    if model.get("unk_token") in model["vocab"]:
        by_id[model["vocab"][model["unk_token"]]] = (model["unk_token"], _UNKNOWN)
    if max(by_id) >= size:
        raise _refused(f"its tokenizer has an id {max(by_id):,}, its embeddings have {size:,} rows")
    whole = [by_id.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(size)]
    return [text for text, _ in whole], [kind for _, kind in whole]


def _scores(tokens: list[str], pairs: "list[tuple[str, ...]]") -> list[float]:
    """A runtime merges the pair of the highest score: minus the place of the merge that first makes the token."""
    first: dict[str, int] = {}
    for place, pair in enumerate(pairs):
        first.setdefault("".join(pair), place)
    return [-float(first.get(token, len(pairs))) for token in tokens]


def _special(tokenizer: Any, stop_ids: "Sequence[int]") -> dict[str, int]:
    """Ids by GGUF's names; the first end token besides the tokenizer's own becomes eot, the end of a turn."""
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
        "eot": next((number for number in stop_ids if number != tokenizer.eos_token_id), None),
    }
    return {name: number for name, number in ids.items() if number is not None}


def adds_bos(tokenizer: Any, template: Template) -> bool:
    """Whether a runtime shall put the begin token before a text that lacks it: where the tokenizer does so by itself and
    the run was trained with it."""
    if not tokenizer.bos_token or tokenizer("x")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return False
    return render_prompt(template, tokenizer, [{"role": "user", "content": "x"}]).text.startswith(tokenizer.bos_token)


def without_generation_tags(template: str) -> str:
    """The template without transformers' own generation tags, which other engines of Jinja do not know."""
    text = re.sub(r"{%(-?)\s*generation\s*(-?)%}", r"{%\1 if true \2%}", template)
    return re.sub(r"{%(-?)\s*endgeneration\s*(-?)%}", r"{%\1 endif \2%}", text)


def add_vocabulary(writer: Any, words: Vocabulary) -> None:
    """Write the tokenizer (metadata only)."""
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.rule)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    if words.scores:
        writer.add_token_scores(words.scores)
    if words.merges:
        writer.add_token_merges(words.merges)
    for name, number in words.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(words.add_space)
    writer.add_chat_template(words.template)
