"""The curves of a run: read from TensorBoard's event files, and drawn as SVG with their figures in a table beneath.

The drawing is stretched to the width of the page and its labels are text beside it, so that they stay readable on a
phone.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from scripts.utils import event_log, files
from scripts.utils.errors import SFTError
from scripts.utils.report_page import table

Points = list[tuple[int, float]]  # (step, value), by step

TAGS = {"train": "train/loss", "val": "eval/loss", "rate": "train/learning_rate"}
_KEYS = {"train": "loss", "val": "eval_loss", "rate": "learning_rate"}  # the same in metrics.jsonl
MOST_POINTS = 600  # drawn in one line
_TABLE_ROWS = 20


@dataclass(frozen=True)
class Curves:
    """Losses in nats a token, and the learning rate; ``problems`` says what could not be read."""

    train: Points = field(default_factory=list)
    val: Points = field(default_factory=list)
    rate: Points = field(default_factory=list)
    problems: tuple[str, ...] = ()

    @property
    def best(self) -> tuple[int, float] | None:
        """The lowest validation loss."""
        return min(self.val, key=lambda point: point[1], default=None)


def read(folder: Path) -> Curves:
    """The curves of the run in ``folder``; from its metrics.jsonl where it wrote no event files."""
    events = event_files(folder)
    if not events:
        return _from_metrics(folder / "metrics.jsonl")
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    found: dict[str, Points] = {name: [] for name in TAGS}
    problems = []
    for path in events:  # one start of the run each, in the order of their times
        accumulator = EventAccumulator(str(path), size_guidance={SCALARS: 0}, purge_orphaned_data=False)
        try:
            accumulator.Reload()
        except Exception as problem:  # tensorboard has an own exception for each way of being damaged
            problems.append(f"{path.name} is damaged and was read up to the damage only ({type(problem).__name__})")
        there = accumulator.Tags()[SCALARS]
        new = {
            name: [(event.step, event.value) for event in accumulator.Scalars(tag)] if tag in there else []
            for name, tag in TAGS.items()
        }
        join(found, new)
    return Curves(**found, problems=tuple(problems))


def event_files(folder: Path) -> list[Path]:
    """Those of the training, one a start; not the file with the run's results (event_log.py), which holds no curve."""
    found = (folder / "tensorboard").glob("events.out.tfevents.*")
    return sorted(path for path in found if not path.name.endswith(event_log.RESULTS))


def join(found: dict[str, Points], new: dict[str, Points]) -> None:
    """Add a later start's points: it went on from a checkpoint, so what was logged after that one no longer counts."""
    first = min((points[0][0] for points in new.values() if points), default=None)
    for name, points in new.items():
        if first is not None:
            found[name][:] = [point for point in found[name] if point[0] < first]
        found[name] += [point for point in points if math.isfinite(point[1])]


def _from_metrics(path: Path) -> Curves:
    found: dict[str, Points] = {name: [] for name in TAGS}
    if not path.is_file():
        return Curves(problems=("no curves: the run has logged nothing yet",))
    problems = ["the run wrote no TensorBoard files (tracking.report_to): its curves are from metrics.jsonl"]
    try:
        for line in files.read_jsonl(path):
            for name, key in _KEYS.items():
                if isinstance(line.get(key), int | float):
                    found[name].append((line["step"], float(line[key])))
    except (SFTError, KeyError, AttributeError):
        problems.append(f"{path.name} is damaged and was read up to the damage only")
    return Curves(**found, problems=tuple(problems))


