"""Rows in a run's report: the prompt, and below it reference, base and tuned side by side with their differences marked."""

import json
from collections.abc import Sequence

from markupsafe import Markup

from scripts.utils import run_report_rows as rows_of
from scripts.utils import run_report_scores
from scripts.utils.run_report_words import Segment, clean, fold, fold_before, marked

_OPEN = 5  # rows of each kind in sight; the others are folded away
_EMPTY = Markup('<i class="soft">(empty)</i>')


def show_rows(ranked: list[rows_of.Ranked], name: str) -> list[str]:
    """The section of the rows: the most improved and the most harmed in full, and what the page's search reads."""
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
        cards = [_card(row, name) for row in chosen]
        parts += cards[:_OPEN]
        if cards[_OPEN:]:
            more = f"{len(cards) - _OPEN} more {title} rows"
            parts.append(
                Markup('<details class="rest"><summary>{}</summary>\n{}\n</details>').format(
                    more, Markup("").join(cards[_OPEN:])
                )
            )
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
