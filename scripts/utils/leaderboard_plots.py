"""The leaderboard's drawings as SVG without a script: parallel coordinates over settings and figures, and all loss curves.

Drawings are stretched to the page's width; their labels are text beside them, so that they stay readable on a phone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from scripts.utils import leaderboard_ranking as ranking
from scripts.utils.leaderboard_runs import Entry, Points
from scripts.utils.leaderboard_table import Board, say
from scripts.utils.run_report_curves import along, line, short, thin, ticks

COLOURS = 8  # runs with a colour of their own, the best first; the others are grey
MOST_AXES = 12
_LABEL_GAP = 0.07  # of an axis, between two of its labels


@dataclass(frozen=True)
class Axis:
    """``places``: where each run stands, 0 at the bottom to 1, or None; ``labels``: texts with their places."""

    title: str
    places: tuple[float | None, ...]
    labels: tuple[tuple[float, str], ...]


def colour(at: int) -> str:
    return f"c{at}" if at < COLOURS else "rest"


def parallel(board: Board) -> list[str]:
    """A line for each run through its settings and figures; nothing where there is nothing to compare."""
    names = list(dict.fromkeys([*(group.metric for group in board.groups), ranking.VAL_LOSS]))
    settings = [_axis(key, [_setting(entry, key) for entry in board.entries]) for key in board.keys]
    figures = [
        _axis(
            f"{ranking.label(name)} {'↑' if ranking.higher_is_better(name) else '↓'}",
            [entry.scores.get(name) for entry in board.entries],
            partial(ranking.show, name),
        )
        for name in names
        if any(name in entry.scores for entry in board.entries)
    ]
    axes = [*settings[: MOST_AXES - len(figures)], *figures]
    if len(axes) < 2 or len(board.entries) < 2:
        return []
    width = 1000 / len(axes)
    at = [width * (number + 0.06) for number in range(len(axes))]
    lines = Markup("").join(
        Markup('<path class="{}" data-run="{}" d="{}"><title>{}</title></path>').format(
            colour(number), number, path, _said(entry, board)
        )
        for number, entry in reversed(list(enumerate(board.entries)))
        if (path := _through(at, [axis.places[number] for axis in axes]))
    )
    grid = "".join(f"M{x:.1f} 0V1000" for x in at)
    labels = Markup("").join(
        Markup('<b style="left:{:.2f}%">{}</b>').format(x / 10, axis.title)
        + Markup("").join(
            Markup('<span style="left:{:.2f}%;top:{:.1f}%">{}</span>').format(x / 10, 100 * (1 - place), text)
            for place, text in axis.labels
        )
        for x, axis in zip(at, axes, strict=True)
    )
    left_out = len(settings) + len(figures) - len(axes)
    note = f" Left out for room: {', '.join(board.keys[-left_out:])}." if left_out else ""
    return [
        '<h2 id="settings">Which settings did well?</h2>',
        str(Markup('<p class="note">A line for each run, the best in colour, through what differs between them and what came of it; '
        'point at a line or at a row of the table to see it alone. ↑ higher is better, ↓ lower is better.{}</p>').format(note)),
        str(Markup('<div class="wide"><div class="axes" style="min-width:{}rem">'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{}"><path class="grid" d="{}"/>{}</svg>{}</div></div>').format(
            round(len(axes) * max(7, *(len(axis.title) / 2 + 1 for axis in axes))), f"Parallel coordinates of {len(board.entries)} runs over {', '.join(axis.title for axis in axes)}", grid, lines, labels)),
    ]  # fmt: skip


def _said(entry: Entry, board: Board) -> str:
    settings = [f"{key} {say(entry.settings[key])}" for key in board.keys if key in entry.settings]
    scores = [
        f"{ranking.label(group.metric)} {ranking.show(group.metric, entry.scores.get(group.metric))}"
        for group in board.groups
    ]
    return ", ".join([entry.run, *settings, *dict.fromkeys(scores)])


def _through(at: Sequence[float], places: Sequence[float | None]) -> str:
    """A path through the known places, broken where one is not known; a place between two unknown ones is a dash."""
    steps, joined = [], False
    for number, (x, place) in enumerate(zip(at, places, strict=True)):
        if place is None:
            joined = False
            continue
        y = 1000 * (1 - place)
        alone = not joined and (number + 1 == len(places) or places[number + 1] is None)
        steps.append(f"{'L' if joined else 'M'}{x:.1f} {y:.1f}" + ("h12" if alone else ""))
        joined = True
    return "".join(steps)


def _setting(entry: Entry, key: str) -> Any:
    """None for a run whose settings are not known; what is not set has a mark of its own."""
    return say(None) if entry.settings and entry.settings.get(key) is None else entry.settings.get(key)


def _axis(title: str, values: Sequence[Any], shown: Callable[[Any], str] = say) -> Axis:
    """Numbers on a scale, logarithmic where the largest is ten times the least; anything else one mark a value."""
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        scale = scale_of(min(known), max(known))
        distinct = sorted(set(known))
        marks = distinct if len(distinct) <= 6 else _round_marks(distinct[0], distinct[-1])
        places = tuple(None if value is None else scale(value) for value in values)
        return Axis(title, places, _apart([(scale(mark), shown(mark)) for mark in marks]))
    texts = sorted({say(value) for value in known})
    at = {text: (number + 0.5) / len(texts) for number, text in enumerate(texts)}
    places = tuple(None if value is None else at[say(value)] for value in values)
    return Axis(title, places, _apart([(place, text) for text, place in at.items()]))


def scale_of(low: float, high: float) -> Callable[[float], float]:
    """From a value to its place in [0, 1]."""
    if low > 0 and high >= 10 * low:
        return lambda value: math.log(value / low) / math.log(high / low)
    return lambda value: (value - low) / (high - low) if high > low else 0.5


def _round_marks(low: float, high: float) -> list[float]:
    """Round numbers between two, at the powers of ten on a logarithmic scale; the ends themselves where there are few."""
    if low > 0 and high >= 10 * low:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        marks = [
            factor * 10.0**power
            for power in range(min(powers, default=0) - 1, max(powers, default=0) + 1)
            for factor in (1, 2, 5)
        ]
        return [mark for mark in marks if low <= mark <= high]
    return ticks(low, high, 5)


def _apart(labels: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    kept: list[tuple[float, str]] = []
    for place, text in sorted(labels):
        if not kept or place - kept[-1][0] >= _LABEL_GAP:
            kept.append((place, text))
    return tuple(kept)


def curves(board: Board) -> list[str]:
    """The validation losses of all runs in one drawing, the training losses in another."""
    parts = []
    for title, points_of in (("Validation loss", lambda e: e.val), ("Training loss", lambda e: e.train)):
        drawn = {
            at: thin(list(points)) for at, entry in enumerate(board.entries) if (points := _finite(points_of(entry)))
        }
        if drawn:
            parts.append(str(_figure(title, board, drawn)))
    return ['<h2 id="curves">How the training went</h2>', *parts] if parts else []


def _finite(points: Points) -> Points:
    return [point for point in points if math.isfinite(point[1])]


def _figure(title: str, board: Board, drawn: dict[int, Points]) -> Markup:
    steps = [step for points in drawn.values() for step, _ in points]
    values = [value for points in drawn.values() for _, value in points]
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    scale = scale_of(low, high)

    def x(step: float) -> float:
        return (step - left) / (right - left) if right > left else 0.5

    def y(value: float) -> float:
        return 0.02 + 0.96 * (1 - scale(value))

    marks = _apart([(1 - y(mark), short(mark)) for mark in _round_marks(low, high) or [low, high]])
    paths = Markup("").join(
        Markup('<path class="{}{}" data-run="{}" d="{}"><title>{}</title></path>').format(
            colour(at), " dot" if len(points) == 1 else "", at, line(points, x, y) + ("h0" if len(points) == 1 else ""), board.entries[at].run
        )
        for at, points in reversed(drawn.items())
    )  # fmt: skip
    legend = Markup("").join(
        Markup('<li data-run="{0}"><svg viewBox="0 0 30 10" aria-hidden="true"><path class="{1}" d="M1 5H29"/></svg>{2}</li>').format(
            at, colour(at), board.entries[at].run
        )
        for at in drawn
        if at < COLOURS
    )  # fmt: skip
    others = sum(at >= COLOURS for at in drawn)
    if others:
        legend += Markup(
            '<li><svg viewBox="0 0 30 10" aria-hidden="true"><path class="rest" d="M1 5H29"/></svg>{:,} others</li>'
        ).format(others)
    lowest = min(((value, step, at) for at, points in drawn.items() for step, value in points), default=(0.0, 0, 0))
    words = f"{title} by step of {len(drawn)} runs; lowest {short(lowest[0])}, of {board.entries[lowest[2]].run} at step {lowest[1]:,}"
    return Markup(
        '<figure>\n<figcaption><strong>{}</strong>, nats a token{}<ul class="legend">{}</ul></figcaption>\n'
        '<div class="chart"><div class="up">{}</div><div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        'aria-label="{}"><path class="grid" d="{}"/>{}</svg></div><div class="along">{}</div></div>\n</figure>'
    ).format(
        title,
        ", logarithmic" if low > 0 and high >= 10 * low else "",
        legend,
        Markup("").join(
            Markup('<span style="top:{:.1f}%">{}</span>').format(100 * (1 - place), text) for place, text in marks
        ),
        words,
        "".join(f"M0 {1000 * (1 - place):.0f}H1000" for place, _ in marks),
        paths,
        along(left, right, x),
    )
