"""Style and script of a run's report, beyond what the data report has. The script reads the page's own data only."""

STYLE = """
:root { --train: #2f6fb3; --val: #b3541e; --good: #1a6b34; --bad: #a8261f; --mark: #fff0b8; --edge: #b98900; --box: #f5f7f9; --warn: #fdf3dc; }
@media (prefers-color-scheme: dark) {
  :root { --train: #6aa7e8; --val: #f0a05f; --good: #6fcf8b; --bad: #ff8f85; --mark: #4d4010; --edge: #d9b44a; --box: #1b2027; --warn: #2e2714; }
}
h1 { margin-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h4 { font-size: .95rem; margin: 0; overflow-wrap: anywhere; }
small { font-size: .8rem; color: var(--soft); white-space: nowrap; }
nav ul, .legend, .scores { list-style: none; margin: .5rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
a { color: var(--bar); }
.warnings { background: var(--warn); border-left: 4px solid var(--edge); padding: .6rem 1rem; margin: 1rem 0; }
.warnings h2 { margin: 0 0 .3rem; font-size: 1rem; }
.warnings ul { margin: 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
.lead { display: flex; flex-direction: column; background: var(--box); padding: .8rem 1rem; border-radius: .4rem; }
.lead strong { font-size: 1.7rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.verdict { white-space: nowrap; }
@media (min-width: 44rem) {  /* one line a metric */
  .result br { display: none; }
  .result small { display: inline-block; min-width: 10rem; }
}
@media (max-width: 36rem) {
  .result tr { display: grid; grid-template-columns: 1fr 1.15fr 1.35fr; column-gap: .4rem; padding: .35rem 0; border-bottom: 1px solid var(--line); }
  .result tr:has(th), .result td:empty { display: none; }
  .result td { border: 0; padding: 0; text-align: left; min-width: 0; }
  .result td:first-child { grid-column: 1 / 3; font-weight: 600; }
  .result td:nth-child(2)::before { content: "base "; color: var(--soft); }
  .result td:nth-child(3)::before { content: "tuned "; color: var(--soft); }
  .result td:nth-child(5) { grid-area: 1 / 3; padding: 0; }
}
td:has(.verdict), th.number + th:not(.number) { padding-left: 1rem; }
.verdict.better { color: var(--good); font-weight: 600; }
.verdict.worse { color: var(--bad); font-weight: 600; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--bar); overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: clamp(7rem, 28%, 12rem) 1fr; gap: .2rem 1rem; margin: .5rem 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
figure { margin: 1rem 0; }
figcaption { font-size: .9rem; }
.legend { font-size: .85rem; margin: .2rem 0 .6rem; }
.legend svg { display: inline-block; width: 30px; height: 10px; margin-right: .4rem; }
.chart { display: grid; grid-template-columns: 3.6rem 1fr; }
.up, .along { position: relative; font-size: .75rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.up span { position: absolute; right: .5rem; transform: translateY(-50%); }
.along { grid-column: 2; height: 1.4rem; margin: .2rem 1.5rem 0 0; }
.along span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.along span:first-child { transform: translateX(-.4rem); }
.plot { position: relative; height: 13rem; border-bottom: 1px solid var(--soft); margin-right: 1.5rem; }
.plot svg { position: absolute; inset: 0; height: 100%; overflow: visible; }
path { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
path.grid { stroke: var(--line); stroke-width: 1; }
path.train, path.rate { stroke: var(--train); }
path.val { stroke: var(--val); stroke-dasharray: 6 4; }
path.dot { stroke-width: 7; stroke-linecap: round; stroke-dasharray: none; }
path.again { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 2 4; }
.cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--ink); pointer-events: none; }
.reading { font-size: .85rem; font-variant-numeric: tabular-nums; display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: center; }
.reading[hidden], [hidden] { display: none !important; }
.reading label { display: flex; gap: .6rem; align-items: center; color: var(--soft); flex: 1 1 16rem; }
.reading input { flex: 1; min-width: 6rem; accent-color: var(--bar); }
.reading output { flex: 1 1 16rem; }
.tools { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; margin: .8rem 0; }
.tools label { display: flex; flex-direction: column; font-size: .85rem; color: var(--soft); flex: 1 1 14rem; }
input[type=search], select, button { font: inherit; color: var(--ink); background: var(--ground); border: 1px solid var(--soft); border-radius: .3rem; padding: .35rem .5rem; width: 100%; min-height: 2.3rem; }
button { width: auto; cursor: pointer; }
.row { border: 1px solid var(--line); border-radius: .4rem; padding: .8rem 1rem; margin: .8rem 0; }
.scores { font-size: .85rem; color: var(--soft); }
.scores b { color: var(--ink); font-weight: 600; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(12.5rem, 100%), 1fr)); gap: .8rem 1.2rem; }
.sides .prompt { grid-column: 1 / -1; }
.sides > div { min-width: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; font-size: .9rem; background: var(--box); padding: .5rem .7rem; border-radius: .3rem; }
.text.config { font-family: ui-monospace, monospace; font-size: .8rem; }
.text details { margin: 0; display: inline; }
.note { font-size: .8rem; color: var(--soft); }
mark { background: var(--mark); color: inherit; text-decoration: underline 2px var(--edge); text-underline-offset: .15em; }
mark.lacking { background: none; text-decoration-style: dotted; }
#list > details { border-bottom: 1px solid var(--line); margin: 0; padding: .35rem 0; }
#list summary { color: var(--ink); font-size: .9rem; }
#list .start { color: var(--soft); }
:focus-visible { outline: 3px solid var(--bar); outline-offset: 2px; }
"""

