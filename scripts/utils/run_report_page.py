"""The report of a run as one HTML file: what a colleague who was not there needs to judge it, without a network.

Rows are other people's text: everything goes through ``Markup.format``, which escapes it, and the page's policy lets the
browser run no script but its own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from scripts.utils import report_page, run_report_curves, run_report_scores
from scripts.utils import run_report_rows as rows_of
from scripts.utils.run_report_facts import Facts, how_it_was_run, when
from scripts.utils.run_report_style import SCRIPT, STYLE
from scripts.utils.run_report_warnings import warnings
from scripts.utils.run_report_words import Segment, clean, fold, fold_before, marked

_EMPTY = Markup('<i class="soft">(empty)</i>')


@dataclass(frozen=True)
class Material:
    """What the report is made of. ``found`` is metrics.json, ``rows`` are the lines of samples.jsonl.

    ``manifest`` is that of the rows that it was trained on, where they lie here; ``problems`` says what could not be read.
    """

    stamp: dict[str, Any]
    curves: run_report_curves.Curves
    adapter: str
    made: str
    config: str = ""
    found: dict[str, Any] | None = None
    rows: Sequence[rows_of.Row] = ()
    manifest: dict[str, Any] | None = None
    problems: Sequence[str] = field(default_factory=tuple)


def build(material: Material) -> str:
    stamp, found = material.stamp, material.found
    parts: list[str] = [*_head(material), *_warnings(material)]
    ranked: list[rows_of.Ranked] = []
    name = ""
    if found:
        name = rows_of.headline(found, material.rows)
        ranked = rows_of.rank(material.rows, name)
        parts += ['<h2 id="result">Did it get better?</h2>', *run_report_scores.result(found, name)]
    resumed = [start["from_step"] for start in stamp.get("starts", []) if start.get("from_step")]
    parts += ['<h2 id="curves">How the training went</h2>', *run_report_curves.figures(material.curves, resumed)]
    if ranked:
        parts += _rows(ranked, name)
    parts += _how(material)
    return report_page.page(f"Run {stamp['run']}", parts, style=STYLE, script=SCRIPT)


def _head(material: Material) -> list[Markup]:
    stamp = material.stamp
    last = (stamp.get("starts") or [{}])[-1]
    trained = f"trained until {when(last['until'])}" if last.get("until") else f"status: {stamp['status']}"
    places = [("result", "Did it get better?")] if material.found else []
    places.append(("curves", "How the training went"))
    places += [("rows", "Rows")] if material.rows else []
    places.append(("how", "How it was run"))
    return [
        Markup("<h1>Run {}</h1>").format(stamp["run"]),
        Markup('<p class="soft">{} tuned by {} on {}; {}</p>').format(
            stamp["model"]["name"], stamp["tuning"]["mode"], stamp["data"]["name"], trained
        ),
        Markup('<nav aria-label="On this page"><ul>{}</ul></nav>').format(
            Markup("").join(Markup('<li><a href="#{}">{}</a></li>').format(*place) for place in places)
        ),
    ]


def _warnings(material: Material) -> list[Markup]:
    said = [
        *warnings(material.stamp, material.found, material.manifest),
        *material.problems,
        *material.curves.problems,
    ]
    if not said:
        return []
    lines = Markup("").join(Markup("<li>{}</li>").format(f"{text[:1].upper()}{text[1:]}.") for text in said)
    return [
        Markup(
            '<section class="warnings" aria-labelledby="first"><h2 id="first">⚠ Know this first</h2><ul>{}</ul></section>'
        ).format(lines)
    ]


# --- rows


def _rows(ranked: list[rows_of.Ranked], name: str) -> list[str]:
    better, worse = rows_of.extremes(ranked)
    counts = {way: sum(row.direction == way for row in ranked) for way in ("better", "worse", "same")}
    label = run_report_scores.label(name)
    intro = (
        f"{len(ranked):,} rows were answered. By {label}, and where that is equal by a finer metric, the tuned model was better on "
        f"{counts['better']:,}, worse on {counts['worse']:,} and the same on {counts['same']:,}."
    )
    parts = [
        Markup('<h2 id="rows">Rows</h2>\n<p>{}</p>').format(intro),
        Markup(
            '<p class="note">In the answers, <mark>words that are not in the reference</mark> are underlined; in the reference, '
            '<mark class="lacking">words that the tuned answer lacks</mark> are underlined with dots. A prompt is shown as the model '
            "reads it, with the signs of its chat template.</p>"
        ),
        _TOOLS,
    ]
    for title, chosen, count in (("improved", better, counts["better"]), ("harmed", worse, counts["worse"])):
        of = f"{len(chosen):,} of {count:,}" if count > len(chosen) else f"{count:,}"
        parts.append(Markup("<h3>Most {} ({})</h3>").format(title, of))
        parts += [_card(row, name) for row in chosen]
        if not chosen:
            parts.append(Markup("<p>No row was {}.</p>").format(title))
    return [*map(str, parts), *_everything(ranked, name)]


_TOOLS = Markup("""<div class="tools" role="search" hidden>
<label>search in the rows<input type="search" id="search" autocomplete="off" spellcheck="false"></label>
<label>show<select id="kind">
<option value="all">all rows</option>
<option value="better">tuned better than base</option>
<option value="worse">tuned worse than base</option>
<option value="same">no change</option>
<option value="right">tuned equals the reference</option>
<option value="wrong">tuned differs from the reference</option>
<option value="cut">tuned cut at the limit</option>
</select></label>
<output id="found" for="search kind"></output>
</div>
<noscript><p class="note">Search and the list of all rows need JavaScript; everything else is here without it.</p></noscript>""")


def _card(ranked: rows_of.Ranked, name: str) -> Markup:
    """One row in full: the prompt, and below it reference, base and tuned side by side."""
    row = ranked.row
    scores = Markup("").join(
        Markup("<li>{} <b>{} → {}</b></li>").format(*line) for line in rows_of.said_scores(name, ranked.scores)
    )
    reference = clean(row.get("reference", ""))
    wanted: list[Segment] = [(reference, False)]
    sides = []
    for side in ("base", "tuned"):
        if not isinstance(row.get(side), str):
            sides.append(_side(side, "no answer was generated", []))
            continue
        lacking, answer, words = marked(reference, clean(row[side]))
        wanted = lacking  # of the tuned answer, which comes last
        words += "" if row.get(f"{side}_finished", True) else "; cut at the limit"
        sides.append(_side(side, words, answer))
    return Markup(
        '<article class="row" id="row-{n}" data-row="{n}" aria-label="row {n}">\n<h4>Row {n} <span class="soft">{place}</span></h4>\n'
        '<ul class="scores">{scores}</ul>\n<dl class="sides">{prompt}{reference}{sides}</dl>\n</article>'
    ).format(
        n=ranked.number,
        place=ranked.name,
        scores=scores,
        prompt=_prompt(clean(row.get("prompt", "")), bool(row.get("prompt_cut"))),
        reference=_side("reference", "", wanted, "lacking"),
        sides=Markup("").join(sides),
    )


def _side(name: str, note: str, segments: Sequence[Segment], kind: str = "") -> Markup:
    first, rest = fold(segments)
    text = _marks(first, kind)
    if rest:
        more = f"{sum(len(part) for part, _ in rest):,} more characters"
        text += Markup("<details><summary>{}</summary>{}</details>").format(more, _marks(rest, kind))
    said = Markup('<div class="note">{}</div>').format(note) if note else ""
    body = Markup('<div class="text" dir="auto">{}</div>').format(text or _EMPTY) if segments or not note else ""
    return Markup("<div><dt>{}</dt><dd>{}{}</dd></div>").format(name, body, said)


def _prompt(text: str, cut: bool) -> Markup:
    """The end of the prompt, which holds the question; what comes before is folded away."""
    folded, shown = fold_before(text)
    note = "its beginning is left out here" if cut else ""
    earlier = Markup("")
    if folded:
        earlier = Markup("<details><summary>{:,} characters before this</summary>{}</details>").format(
            len(folded), folded
        )
    return Markup('<div class="prompt"><dt>prompt</dt><dd><div class="text" dir="auto">{}{}</div>{}</dd></div>').format(
        earlier, shown or _EMPTY, Markup('<div class="note">{}</div>').format(note) if note else ""
    )


def _marks(segments: Sequence[Segment], kind: str) -> Markup:
    opening = Markup('<mark class="{}">').format(kind) if kind else Markup("<mark>")
    return Markup("").join(
        Markup("{}{}</mark>").format(opening, text) if flag else Markup("{}").format(text) for text, flag in segments
    )


def _everything(ranked: list[rows_of.Ranked], name: str) -> list[str]:
    entries, left_out = rows_of.listed(ranked, name)
    # in a script element nothing is escaped: a text must not be able to end it
    data = json.dumps(entries, ensure_ascii=False).replace("<", "\\u003c")
    note = (
        f"Left out of this list and of the search: {left_out}. All of it is in eval/samples.jsonl." if left_out else ""
    )
    return [
        '<section id="everything" hidden>\n<h3>All rows</h3>',
        f'<p class="note">{note}</p>' if note else "",
        '<div id="list"></div>\n<p><button type="button" id="more">show more rows</button></p>\n</section>',
        f'<script type="application/json" id="rows-data">{data}</script>',
    ]


# --- how it was run


def _how(material: Material) -> list[str]:
    stamp = material.stamp
    parts: list[Markup | str] = [Markup('<h2 id="how">How it was run</h2>')]
    for title, facts in how_it_was_run(stamp, material.found, material.adapter):
        parts += [Markup("<h3>{}</h3>").format(title), _facts(facts)]
    starts = [
        [when(start.get("at", "")), start.get("from_step", 0), start.get("step", 0), when(start.get("until", "")), start["ended"]]
        for start in stamp.get("starts", [])
    ]  # fmt: skip
    parts += ["<h3>Starts</h3>", report_page.table(["began", "from step", "saved step", "until", "ended"], starts)]
    if material.config:
        parts.append(
            Markup(
                "<details><summary>The whole config (config.yaml)</summary>\n"
                '<div class="text config">{}</div>\n</details>'
            ).format(clean(material.config))
        )
    parts.append(
        Markup(
            '<p class="note">Made {} from the run\'s backend.json, TensorBoard files and eval/. It holds rows of the data: '
            "share it only where these may be shared.</p>"
        ).format(when(material.made))
    )
    return [str(part) for part in parts]


def _facts(facts: Facts) -> Markup:
    return Markup("<dl>{}</dl>").format(
        Markup("").join(Markup("<dt>{}</dt><dd>{}</dd>").format(name, text) for name, text in facts)
    )
