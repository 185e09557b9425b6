"""How good one answer is: against its reference, and in itself. A value is None where the metric does not apply to the row."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

REPEATED = 4  # words of the pieces that repetition counts

Scores = dict[str, float | None]


def exact_match(answer: str, reference: str) -> bool:
    """Equal letter by letter, whitespace at both ends aside."""
    return answer.strip() == reference.strip()


# --- words


class Words:
    """Words in any script: rouge-score's own tokenizer keeps only a–z and 0–9, which makes every Cyrillic or Chinese
    answer score 0. Scripts written without spaces count letter by letter."""

    _pattern = re.compile(
        r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f]"  # kana, CJK, Thai
        r"|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f]+"
    )

    def tokenize(self, text: str) -> list[str]:
        return self._pattern.findall(text.lower())


_ARTICLES = {"a", "an", "the"}
_POINT_OR_SIGN = re.compile(r"(?<=\d)\.(?=\d)|(?<![\w.])[-−](?=\d)")
_NORMAL_WORD = re.compile(rf"-?\d+\.\d+|-\d+|{Words._pattern.pattern}")


def normalised(text: str) -> list[str]:
    """Words as SQuAD compares them (Rajpurkar 2016): lower case, without punctuation and a, an, the.

    Other than there, the point and the sign of a number stay (3.14 is not 314), and punctuation is Unicode's.
    """
    kept = {match.start() for match in _POINT_OR_SIGN.finditer(text)}
    letters = (
        ("-" if letter == "−" else letter) if at in kept else "" if unicodedata.category(letter)[0] == "P" else letter
        for at, letter in enumerate(text)
    )
    return [word for word in _NORMAL_WORD.findall("".join(letters).lower()) if word not in _ARTICLES]


def token_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the words that both have, counted as often as both have them."""
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def repetition(answer: str) -> float:
    """Share of the answer's pieces of four words that stood in it before; 0 for an answer of fewer words."""
    words = Words().tokenize(answer)
    pieces = list(zip(*(words[start:] for start in range(REPEATED)), strict=False))
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


# --- JSON


def parse_json(text: str) -> Any:
    """The JSON object or array that ``text`` is, as a whole; None when it is anything else.

    A bare number, string or null is valid JSON too, but no answer that a person would call JSON. NaN and Infinity,
    which Python accepts, are not JSON.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def same_json(one: Any, other: Any) -> bool:
    """Equal as JSON: the order of keys and 1 against 1.0 do not matter, but true is not 1 (in Python it is)."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def json_flags(answer: str, reference: str) -> tuple[bool, bool] | None:
    """(the answer parses, it is the same object as the reference); None when the reference is no JSON."""
    wanted = parse_json(reference)
    if wanted is None:
        return None
    given = parse_json(answer)
    return given is not None, given is not None and same_json(given, wanted)


def json_keys(answer: str, reference: str) -> float | None:
    """Share of keys with the right value, nested objects by path, lists as a whole; a key too many is a wrong one."""
    wanted, given = parse_json(reference), parse_json(answer)
    if wanted is None:
        return None
    if given is None:
        return 0.0
    there, found = dict(_leaves(wanted)), dict(_leaves(given))
    paths = there.keys() | found.keys()
    right = sum(path in there and path in found and same_json(there[path], found[path]) for path in paths)
    return right / len(paths) if paths else 1.0


def _leaves(value: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Paths and values; an empty object has none. Without recursion: a model may write a thousand braces."""
    found: list[tuple[tuple[str, ...], Any]] = []
    left: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while left:
        path, item = left.pop()
        if isinstance(item, dict):
            left += [((*path, key), inner) for key, inner in item.items()]
        else:
            found.append((path, item))
    return found


def right_keys(answer: str, reference: str) -> dict[str, bool] | None:
    """Whether each top-level key of the reference has its value in the answer; None when the reference is no object."""
    wanted, given = parse_json(reference), parse_json(answer)
    if not isinstance(wanted, dict):
        return None
    there = given if isinstance(given, dict) else {}
    return {key: key in there and same_json(value, there[key]) for key, value in wanted.items()}


# --- numbers

_NUMBER = re.compile(
    r"(?:(?<![\w)\].])(?P<sign>[-−])\s?[$€£]?)?"
    r"(?P<digits>\d{1,3}(?:[,\u00a0\u202f]\d{3})+(?!\d)|\d+)(?P<rest>\.\d+)?(?P<power>[eE][+-]?\d{1,3}\b)?"
)
_MARKED = re.compile(r"####(?P<after>[^\n]*)")
_ENDS_IN_NUMBER = re.compile(r"\d[\s.%€$£*)}\]]*$")


def last_number(text: str) -> Decimal | None:
    """The number after the last ``####`` (GSM8K's mark), else the last number in the text; 1,234 is one number."""
    marked = [found for found in (_numbers(match["after"]) for match in _MARKED.finditer(text)) if found]
    if marked:
        return marked[-1][0]
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str) -> list[Decimal]:
    return [
        Decimal(
            ("-" if match["sign"] else "")
            + re.sub(r"\D", "", match["digits"])
            + (match["rest"] or "")
            + (match["power"] or "")
        )
        for match in _NUMBER.finditer(text)
    ]


def number_match(answer: str, reference: str) -> bool | None:
    """Whether both come to the same number (Cobbe 2021); None where the reference does not end in one."""
    if parse_json(reference) is not None:
        return None
    marked = any(_numbers(match["after"]) for match in _MARKED.finditer(reference))
    if not marked and not _ENDS_IN_NUMBER.search(reference.strip()):
        return None
    return last_number(answer) == last_number(reference)


# --- all of a row


def score_rows(
    answers: Sequence[str], references: Sequence[str], tokens: Sequence[int], finished: Sequence[bool]
) -> list[Scores]:
    """Every metric of every answer but BLEU and chrF (overlap.py); the four sequences run in parallel, one entry a row.

    ``tokens`` counts each answer's tokens without the stop token; ``finished`` is False where an answer was cut at
    the token limit.
    """
    from rouge_score.rouge_scorer import RougeScorer

    words = Words()
    scorer = RougeScorer(["rougeL"], tokenizer=words)
    found: list[Scores] = []
    for answer, reference, count, ended in zip(answers, references, tokens, finished, strict=True):
        flags = json_flags(answer, reference)
        given, wanted = normalised(answer), normalised(reference)
        number = number_match(answer, reference)
        rouge = scorer.score(reference, answer)["rougeL"].fmeasure if words.tokenize(reference) else None
        found.append(
            {
                "exact_match": float(exact_match(answer, reference)),
                "normalised_match": float(given == wanted) if wanted else None,
                "f1": token_f1(given, wanted) if wanted else None,
                "number_match": None if number is None else float(number),
                "json_valid": None if flags is None else float(flags[0]),
                "json_exact": None if flags is None else float(flags[1]),
                "json_keys": json_keys(answer, reference),
                "rouge_l": rouge,
                "tokens": float(count),
                "repetition": repetition(answer),
                "hit_limit": float(not ended),
            }
        )
    return found
