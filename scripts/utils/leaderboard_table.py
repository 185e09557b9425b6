"""The leaderboard's columns: what they are called, how a run's figure is shown, which go first where a terminal is narrow."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.utils import console, files, metrics
from scripts.utils import leaderboard_ranking as ranking
from scripts.utils.leaderboard_ranking import VAL_LOSS, Group
from scripts.utils.leaderboard_runs import Entry

Value = str | float | int | bool | None
_CELL = 24  # characters of a setting or a reason that a terminal shows
_GAP = 3  # between two columns, as rich draws them


@dataclass(frozen=True)
class Column:
    """``value``: a run's figure for a file; ``show`` the same for people; the least ``weight`` goes first for lack of room."""

    name: str
    title: str
    value: Callable[[Entry], Value]
    show: Callable[[Entry], str]
    number: bool = False
    weight: int = 0


@dataclass(frozen=True)
class Board:
    """The runs in the order of the table, in their groups, with the settings in which they differ."""

    entries: tuple[Entry, ...]
    groups: tuple[Group, ...]
    keys: tuple[str, ...]
    title: str

    def place(self, entry: Entry) -> str:
        """``1``, or ``B2`` where not all can be compared; nothing for a run without a figure."""
        for group in self.groups:
            if entry in group.entries:
                number = group.entries.index(entry) + 1
                return f"{group.letter}{number}" if len(self.groups) > 1 else str(number)
        return ""


def arrange(entries: Sequence[Entry], by: str, title: str) -> Board:
    groups = ranking.groups(entries, by)
    ranked = [entry for group in groups for entry in group.entries]
    rest = [entry for entry in entries if all(entry is not other for other in ranked)]
    rest.sort(key=lambda entry: (entry.scores.get(VAL_LOSS, float("inf")), entry.run))
    return Board((*ranked, *rest), tuple(groups), tuple(ranking.differing(entries)), title)


def columns(board: Board) -> list[Column]:
    """All columns, in the order of the table."""
    leading = list(dict.fromkeys(group.metric for group in board.groups))
    others = [name for name in metrics.METRICS if name not in leading and any(name in e.scores for e in board.entries)]
    losses = [VAL_LOSS] if VAL_LOSS not in leading else []
    return [
        Column("rank", "#", board.place, board.place, weight=99),
        Column("run", "run", lambda e: e.run, lambda e: e.run, weight=100),
        Column("state", "state", lambda e: e.state, lambda e: e.state, weight=98),
        *(_score(name, 97 - at) for at, name in enumerate([*leading, *losses])),
        *(_setting(board, key, 90 - at) for at, key in enumerate(board.keys)),
        Column("steps", "steps", lambda e: e.steps, lambda e: _whole(e.steps), True, 85),
        Column("tokens_per_second", "tok/s", lambda e: e.tokens_per_second, lambda e: _whole(e.tokens_per_second), True, 50),
        Column("seconds", "time", lambda e: e.seconds, _time, True, 49),
        Column("peak_memory_gib", "GiB", lambda e: e.memory, lambda e: "–" if e.memory is None else f"{e.memory:.1f}", True, 48),
        Column("base", "base", lambda e: e.base, lambda e: _short(e.base), weight=47),
        Column("data", "data", lambda e: e.data, lambda e: _short(e.data), weight=46),
        *(_score(name, 40 - at) for at, name in enumerate(others)),
    ]  # fmt: skip


def _score(name: str, weight: int) -> Column:
    return Column(
        name, ranking.label(name), lambda e: e.scores.get(name), lambda e: ranking.show(name, e.scores.get(name)), True, weight
    )  # fmt: skip


def _setting(board: Board, key: str, weight: int) -> Column:
    def value(entry: Entry) -> Value:
        found = entry.settings.get(key)
        return found if found is None or isinstance(found, str | int | float | bool) else str(found)

    known = [found for entry in board.entries if (found := value(entry)) is not None]
    numbers = all(isinstance(found, int | float) and not isinstance(found, bool) for found in known)
    return Column(key, key, value, lambda e: say(e.settings.get(key)), numbers, weight)


def say(value: object) -> str:
    """A setting in few letters."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else _short(" ".join(str(value).split()))


def _short(text: str, most: int = _CELL) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _time(entry: Entry) -> str:
    if entry.seconds is None:
        return "–"
    return f"{'' if entry.seconds_known else '> '}{console.duration(entry.seconds)}"


def shared(board: Board) -> dict[str, str]:
    """Base model and data, where they are the same in all runs and so need no column."""
    found = {
        column.name: {str(column.value(entry)) for entry in board.entries if column.value(entry)}
        for column in columns(board)
        if column.name in ("base", "data")
    }
    return {name: next(iter(texts)) for name, texts in found.items() if len(texts) == 1}


def filled(board: Board, found: Sequence[Column]) -> list[Column]:
    """The columns in which any run has something."""
    return [column for column in found if any(column.show(entry) not in ("", "–") for entry in board.entries)]


def fit(board: Board, width: int) -> tuple[list[Column], list[Column]]:
    """The columns that a terminal of ``width`` characters holds, and those left out."""
    common = shared(board)
    chosen = [column for column in filled(board, columns(board)) if column.name not in common]
    wide = {
        column.name: max(len(column.title), *(len(column.show(entry)) for entry in board.entries)) + _GAP
        for column in chosen
    }
    left_out: list[Column] = []
    while len(chosen) > 2 and sum(wide[column.name] for column in chosen) > width:
        least = min(chosen, key=lambda column: column.weight)
        chosen.remove(least)
        left_out.append(least)
    return chosen, left_out


def show(board: Board, width: int) -> None:
    """The table on stdout, and what all runs have in common."""
    chosen, left_out = fit(board, width)
    common = shared(board)
    rows = [[column.show(entry) for column in chosen] for entry in board.entries]
    left = next((at for at, column in enumerate(chosen) if column.number), len(chosen))
    console.table(board.title, [column.title for column in chosen], rows, left=left)
    if common:
        console.result(f"all on {', '.join(f'{name} {text}' for name, text in common.items())}")
    if left_out:
        console.result(f"no room here for {', '.join(column.title for column in left_out)}: in the CSV and the page")


def write_csv(board: Board, path: Path) -> None:
    """Every column with its unrounded figures."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    all_columns = columns(board)
    writer.writerow([*(column.name for column in all_columns), "detail"])
    for entry in board.entries:
        cells = ["" if (value := column.value(entry)) is None else value for column in all_columns]
        writer.writerow([*cells, entry.detail])
    files.write_text(path, text.getvalue())
