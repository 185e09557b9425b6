"""The data report as one HTML file: no script, no network, light and dark, readable on a phone.

Also the frame, the style and the tables that the report of a run (run_report_page.py) shares. Whatever comes from the
data is escaped: rows are other people's text.
"""

import base64
import hashlib
from collections.abc import Container, Iterable, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d8dee4; --ground: #fff; --bar: #2f6fb3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ee; --soft: #9aa5b1; --line: #363d46; --ground: #14181d; --bar: #6aa7e8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: var(--ground);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
caption { text-align: left; color: var(--soft); padding: .3rem 0; }
td { overflow-wrap: anywhere; min-width: 4rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { width: 100%; height: auto; display: block; }
svg rect { fill: var(--bar); }
svg line { stroke: var(--line); }
svg text { fill: var(--soft); font-size: 13px; }
"""
_WIDTH, _HEIGHT, _FOOT = 600, 160, 24


def build(report: dict[str, Any], title: str) -> str:
    """The page for a report as data_report.py makes it."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        *_rows(report),
        *_lengths(report),
        *_doubles(report),
        *_answers(report),
        *_suspicious(report),
        *_rejected(report),
    ]
    return page(title, parts)


def page(title: str, parts: Iterable[str], *, style: str = "", script: str = "") -> str:
    """A whole page around ``parts``, which are HTML. The only script that its browser runs is ``script``, by its hash."""
    body = "\n".join(parts)
    allowed = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed += f"; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{allowed}">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<main>
{body}
</main>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def _rows(report: dict[str, Any]) -> list[str]:
    names = ["rows_in", "rows_out", "rejected", "duplicates"]
    names += ["left_out"] if report["all_files"]["left_out"] else []
    header = ["file", *(name.replace("_", " ") for name in names)]
    body = [[item["file"], *(item[name] for name in names)] for item in report["files"]]
    if len(body) > 1:
        body.append(["all files", *(report["all_files"][name] for name in names)])
    splits = [[split, count] for split, count in report["splits"].items()]
    overlap = report["overlap"]
    shared = [f"{pair} {count:,}" for pair, count in overlap["same_question_or_conversation"].items()]
    lines = [f"Questions and conversations that stand in two splits: {', '.join(shared)}."]
    if overlap["nearly_the_same"]:
        lines.append(f"Rows nearly the same as one of another given split: {overlap['nearly_the_same']:,}.")
    return [
        "<h2>Rows</h2>",
        table(header, body),
        "<h2>Splits</h2>",
        table(["split", "rows"], splits),
        *(f"<p>{escape(line)}</p>" for line in lines),
    ]


def _lengths(report: dict[str, Any]) -> list[str]:
    tokens, characters = report["tokens"], report["characters"]
    turns = [[turns, count] for turns, count in report["turns"].items()]
    parts = ["<h2>Turns</h2>", table(["answers in a row", "rows"], turns), "<h2>Tokens a row</h2>"]
    if tokens["counted_rows"]:
        whole = report["all_files"]["rows_out"]
        counted = (
            "all rows"
            if tokens["counted_rows"] == whole
            else f"{tokens['counted_rows']:,} of {whole:,} rows, evenly chosen"
        )
        said = (
            f"{counted}, with the tokenizer of {tokens['model']}, without the template's own tokens. "
            f"{tokens['over_max_length']:.1%} are longer than render.max_length ({tokens['max_length']:,})."
        )
        parts += [f"<p>{escape(said)}</p>", _summary(tokens), _histogram(tokens["histogram"], "tokens")]
    else:
        parts.append(f"<p>Not counted: the tokenizer of {escape(tokens['model'])} is not on this machine yet.</p>")
    return [
        *parts,
        "<h2>Characters a row</h2>",
        _summary(characters),
        _histogram(characters["histogram"], "characters"),
    ]


