"""The report of a run as one HTML file: what a colleague who was not there needs to judge it, without a network.

Rows are other people's text: everything goes through ``Markup.format``, which escapes it, and the page's policy lets the
browser run no script but its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from scripts.utils import report_page, run_report_curves, run_report_scores
from scripts.utils import run_report_rows as rows_of
from scripts.utils.run_report_cards import show_rows
from scripts.utils.run_report_facts import Facts, how_it_was_run, when
from scripts.utils.run_report_style import SCRIPT, STYLE
from scripts.utils.run_report_warnings import warnings
from scripts.utils.run_report_words import clean


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
        parts += show_rows(ranked, name)
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