# --- drawing


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """At most ``most`` of the points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= most:
        return points
    stretches = most // 2
    kept: dict[int, tuple[int, float]] = {}
    for number in range(stretches):
        part = points[number * len(points) // stretches : (number + 1) * len(points) // stretches]
        for point in (min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])):
            kept[point[0]] = point
    return sorted(kept.values())


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``most`` of them."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def figures(curves: Curves, resumed: Sequence[int]) -> list[str]:
    """Both drawings and their table; ``resumed``: the steps from which the run went on after a stop."""
    if not (curves.train or curves.val):
        return [str(Markup("<p>No step has been logged yet.</p>"))]
    parts = [_figure("Loss", "nats a token", {"train": curves.train, "val": curves.val}, resumed)]
    if curves.rate:
        parts.append(_figure("Learning rate", "", {"rate": curves.rate}, resumed))
    return [*map(str, parts), _as_table(curves)]


_NAMES = {"train": "train loss", "val": "validation loss", "rate": "learning rate"}


def _figure(title: str, unit: str, lines: dict[str, Points], resumed: Sequence[int]) -> Markup:
    drawn = {name: thin(points) for name, points in lines.items() if points}
    steps = [step for points in drawn.values() for step, _ in points]
    values = [value for points in drawn.values() for _, value in points]
    left, right = min(steps), max(steps)
    low, high = min(values), max(values)
    low = 0.0 if 0 <= low < high / 2 else low
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    low, high = low - room * (low != 0), high + room

    def x(step: float) -> float:
        return (step - left) / (right - left) if right > left else 0.5

    def y(value: float) -> float:
        return 1 - (value - low) / (high - low)

    marks = ticks(low, high)
    grid = "".join(f"M0 {1000 * y(mark):.0f}H1000" for mark in marks)
    again = "".join(f"M{1000 * x(step):.0f} 0V1000" for step in resumed if left < step < right)
    paths = Markup("").join(
        Markup('<path class="{}" d="{}"/>{}').format(name, line(points, x, y), _dots(name, points, x, y))
        for name, points in drawn.items()
    )
    legend = Markup("").join(
        Markup(
            '<li><svg viewBox="0 0 30 10" aria-hidden="true"><path class="{0}" d="M1 5H29"/>{1}</svg>{2}</li>'
        ).format(name, Markup('<path class="val dot" d="M15 5h0"/>') if name == "val" else "", _NAMES[name])
        for name in drawn
    )
    if again:
        key = Markup(
            '<li><svg viewBox="0 0 30 10" aria-hidden="true"><path class="again" d="M15 0V10"/></svg>went on after a stop</li>'
        )
        legend += key
    return Markup(
        '<figure data-points="{points}">\n<figcaption><strong>{title}</strong>{unit}<ul class="legend">{legend}</ul></figcaption>\n'
        '<div class="chart"><div class="up">{up}</div><div class="plot">'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{label}">'
        '<path class="grid" d="{grid}"/>{again}{paths}</svg><i class="cursor" hidden></i></div>'
        '<div class="along">{along}</div></div>\n'
        '<p class="reading" hidden><label>{title} at a step <input type="range" min="0" step="1"></label> <output></output></p>\n</figure>'
    ).format(
        points=json.dumps(_readings(drawn, x)),
        title=title,
        unit=f", {unit}" if unit else "",
        legend=legend,
        up=Markup("").join(
            Markup('<span style="top:{:.1f}%">{}</span>').format(100 * y(mark), short(mark)) for mark in marks
        ),
        label=_in_words(drawn),
        grid=grid,
        again=Markup('<path class="again" d="{}"/>').format(again) if again else "",
        paths=paths,
        along=along(left, right, x),
    )


def along(left: int, right: int, x: Any) -> Markup:
    """Labels of the steps; those at the ends stay inside the drawing."""
    shown = sorted({round(mark) for mark in ticks(left, right, 7)})
    return Markup("").join(
        Markup('<span style="left:{:.1f}%">{}{:,}</span>').format(100 * x(step), "step " if at == 0 else "", step)
        for at, step in enumerate(shown)
    )


def line(points: Points, x: Any, y: Any) -> str:
    return "M" + "L".join(f"{1000 * x(step):.1f} {1000 * y(value):.1f}" for step, value in points)


def _dots(name: str, points: Points, x: Any, y: Any) -> Markup:
    """Dots at the points of validation, and where one point alone makes no line."""
    if len(points) > 1 and (name != "val" or len(points) > 60):
        return Markup("")
    d = "".join(f"M{1000 * x(step):.1f} {1000 * y(value):.1f}h0" for step, value in points)
    return Markup('<path class="{} dot" d="{}"/>').format(name, d)


def _readings(drawn: dict[str, Points], x: Any) -> list[tuple[float, str]]:
    """(place from left to right in [0, 1], what is there in words), by step."""
    at: dict[int, list[str]] = {}
    for name, points in drawn.items():
        for step, value in points:
            at.setdefault(step, []).append(f"{_NAMES[name]} {short(value)}")
    return [(round(x(step), 4), f"step {step:,}: {', '.join(words)}") for step, words in sorted(at.items())]


def _in_words(drawn: dict[str, Points]) -> str:
    said = []
    for name, points in drawn.items():
        (first, start), (last, end) = points[0], points[-1]
        lowest = min(points, key=lambda point: point[1])
        said.append(
            f"{_NAMES[name]} from {short(start)} at step {first:,} to {short(end)} at step {last:,}"
            + (f", lowest {short(lowest[1])} at step {lowest[0]:,}" if name == "val" else "")
        )
    return "Curve: " + "; ".join(said)


def short(value: float) -> str:
    """A number for a label: ``0.25``, ``1.2``, ``2e-05``."""
    return f"{value:.4g}" if value == 0 or 0.001 <= abs(value) < 100_000 else f"{value:.2g}"


def _as_table(curves: Curves) -> str:
    """About 20 of the points as figures, for who cannot see the drawing or wants to copy them."""
    rate, val, train = dict(curves.rate), dict(curves.val), dict(curves.train)
    steps = sorted({*train, *val})
    every = max(1, math.ceil(len(steps) / _TABLE_ROWS))
    best = curves.best
    chosen = sorted({*steps[::every], steps[-1], *([best[0]] if best else [])})
    body = [[step, *(short(of[step]) if step in of else "" for of in (train, val, rate))] for step in chosen]
    said = f"{len(chosen):,} of {len(steps):,} steps" if len(chosen) < len(steps) else "every step that was logged"
    made = table(["step", *_NAMES.values()], body, numbers={1, 2, 3}, caption=said)
    return f"<details><summary>{escape('The curves as a table')}</summary>\n{made}\n</details>"