def _doubles(report: dict[str, Any]) -> list[str]:
    exact, alike = report["exact_duplicates"], report["near_duplicates"]
    what = "left out" if alike["removed"] else "kept, each in the split of the earlier one unless files say the splits"
    parts = ["<h2>Duplicates</h2>", f"<p>Exactly the same as an earlier row, left out: {exact['rows']:,}.</p>"]
    if exact["examples"]:
        parts.append(table(["row", "first"], [[item["row"], item["first"]] for item in exact["examples"]]))
    parts.append(f"<p>Nearly the same as an earlier row: {alike['rows']:,} ({escape(what)}).</p>")
    if alike["examples"]:
        body = [[item["row"], item["first"], f"{item['similarity']:.2f}"] for item in alike["examples"]]
        parts.append(table(["row", "earlier row", "alike"], body))
    return parts


def _answers(report: dict[str, Any]) -> list[str]:
    answers = report["answers"]
    said = (
        f"Without text (tool calls only): {answers['empty']:,}. Shorter than 4 characters: {answers['very_short']:,}."
    )
    body = [[item["text"], item["count"]] for item in answers["most_frequent"]]
    return [
        "<h2>Answers</h2>",
        f"<p>{said}</p>",
        table(["most frequent", "rows"], body) if body else "<p>None occurs twice.</p>",
    ]


def _suspicious(report: dict[str, Any]) -> list[str]:
    found = report["suspicious"]
    body = [[item["reason"], item["rows"], ", ".join(item["examples"])] for item in found["reasons"]]
    said = f"<p>{found['rows']:,} rows to look at.</p>" if body else "<p>None found.</p>"
    return ["<h2>Suspicious rows</h2>", said, *([table(["why", "rows", "among them"], body)] if body else [])]


def _rejected(report: dict[str, Any]) -> list[str]:
    body = [[item["reason"], item["rows"], item["example"]] for item in report["rejected_reasons"]]
    return ["<h2>Rejected rows</h2>", table(["reason", "rows", "first at"], body) if body else "<p>None.</p>"]


def _summary(spread: dict[str, Any]) -> str:
    names = {"min": "shortest", "median": "median", "mean": "mean", "p95": "95% are at most", "max": "longest"}
    said = ", ".join(f"{name} {spread[key]:,.0f}" for key, name in names.items())
    return f'<p class="soft">{said}</p>'


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Container[int] = (), caption: str = ""
) -> str:
    """A table of texts, which are escaped, and of cells that bring their own HTML (``Markup``).

    Columns of whole numbers and those in ``numbers`` are set right.
    """
    rows = list(rows)
    right = [
        at in numbers or (bool(rows) and all(isinstance(row[at], int) for row in rows)) for at in range(len(header))
    ]

    def line(cells: Sequence[object], tag: str) -> str:
        marked = [' class="number"' if number else "" for number in right]
        shown = [
            str(cell) if hasattr(cell, "__html__") else escape(f"{cell:,}" if isinstance(cell, int) else str(cell))
            for cell in cells
        ]
        scope = ' scope="col"' if tag == "th" else ""
        return "".join(f"<{tag}{scope}{mark}>{text}</{tag}>" for mark, text in zip(marked, shown, strict=True))

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    said = f"<caption>{escape(caption)}</caption>\n" if caption else ""
    return f'<div class="wide"><table>\n{said}<tr>{line(header, "th")}</tr>\n{body}\n</table></div>'


def _histogram(bars: Sequence[Sequence[int]], unit: str) -> str:
    """Bars of rows over length as inline SVG; each says its range and count when pointed at."""
    if not bars:
        return ""
    most, step, ground = max(bar[2] for bar in bars), _WIDTH / len(bars), _HEIGHT - _FOOT
    drawn = []
    for at, (low, high, count) in enumerate(bars):
        height = count / most * (ground - 4)
        span = f"{low:,}" if low == high else f"{low:,}–{high:,}"
        drawn.append(
            f'<rect x="{at * step + 1:.1f}" y="{ground - height:.1f}" width="{max(step - 2, 1):.1f}" height="{height:.1f}">'
            f"<title>{span} {escape(unit)}: {count:,} rows</title></rect>"
        )
    label = f"Histogram: rows by {unit}, from {bars[0][0]:,} to {bars[-1][1]:,}"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(drawn)}'
        f'<line x1="0" x2="{_WIDTH}" y1="{ground}" y2="{ground}"/>'
        f'<text x="0" y="{_HEIGHT - 6}">{bars[0][0]:,}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 6}" text-anchor="end">{bars[-1][1]:,} {escape(unit)}</text></svg>'
    )
