"""Texts of rows as a run's report shows them: what differs from the reference word by word, and where a long one folds.

Each answer is compared with the reference, not with the other answer: what is marked is what is not as wanted.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher

from scripts.utils.shown import visible

Segment = tuple[str, bool]  # text, and whether it is marked

FOLD_CHARACTERS, FOLD_LINES = 480, 14  # of a text, before the rest is folded away
_WORDS_COMPARED = 3_000  # a longer text is not marked: difflib's time grows with the square
_EAST = "\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"  # written without spaces: sign by sign
_SIGN = r"!-/:-@\[-^`{-~"  # ASCII punctuation but _
# whatever else stands together stays together: letters with their accents, emoji with what joins them
_PIECE = re.compile(rf"\s+|[{_EAST}][\u3099\u309a\ufe00-\ufe0f]*|[{_SIGN}]|[^\s{_EAST}{_SIGN}]+")

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def pieces(text: str) -> list[str]:
    """Words, signs and the spaces between them; joined they are the text."""
    return _PIECE.findall(text)


def marked(reference: str, answer: str) -> tuple[list[Segment], list[Segment], str]:
    """The reference with what the answer lacks marked, the answer with what is not in the reference marked, and both in words."""
    wanted, given = pieces(reference), pieces(answer)
    wanted_words = [at for at, piece in enumerate(wanted) if not piece.isspace()]
    given_words = [at for at, piece in enumerate(given) if not piece.isspace()]
    if max(len(wanted_words), len(given_words)) > _WORDS_COMPARED:
        return [(reference, False)], [(answer, False)], "too long to be compared word by word"
    lacking, foreign = set(wanted_words), set(given_words)
    for start, other, count in _common([wanted[at] for at in wanted_words], [given[at] for at in given_words]):
        lacking -= set(wanted_words[start : start + count])
        foreign -= set(given_words[other : other + count])
    return _segments(wanted, lacking), _segments(given, foreign), _in_words(wanted, lacking, given, foreign)


def _common(wanted: Sequence[str], given: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Stretches of equal words: (where in the one, where in the other, how many).

    Equal ends are taken off first: above 200 words difflib leaves out the most frequent ones as places to begin at,
    without which an answer that repeats itself would take it minutes.
    """
    shorter = min(len(wanted), len(given))
    head = next((at for at in range(shorter) if wanted[at] != given[at]), shorter)
    tail = next((at for at in range(shorter - head) if wanted[-1 - at] != given[-1 - at]), shorter - head)
    yield 0, 0, head
    yield len(wanted) - tail, len(given) - tail, tail
    matcher = SequenceMatcher(None, wanted[head : len(wanted) - tail], given[head : len(given) - tail])
    for block in matcher.get_matching_blocks():
        yield head + block.a, head + block.b, block.size


def _in_words(wanted: Sequence[str], lacking: set[int], given: Sequence[str], foreign: set[int]) -> str:
    """What is marked, for who cannot see it; signs are no words."""

    def words(parts: Sequence[str], among: Iterable[int]) -> int:
        return sum(any(map(str.isalnum, parts[at])) for at in among)

    if not lacking and not foreign:
        return "the same as the reference" if list(given) == list(wanted) else "the same but for spaces"
    new, gone = words(given, foreign), words(wanted, lacking)
    if not new and not gone:
        return "the same words as the reference, other signs"
    of_given, of_wanted = words(given, range(len(given))), words(wanted, range(len(wanted)))
    return f"{new:,} of {of_given:,} words not in the reference, {gone:,} of its {of_wanted:,} missing"


def _segments(parts: Sequence[str], chosen: set[int]) -> list[Segment]:
    """Neighbours of one kind joined; a space between two marked words is marked with them."""
    flags = [
        at in chosen or (piece.isspace() and at - 1 in chosen and at + 1 in chosen) for at, piece in enumerate(parts)
    ]
    joined: list[Segment] = []
    for piece, flag in zip(parts, flags, strict=True):
        if joined and joined[-1][1] == flag:
            joined[-1] = (joined[-1][0] + piece, flag)
        else:
            joined.append((piece, flag))
    return joined


def clean(text: str) -> str:
    """A text as a page can hold it: line ends as one sign, control characters as their pictures."""
    text = text.replace("\r\n", "\n")
    return visible(text) if _CONTROL.search(text) else text  # most texts hold none, and looking is quicker


def fold(segments: Sequence[Segment]) -> tuple[list[Segment], list[Segment]]:
    """The beginning and the rest, which is empty unless the text is clearly longer than what is shown at once."""
    text = "".join(part for part, _ in segments)
    ends = [match.start() for match in re.finditer("\n", text)]
    at = min(FOLD_CHARACTERS, ends[FOLD_LINES - 1] if len(ends) >= FOLD_LINES else FOLD_CHARACTERS)
    if len(text) - at < 200 and len(ends) < FOLD_LINES + 5:
        return list(segments), []
    at = boundary(text, at)
    return list(_between(segments, 0, at)), list(_between(segments, at, len(text)))


def fold_before(text: str) -> tuple[str, str]:
    """What comes before, and the end of a text, which is shown at once; the first is empty unless it is long."""
    ends = [match.end() for match in re.finditer("\n", text)]
    at = max(len(text) - FOLD_CHARACTERS, ends[-FOLD_LINES] if len(ends) >= FOLD_LINES else 0)
    if at < 200 and len(ends) < FOLD_LINES + 5:
        return "", text
    at = boundary(text, at)
    return text[:at], text[at:]


def boundary(text: str, at: int) -> int:
    """``at``, or a little before, where no word is torn, and at least no letter from its accent and no emoji from its parts."""
    space = max(text.rfind(" ", at - 40, at), text.rfind("\n", at - 40, at)) + 1 if at >= 40 else 0
    if space:
        return space
    while 0 < at < len(text) and (_joins(text[at]) or text[at - 1] == "\u200d"):
        at -= 1
    return at


def _joins(sign: str) -> bool:
    return unicodedata.category(sign).startswith("M") or sign == "\u200d" or "\U0001f3fb" <= sign <= "\U0001f3ff"


def _between(segments: Sequence[Segment], start: int, end: int) -> Iterator[Segment]:
    place = 0
    for text, flag in segments:
        part = text[max(start - place, 0) : max(end - place, 0)]
        if part:
            yield part, flag
        place += len(text)
