"""outputs/leaderboard.html: the leaderboard as one file without a network, light and dark, readable on a phone.

Names, settings and errors are other people's text: everything goes through ``Markup.format``, which escapes it.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from scripts.utils import leaderboard_ranking as ranking
from scripts.utils import report_page, stamp
from scripts.utils.leaderboard_plots import COLOURS, curves, parallel
from scripts.utils.leaderboard_runs import SEED, Entry
from scripts.utils.leaderboard_table import Board, Column, columns, filled, say, shared
from scripts.utils.run_report_facts import when
from scripts.utils.run_report_style import STYLE

_LIGHT = ("#2f6fb3", "#b3541e", "#1a6b34", "#8a3fa0", "#a8261f", "#0f7480", "#7a6400", "#54606c")
_DARK = ("#6aa7e8", "#f0a05f", "#6fcf8b", "#cf93e0", "#ff8f85", "#5fc9d6", "#dcc35a", "#b4c0cc")


def _palette(colours: Sequence[str]) -> str:
    return " ".join(f"--c{at}: {colour};" for at, colour in enumerate(colours))


BOARD_STYLE = f"""
:root {{ {_palette(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_palette(_DARK)} }} }}
body {{ max-width: 80rem; }}
{" ".join(f"path.c{at} {{ stroke: var(--c{at}); }}" for at in range(COLOURS))}
path.rest {{ stroke: var(--soft); opacity: .45; }}
.axes {{ position: relative; height: 17rem; margin: 2.2rem 0 1.5rem; }}
.axes svg {{ position: absolute; inset: 0; height: 100%; overflow: visible; }}
.axes b, .axes span {{ position: absolute; font-size: .75rem; padding-left: .3rem; white-space: nowrap; }}
.axes b {{ top: -1.8rem; padding-left: 0; }}
.axes span {{ transform: translateY(-50%); color: var(--soft); background: color-mix(in srgb, var(--ground) 75%, transparent); }}
.axes path[data-run], .plot path[data-run] {{ pointer-events: stroke; }}
.dimmed path[data-run] {{ opacity: .12; }}
.dimmed path.chosen {{ opacity: 1; stroke-width: 4; }}
#table td, #table th {{ white-space: nowrap; }}
#table tr:hover td {{ background: var(--box); }}
th button {{ border: 0; background: none; padding: 0; min-height: 0; color: inherit; font-weight: 600; width: auto; }}
th[aria-sort=ascending] button::after {{ content: " ↑"; }}
th[aria-sort=descending] button::after {{ content: " ↓"; }}
.lead p {{ margin: .1rem 0; }}
.lead strong {{ font-size: 1.15rem; }}
.lead, .legend li {{ overflow-wrap: anywhere; min-width: 0; }}
#table td, #table th {{ padding-left: .6rem; }}
.lead {{ margin: .6rem 0; }}
"""

BOARD_SCRIPT = """
"use strict";
const table = document.querySelector("#table table");
if (table) {
  const rows = () => [...table.rows].slice(1);
  const value = (row, at) => {
    const cell = row.cells[at], data = cell.querySelector("data");
    return data ? Number(data.value) : cell.textContent.trim();
  };
  [...table.rows[0].cells].forEach((head, at) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const empty = text => text === "" || text === "–";
      const order = (a, b) => {
        const x = value(a, at), y = value(b, at);
        if (empty(x) || empty(y)) return empty(x) - empty(y);
        const way = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
        return down ? -way : way;
      };
      table.tBodies[0].append(...rows().sort(order));
    };
  });
}
const choose = event => {
  const at = event.target instanceof Element ? event.target : document.body;
  const place = at.closest("tr") ?? at.closest("[data-run]");
  const run = (place?.matches("[data-run]") ? place : place?.querySelector("[data-run]"))?.dataset.run;
  document.body.classList.toggle("dimmed", run !== undefined);
  for (const path of document.querySelectorAll("path[data-run]")) path.classList.toggle("chosen", path.dataset.run === run);
};
for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, choose);
"""


def build(board: Board, verdicts: Sequence[Sequence[str]], path: Path) -> str:
    """The page that goes to ``path``; ``verdicts`` are the lines said of each of the board's groups."""
    drawn, lines = parallel(board), curves(board)
    places = [("best", "Which is best?"), ("table", "All runs")]
    places += [("settings", "Which settings did well?")] if drawn else []
    places += [("curves", "How the training went")] if lines else []
    parts: list[str] = [
        str(Markup("<h1>{}</h1>").format(board.title[:1].upper() + board.title[1:])),
        str(
            Markup('<nav aria-label="On this page"><ul>{}</ul></nav>').format(
                Markup("").join(Markup('<li><a href="#{}">{}</a></li>').format(*place) for place in places)
            )
        ),
        *_best(board, verdicts),
        *_table(board, path),
        *drawn,
        *lines,
        *_seeds(board),
        *_failures(board),
        str(Markup('<p class="note">Made {} from what the runs had left by then.</p>').format(when(stamp.now()))),
    ]
    return report_page.page(board.title, parts, style=STYLE + BOARD_STYLE, script=BOARD_SCRIPT)