SCRIPT = """
"use strict";
const by = id => document.getElementById(id);
const make = (tag, text, name) => Object.assign(document.createElement(tag), { textContent: text ?? "", className: name ?? "" });

for (const figure of document.querySelectorAll("figure[data-points]")) {
  const points = JSON.parse(figure.dataset.points), plot = figure.querySelector(".plot");
  const slider = figure.querySelector("input"), cursor = figure.querySelector(".cursor"), said = figure.querySelector("output");
  const show = () => {
    const [x, words] = points[slider.value];
    cursor.hidden = false;
    cursor.style.left = 100 * x + "%";
    said.textContent = words;
    slider.setAttribute("aria-valuetext", words);
  };
  slider.max = points.length - 1;
  slider.value = slider.max;
  slider.oninput = show;
  plot.onpointermove = event => {
    const box = plot.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
    slider.value = points.reduce((best, point, n) => Math.abs(point[0] - at) < Math.abs(points[best][0] - at) ? n : best, 0);
    show();
  };
  show();
  cursor.hidden = true;
  figure.querySelector(".reading").hidden = false;
}

if (by("rows-data")) {
  const rows = JSON.parse(by("rows-data").textContent), cards = [...document.querySelectorAll("article[data-row]")];
  const searched = rows.map(row => (row.at + " " + row.texts.map(part => part[1]).join(" ")).toLowerCase());
  const kinds = {
    all: () => true, better: row => row.way === "better", worse: row => row.way === "worse", same: row => row.way === "same",
    right: row => row.exact === true, wrong: row => row.exact === false, cut: row => !row.ended,
  };
  const signs = { better: "▲ better", worse: "▼ worse", same: "= same" };
  const turn = /<\\|[^|<>]*\\|>(assistant|user|system)?/g;  // ChatML's signs say nothing in one line
  let found = [], shown = 0;
  const entry = row => {
    const box = make("details"), head = make("summary"), prompt = row.texts[0][1];
    head.append(`${row.n} · ${signs[row.way]} · ${row.score} `, make("bdi", prompt.replace(turn, " ").trim().slice(-90), "start"));
    box.append(head);
    box.addEventListener("toggle", () => {
      if (box.childElementCount > 1) return;
      const place = make("p", row.at + " ", "note"), list = make("dl", "", "sides");
      if (by("row-" + row.n)) place.append(Object.assign(make("a", "shown in full above"), { href: "#row-" + row.n }));
      for (const [name, text] of row.texts) {
        const part = make("div", "", name), value = make("dd", text || "(empty)", "text");
        value.dir = "auto";
        part.append(make("dt", name), value);
        list.append(part);
      }
      box.append(place, list);
    });
    return box;
  };
  const more = () => {
    by("list").append(...found.slice(shown, shown += 25).map(entry));
    by("more").hidden = shown >= found.length;
  };
  const search = () => {
    const words = by("search").value.toLowerCase().split(/\\s+/).filter(Boolean), kind = kinds[by("kind").value];
    found = rows.filter((row, at) => kind(row) && words.every(word => searched[at].includes(word)));
    const numbers = new Set(found.map(row => row.n));
    for (const card of cards) card.hidden = !numbers.has(+card.dataset.row);
    for (const rest of document.querySelectorAll(".rest")) rest.open = found.length < rows.length;
    by("list").replaceChildren();
    shown = 0;
    more();
    by("found").textContent = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows; ${cards.filter(card => !card.hidden).length} of them in full`;
  };
  by("search").oninput = by("kind").onchange = search;
  by("more").onclick = more;
  for (const part of document.querySelectorAll(".tools, #everything")) part.hidden = false;
  search();
}
"""