def _best(board: Board, verdicts: Sequence[Sequence[str]]) -> list[str]:
    parts = ['<h2 id="best">Which is best?</h2>']
    if not board.groups:
        parts.append("<p>No run has a figure to be ranked by yet.</p>")
    if len(board.groups) > 1:
        parts.append(
            "<p>Runs are compared within each group only: other rows, other decoding or another tokenizer give other figures.</p>"
        )
    for group, (first, *more) in zip(board.groups, verdicts, strict=True):
        letter = f"{group.letter}: " if len(board.groups) > 1 else ""
        lines = Markup("").join(Markup("<p>{}</p>").format(text) for text in more)
        parts.append(
            str(
                Markup('<div class="lead"><span>{}by {}, {}</span><strong>{}</strong>{}</div>').format(
                    letter, ranking.label(group.metric), group.what, first, lines
                )
            )
        )
    return parts


def _table(board: Board, path: Path) -> list[str]:
    common = shared(board)
    shown = [column for column in filled(board, columns(board)) if column.name not in common]
    rows = [[_cell(board, column, entry, at, path) for column in shown] for at, entry in enumerate(board.entries)]
    numbers = {at for at, column in enumerate(shown) if column.number}
    made = report_page.table([column.title for column in shown], rows, numbers=numbers)
    note = Markup('<p class="note">All on {}.</p>').format(", ".join(f"{name} {text}" for name, text in common.items()))
    return ["<h2>All runs</h2>", str(note) if common else "", f'<div id="table">{made}</div>']


def _cell(board: Board, column: Column, entry: Entry, at: int, path: Path) -> Markup | str:
    if column.name == "run":
        report = Path("outputs") / entry.run / "report.html"
        if not report.is_file():
            return Markup('<span data-run="{}">{}</span>').format(at, entry.run)
        link = quote(os.path.relpath(report, path.parent).replace(os.sep, "/"))
        return Markup('<a data-run="{}" href="{}">{}</a>').format(at, link, entry.run)
    value, text = column.value(entry), column.show(entry)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Markup('<data value="{}">{}</data>').format(value, text)
    return text


def _seeds(board: Board) -> list[str]:
    rows = [
        [
            ", ".join(f"{key} {say(seeds.settings.get(key))}" for key in board.keys if key != SEED) or seeds.data,
            len(seeds.runs),
            ranking.show(group.metric, seeds.mean),
            ranking.show_spread(group.metric, seeds.spread),
            f"{ranking.show(group.metric, min(seeds.values))} to {ranking.show(group.metric, max(seeds.values))}",
            ", ".join(seeds.runs),
        ]
        for group in board.groups
        for seeds in ranking.seed_groups(group)
    ]
    if not rows:
        return []
    header = ["settings", "seeds", "mean", "standard deviation", "from, to", "runs"]
    said = "Runs that are equal but for train.seed, by the metric that they are ranked by"
    return ["<h2>Over seeds</h2>", report_page.table(header, rows, numbers={2, 3}, caption=said)]


def _failures(board: Board) -> list[str]:
    rows = [[entry.run, entry.detail] for entry in board.entries if entry.detail]
    return ["<h2>What failed</h2>", report_page.table(["run", "how"], rows)] if rows else []
