"""report.html of a run: true figures, hostile rows harmless, readable without a network, whatever the run has so far."""

import base64
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts import eval as eval_step
from scripts import report as report_step
from scripts.utils import (
    event_log,
    files,
    metrics,
    run_report,
    run_report_curves,
    run_report_page,
    run_report_rows,
    run_report_scores,
    stages,
    stamp,
)
from scripts.utils.run_report_style import SCRIPT
from scripts.utils.run_report_words import boundary, fold, fold_before, marked, pieces
from tests.tiny_models import CHATS, RUN, enter_run

PAGE = Path(f"outputs/{RUN}/report.html")
EVAL = Path(f"outputs/{RUN}/eval")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&<!-- ]]> ${x} {0}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter_run(tmp_path, monkeypatch)


def make(*flags: str) -> int:
    return report_step.main(["--config", "c.yaml", *flags])


def page() -> str:
    assert make() == 0
    return PAGE.read_text(encoding="utf-8")


def log(folder: Path, train: dict[int, float], val: dict[int, float] | None = None, rate: float = 1e-4) -> Path:
    """One start's event file, by the writer that training uses."""
    before = len(run_report_curves.event_files(folder))
    events = event_log.EventFile(folder / "tensorboard")
    for step, loss in train.items():
        events.scalars({"train/loss": loss, "train/learning_rate": rate}, step)
    for step, loss in (val or {}).items():
        events.scalars({"eval/loss": loss}, step)
    events.close()
    # a name begins with its second: two starts in one test would stand in no order
    return events.path.rename(events.path.with_name(f"events.out.tfevents.{1_000_000 + before}.x"))


def sample(number: int, *, base: str = "no", tuned: str = "yes", reference: str = "yes", **more: Any) -> dict[str, Any]:
    """A line of samples.jsonl as eval wrote it before there were scores."""
    row: dict[str, Any] = {
        "id": f"{number:064x}",
        "source": {"file": "data/raw/rows.jsonl", "line": number},
        "prompt": f"question {number}",
        "prompt_cut": False,
        "reference": reference,
    }
    for side, text in (("base", base), ("tuned", tuned)):
        row |= {side: text, f"{side}_exact": text == reference, f"{side}_json_exact": None}
        row |= {f"{side}_tokens": len(text), f"{side}_finished": True}
    return {**row, **more}


def scored(row: dict[str, Any], **scores: tuple[float | None, float | None]) -> dict[str, Any]:
    return {**row, "scores": {side: {name: pair[at] for name, pair in scores.items()} for at, side in enumerate(("base", "tuned"))}}  # fmt: skip


def put_evaluation(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    files.write_jsonl(EVAL / "samples.jsonl", rows)
    names = list(metrics.METRICS)
    found = {
        "identity": "x",
        "run": RUN,
        "data": {"folder": "data/rendered/demo", "available": len(rows)},
        "settings": {"split": "test", "rows": len(rows), "generate": True, "max_new_tokens": 24, "batch_size": 3},
        "model": {"name": "base", "tuning": "lora", "precision": "fp32", "device": "cpu"},
        "base": {**dict.fromkeys(names), "loss": 2.5, "exact_match": 0.25},
        "tuned": {**dict.fromkeys(names), "loss": 1.5, "exact_match": 0.75},
        "reasons": {"json_valid": "no reference is a JSON object or array"},
        "seconds": 3.0,
        "at": "2030-01-01T00:00:00Z",
        "samples_sha256": files.sha256_file(EVAL / "samples.jsonl"),
        **more,
    }
    files.write_json(EVAL / "metrics.json", found)
    return found


def change_stamp(**facts: Any) -> None:
    stamp.write(RUN, {**stamp.require(RUN), **facts})


class Elements(HTMLParser):
    """Tags, attributes and texts of a page; each element that was opened is closed."""

    VOID = ("meta", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside != "style":
            (self.scripts if inside == "script" else self.texts).append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def listed(text: str) -> list[dict[str, Any]]:
    """The rows that the page's search reads."""
    return json.loads(Elements(text).scripts[0])


# --- curves


def test_the_curves_are_those_of_the_event_files(tmp_path: Path) -> None:
    log(tmp_path, {1: 2.0, 2: 1.5, 3: 1.25}, {2: 1.75, 3: 1.5}, rate=0.5)
    found = run_report_curves.read(tmp_path)
    assert (found.train, found.val) == ([(1, 2.0), (2, 1.5), (3, 1.25)], [(2, 1.75), (3, 1.5)])
    assert found.rate == [(1, 0.5), (2, 0.5), (3, 0.5)] and found.best == (3, 1.5) and not found.problems


def test_what_was_logged_after_the_checkpoint_that_a_run_went_on_from_does_not_count(tmp_path: Path) -> None:
    log(tmp_path, {1: 4.0, 2: 3.0, 3: 9.0, 4: 9.0}, {2: 3.5, 4: 9.0})  # killed after step 4, saved at step 2
    log(tmp_path, {3: 2.0, 4: 1.0, 5: 0.5}, {4: 1.5})
    found = run_report_curves.read(tmp_path)
    assert found.train == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0), (5, 0.5)]
    assert found.val == [(2, 3.5), (4, 1.5)]


def test_more_points_than_tensorboard_keeps_by_default_are_all_read(tmp_path: Path) -> None:
    log(tmp_path, {step: 1 / step for step in range(1, 12_001)})
    assert len(run_report_curves.read(tmp_path).train) == 12_000


def test_a_loss_that_was_no_number_leaves_no_hole_in_the_page(tmp_path: Path) -> None:
    log(tmp_path, {1: 2.0, 2: math.nan, 3: math.inf, 4: 1.0})
    found = run_report_curves.read(tmp_path)
    assert found.train == [(1, 2.0), (4, 1.0)]
    assert "nan" not in "".join(run_report_curves.figures(found, [])).lower().replace("nats", "")


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_event_file_does_not_cost_the_others(tmp_path: Path, damage: str) -> None:
    first = log(tmp_path, {1: 2.0, 2: 1.5})
    log(tmp_path, {3: 1.0})
    whole = first.read_bytes()
    changed = {"cut": whole[:-7], "garbage": whole[:200] + bytes(range(256)) + whole[200:], "empty": b""}
    first.write_bytes(changed[damage])
    found = run_report_curves.read(tmp_path)
    assert found.train[-1] == (3, 1.0)
    if damage == "cut":
        assert found.train[:1] == [(1, 2.0)]


def test_without_event_files_the_curves_are_those_of_metrics_jsonl(tmp_path: Path) -> None:
    assert "logged nothing" in run_report_curves.read(tmp_path).problems[0]
    lines = [{"step": 1, "loss": 2.0, "learning_rate": 0.1}, {"step": 1, "eval_loss": 1.5}, {"step": 2, "loss": 1.0}]
    files.write_jsonl(tmp_path / "metrics.jsonl", lines)
    found = run_report_curves.read(tmp_path)
    assert (found.train, found.val, found.rate) == ([(1, 2.0), (2, 1.0)], [(1, 1.5)], [(1, 0.1)])
    assert "metrics.jsonl" in found.problems[0]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    found = run_report_curves.read(tmp_path)
    assert len(found.train) == 2 and "damaged" in found.problems[1]


@pytest.mark.parametrize(
    "points", [{5: 1.0}, {1: 1.0, 2: 1.0}, {1: 0.0, 2: 0.0}, {1: 1e9, 2: 1e-9}, {7: -3.0, 9: -1.0}]
)
def test_any_curve_can_be_drawn(points: dict[int, float]) -> None:
    curves = run_report_curves.Curves(train=list(points.items()), val=list(points.items())[:1])
    drawn = "".join(run_report_curves.figures(curves, [1]))
    Elements(drawn)
    numbers = [
        float(found) for path in re.findall(r' d="([^"]*)"', drawn) for found in re.findall(r"-?\d+\.?\d*", path)
    ]
    assert all(-1 <= number <= 1001 for number in numbers)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000))
def test_thinned_curves_keep_their_peaks_and_their_order(values: list[float]) -> None:
    points = list(enumerate(values))
    kept = run_report_curves.thin(points, 100)
    assert len(kept) <= max(100, min(len(points), 100)) and kept == sorted(kept)
    assert set(kept) <= set(points)
    assert min(v for _, v in kept) == min(values) and max(v for _, v in kept) == max(values)


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6))
def test_ticks_lie_inside_and_are_few(low: float, span: float) -> None:
    high = low + span
    found = run_report_curves.ticks(low, high)
    assert len(found) <= 9
    room = (high - low) * 1e-3 + 1e-9 * abs(low)
    assert all(low - room <= mark <= high + room for mark in found)


# --- rows


def test_rows_are_ranked_by_the_headline_and_where_that_is_equal_by_a_finer_metric() -> None:
    rows = [
        scored(sample(1), exact_match=(0, 1), chrf=(10, 100)),
        scored(sample(2), exact_match=(0, 1), chrf=(50, 100)),
        scored(sample(3), exact_match=(1, 0), chrf=(100, 20)),
        scored(sample(4), exact_match=(0, 0), chrf=(30, 20)),
        scored(sample(5), exact_match=(1, 1), chrf=(100, 100)),
        scored(sample(6), exact_match=(None, None), chrf=(None, 3)),
    ]
    ranked = run_report_rows.rank(rows, "exact_match")
    better, worse = run_report_rows.extremes(ranked)
    assert ([row.number for row in better], [row.number for row in worse]) == ([1, 2], [3, 4])
    assert [row.direction for row in ranked] == ["better", "better", "worse", "worse", "same", "same"]


def test_for_a_metric_where_less_is_better_a_falling_figure_is_an_improvement() -> None:
    ranked = run_report_rows.rank([scored(sample(1), loss=(2.0, 1.0)), scored(sample(2), loss=(1.0, 2.0))], "loss")
    assert [row.direction for row in ranked] == ["better", "worse"]


def test_an_evaluation_without_scores_is_ranked_by_its_flags() -> None:
    rows = [sample(1), sample(2, base="yes", tuned="yet"), sample(3, base="same", tuned="same")]
    assert run_report_rows.headline({}, rows) == "exact_match"
    ranked = run_report_rows.rank(rows, "exact_match")
    assert [row.direction for row in ranked] == ["better", "worse", "same"]
    almost = run_report_rows.rank([sample(1, base="no", tuned="yet"), sample(2, base="yet", tuned="no")], "exact_match")
    assert [row.direction for row in almost] == ["better", "worse"]
    assert run_report_rows.headline({}, [sample(1, tuned_json_exact=True)]) == "json_exact"
    assert run_report_rows.headline({"headline": "rouge_l"}, rows) == "rouge_l"
    assert run_report_rows.headline({"headline": "from the future"}, rows) == "exact_match"
    assert run_report_rows.headline({}, [{"prompt": "x"}]) == "loss"


@given(st.text())
def test_pieces_of_a_text_are_the_text(text: str) -> None:
    assert "".join(pieces(text)) == text


@given(st.text(), st.text())
def test_marking_differences_changes_no_letter(reference: str, answer: str) -> None:
    wanted, given_, words = marked(reference, answer)
    assert "".join(text for text, _ in wanted) == reference and "".join(text for text, _ in given_) == answer
    assert words
    if reference == answer:
        assert not any(flag for _, flag in [*wanted, *given_])


@given(st.text("ab \n\u0301\u200d👩🏽", max_size=3000), st.integers(0, 50))
def test_folding_loses_no_letter(text: str, repeat: int) -> None:
    text *= repeat
    first, rest = fold([(text[:100], True), (text[100:], False)])
    assert "".join(part for part, _ in [*first, *rest]) == text
    assert "".join(fold_before(text)) == text


def test_differences_are_marked_word_by_word() -> None:
    wanted, answer, words = marked('{"item": "red pot", "n": 12}', '{"item": "blue pot", "n": 12}')
    assert [text for text, flag in answer if flag] == ["blue"] and [text for text, flag in wanted if flag] == ["red"]
    assert words == "1 of 5 words not in the reference, 1 of its 5 missing"
    assert marked("a b", "a b")[2] == "the same as the reference"
    assert marked("a b", "a\nb")[2] == "the same but for spaces"
    assert marked("a b", "a, b")[2] == "the same words as the reference, other signs"
    _, answer, _ = marked("one five", "one two three four five")
    assert [text for text, flag in answer if flag] == ["two three four"]


@pytest.mark.parametrize(
    ("reference", "answer", "different"),
    [
        ("ok 👩‍👩‍👧‍👦 end", "ok 👨🏽‍🚀 end", "👨🏽‍🚀"),
        ("שלום עולם טוב", "שלום חבר טוב", "חבר"),
        ("नमस्ते दुनिया", "नमस्ते हिन्दी", "हिन्दी"),
        ("今天很好。", "今天很坏。", "坏"),
        ("cafe\u0301 noir", "the\u0301 noir", "the\u0301"),
    ],
)
def test_no_sign_is_torn_in_any_script(reference: str, answer: str, different: str) -> None:
    assert [text for text, flag in marked(reference, answer)[1] if flag] == [different]


def test_a_text_without_spaces_folds_between_whole_emoji() -> None:
    family = "👩‍👩‍👧‍👦"
    for at in range(len(family) * 20, len(family) * 21):
        assert boundary(family * 100, at) % len(family) == 0
    assert boundary("e\u0301" * 100, 51) == 50


def test_answers_that_repeat_themselves_are_compared_soon_and_truly() -> None:
    again = "a b " * 1200
    assert marked(again, again)[2] == "the same as the reference"
    _, answer, _ = marked(again, again + "c " + again[:80])
    assert sum(len(text) for text, flag in answer if flag) < 100
    marked("a b " * 1400, "b a c " * 900)  # minutes, where difflib may begin at every word


def test_texts_too_long_for_difflib_are_shown_unmarked_and_it_is_said() -> None:
    text = "word " * 4000
    wanted, answer, words = marked(text, text + "x")
    assert not any(flag for _, flag in [*wanted, *answer]) and "too long" in words


# --- the page


def test_a_run_that_was_trained_but_not_evaluated_has_a_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(PAGE.parent, {1: 2.0, 2: 1.0}, {2: 1.5})
    text = Elements(page()).text
    assert str(PAGE) in capsys.readouterr().out
    assert "Not evaluated yet" in text and f"make eval RUN={RUN}" in text
    assert "train loss from 2 at step 1 to 1 at step 2" in PAGE.read_text() and "Rows" not in text


def test_a_run_that_still_runs_or_stopped_says_so(run: Path) -> None:
    starts = [{"at": "2026-01-01T00:00:00Z", "from_step": 0, "step": 4, "ended": "running"}]
    change_stamp(status="running", starts=starts)
    assert "not finished: it is training, or was killed (last saved step: 4)" in page()
    starts = [{**starts[0], "ended": "interrupted"}, {**starts[0], "from_step": 4, "step": 6, "ended": "failed: disk"}]
    change_stamp(status="unfinished", starts=starts)
    log(PAGE.parent, dict.fromkeys(range(1, 8), 1.0))
    text = page()
    assert "it stopped at step 6 (failed: disk)" in text and "went on after a stop" in text


def test_a_fallback_and_other_surprises_of_the_training_are_warnings(run: Path) -> None:
    change_stamp(
        backend={"requested": "unsloth", "actual": "bitsandbytes", "fallback_reason": "no GPU here"},
        precision={"requested": "fp16", "actual": "fp32", "why": "no half here", "changed": True},
        result={"steps": 3, "tokens": 9, "skipped_steps": 2, "micro_batch_parts": 4, "train_loss": 1.0, "kept": "last"},
    )
    text = Elements(page()).text
    assert "Unsloth was asked for, bitsandbytes ran: no GPU here" in text
    assert "Precision fp16 was asked for, fp32 ran: no half here" in text
    assert "2 steps were passed over" in text and "cut into 4 parts" in text


def test_rows_that_render_left_out_or_cut_are_warnings_while_they_are_the_runs_own(run: Path) -> None:
    folder = stages.folder("render", "demo")
    manifest = stages.read_manifest(folder) or {}
    files.write_json(
        folder / "manifest.json", {**manifest, "rows_in": 9, "too_long": {"left_out": 2, "cut": 3, "split": 0}}
    )
    text = page()
    assert (
        "2 of 9 rows were too long and left out" in text
        and "3 of 9 rows were too long and had their prompt cut" in text
    )
    (folder / "val.jsonl").write_text("{}\n")
    stages.write_manifest(folder, "render", {}, {}, rows_in=9, too_long={"left_out": 5})
    assert "too long" not in page()


@pytest.mark.parametrize(
    ("split", "said"), [("val", "best checkpoint was chosen"), ("train", "learnt by heart, not"), ("test", "")]
)
def test_rows_that_are_no_test_rows_are_warned_about(run: Path, split: str, said: str) -> None:
    put_evaluation([sample(1)], settings={"split": split, "rows": 1, "generate": True, "max_new_tokens": 24})
    text = page()
    assert said in text
    others = {"best checkpoint was chosen", "learnt by heart, not"} - {said}
    assert not [other for other in others if other in text]


def test_an_older_evaluation_is_shown_without_intervals_and_says_so(run: Path) -> None:
    put_evaluation([sample(1), sample(2, tuned="no")])
    text = Elements(page()).text
    assert "25.0 % → 75.0 %" in text and "+50.0 pp" in text
    assert "No intervals" in text and "verdict" not in text
    assert "Only 2 rows: chance alone can move a share of one half by 69 points" in text
    assert "no JSON parses: no reference is a JSON object or array" in text


def test_intervals_verdicts_speed_and_the_evaluations_own_warnings_are_shown(run: Path) -> None:
    interval = {"low": 0.1, "high": 0.9, "level": 0.95, "rows": 2, "resamples": 1000}
    put_evaluation(
        [scored(sample(1), exact_match=(0, 1), f1=(0.1, 1.0)), scored(sample(2), exact_match=(0, 1), f1=(0.2, 1.0))],
        intervals={"loss": {**interval, "low": -1.5, "high": 0.5}, "exact_match": interval, "chrf": None},
        verdict={"loss": "no clear change", "exact_match": "better", "mean_tokens": "changed", "chrf": "unknown"},
        speed={"base": {"tokens_per_second": 12.3, "seconds_per_answer": 1.5}, "tuned": None},
        warnings=["the rows were <few>"],
        headline="exact_match",
    )
    text = Elements(page()).text
    assert "95 % interval +10.0 to +90.0 pp" in text and "▲ better" in text and "≈ no clear change" in text
    assert "-1.500 to +0.500" in text and "No clear change in loss: the interval includes zero" in text
    assert "12.3 tokens/s, 1.50 s an answer" in text and "The rows were <few>" in text
    assert "No intervals" not in text and "Key by key" not in text
    put_evaluation(
        [sample(1)], intervals=dict.fromkeys(metrics.METRICS), verdict=dict.fromkeys(metrics.METRICS, "unknown")
    )
    text = Elements(page()).text
    assert "No intervals: too few rows" in text and "unknown" not in text


def test_json_keys_are_shown_the_worst_first(run: Path) -> None:
    keys = {"good": {"rows": 4, "base": 0.0, "tuned": 1.0}, "<bad>": {"rows": 2, "base": 0.5, "tuned": 0.25}}
    put_evaluation([sample(1)], json_keys=keys)
    text = Elements(page()).text
    assert "Key by key" in text and text.index("<bad>") < text.index("good") and "25.0 %" in text


def test_every_metric_says_what_it_measures() -> None:
    assert [name for name in metrics.METRICS if name not in run_report_scores.MEANINGS] == []


def test_answers_cut_at_the_limit_are_said(run: Path) -> None:
    found = put_evaluation([sample(1, tuned_finished=False)])
    found["tuned"]["hit_limit"] = 1.0
    files.write_json(EVAL / "metrics.json", found)
    text = Elements(page()).text
    assert "Tuned: 100% of the answers were cut at 24 tokens" in text and "; cut at the limit" in text


def test_figures_of_earlier_weights_are_warned_about(run: Path) -> None:
    put_evaluation([sample(1)], at="2026-01-01T00:00:00Z")
    change_stamp(starts=[{"ended": "finished", "until": "2026-01-02T00:00:00Z"}])
    assert "the figures are of earlier weights" in page()


def test_an_evaluation_without_answers_shows_losses_and_prompts(run: Path) -> None:
    rows = [{k: v for k, v in sample(n).items() if not k.startswith(("base", "tuned"))} for n in (1, 2)]
    settings = {"split": "test", "rows": 2, "generate": False, "max_new_tokens": 24}
    put_evaluation([scored(rows[0], loss=(2.0, 1.0)), scored(rows[1], loss=(1.0, 2.0))], settings=settings)
    text = Elements(page()).text
    assert "no answer was generated" in text and "loss 2.000 → 1.000" in text and "Most harmed (1)" in text
    put_evaluation(rows, settings=settings)
    assert "No row was harmed" in Elements(page()).text
    put_evaluation([], settings=settings)  # texts only: nothing was asked
    assert "Most harmed" not in page()


def test_hostile_rows_names_and_settings_stay_text(run: Path) -> None:
    rows = [sample(n, base=HOSTILE, tuned=HOSTILE[: -n - 1], reference=HOSTILE, prompt=HOSTILE) for n in range(3)]
    rows[0]["source"]["file"] = HOSTILE
    put_evaluation(rows, warnings=[HOSTILE], reasons={"chrf": HOSTILE})
    facts = stamp.require(RUN)
    change_stamp(
        model={**facts["model"], "name": HOSTILE},
        identity={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        starts=[{"ended": f"failed: {HOSTILE}"}],
        style={"text": HOSTILE, "mode": HOSTILE},
    )
    (PAGE.parent / "config.yaml").write_text(f"x: {HOSTILE}\n")
    text = page()
    found = Elements(text)
    assert HOSTILE in found.text and "img" not in found.tags
    assert found.tags.count("script") == 2 and found.scripts[1] == SCRIPT
    assert [name for name, _ in found.attributes if name.startswith("on")] == []
    assert listed(text)[0]["texts"][1] == ["reference", HOSTILE]
    assert listed(text)[0]["at"].startswith(HOSTILE)


def test_the_browser_may_run_the_pages_own_script_only_and_fetch_nothing(run: Path) -> None:
    put_evaluation([sample(1, reference="see https://example.com/x.png")])
    text = page()
    digest = base64.b64encode(hashlib.sha256(Elements(text).scripts[1].encode()).digest()).decode()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = [value or "" for name, value in Elements(text).attributes if name in ("href", "src", "srcset", "action")]
    assert links and all(link.startswith("#") for link in links)
    assert "url(" not in text and "@import" not in text


def test_odd_signs_survive_or_become_visible(run: Path) -> None:
    odd = "עברית 👩‍👩‍👧‍👦 e\u0301 \x00\x1b[31m\x7f \ud800 \u202eabc\r\nline"
    put_evaluation([sample(1, tuned=odd, prompt="")])
    text = page()
    assert "עברית 👩‍👩‍👧‍👦 e\u0301" in Elements(text).text.replace("\n", " ")
    assert "␀␛" in text and "\x00" not in text and "\x1b" not in text and "\r" not in text
    assert 'dir="auto"' in text and "(empty)" in text


def test_long_texts_fold_and_are_whole(run: Path) -> None:
    long = " ".join(f"word{n}" for n in range(2000))
    put_evaluation([sample(1, base="yes", tuned=long, prompt=f"first {long} last", prompt_cut=True)])
    text = page()
    cards = text.split('id="everything"')[0]
    assert "more characters</summary>" in cards and "characters before this</summary>" in cards
    assert "word1999" in cards and "its beginning is left out here" in cards
    many_lines = "\n".join("x" for _ in range(60))
    assert len(fold([(many_lines, False)])[1]) == 1


def test_five_thousand_rows_make_a_page_that_stays_small(run: Path) -> None:
    long = "lorem ipsum dolor sit amet " * 60
    rows = [scored(sample(n, base=long, tuned=long + "x", reference=long, prompt=long), exact_match=(n % 2, 1)) for n in range(5200)]  # fmt: skip
    put_evaluation(rows, headline="exact_match")
    text = page()
    assert len(text) < 8_000_000
    assert text.count("<article") == 20 and len(listed(text)) == 5000
    assert "the 200 rows that changed least and what goes beyond 150 characters of a text" in text
    assert "Most improved (20 of 2,600)" in text


def test_few_rows_are_searched_whole(run: Path) -> None:
    put_evaluation([sample(1, reference="x " * 600)])
    text = page()
    assert "Left out" not in text and listed(text)[0]["texts"][1][1] == "x " * 600


def test_rows_of_another_evaluation_are_not_mixed_in(run: Path) -> None:
    put_evaluation([sample(1)])
    files.write_jsonl(EVAL / "samples.jsonl", [sample(2)])
    text = page()
    assert "missing or of another evaluation" in text and "Most improved" not in text


def test_secrets_in_the_config_do_not_reach_the_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "sesame-open-1234")
    (PAGE.parent / "config.yaml").write_text(f"a: sesame-open-1234\nb: {Path.home()}/x\n")
    text = page()
    assert "sesame" not in text and "***" in text and "~/x" in text


def test_an_unknown_run_is_the_users_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make("--run", "nope") == 2
    assert f"runs here: {RUN}" in capsys.readouterr().err
    assert make("--run", "../x") == 2


def test_damaged_files_are_refused_and_the_earlier_report_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = page()
    EVAL.mkdir()
    (EVAL / "metrics.json").write_text("{")
    assert make() == 3
    assert "metrics.json" in capsys.readouterr().err and PAGE.read_text() == before
    (EVAL / "metrics.json").write_text('{"base": {}}')
    assert make() == 3
    assert "make eval" in capsys.readouterr().err and PAGE.read_text() == before


def test_a_report_is_written_anew_only_where_something_is_newer(run: Path) -> None:
    put_evaluation([sample(1)])
    path = run_report.ensure(RUN)
    path.write_text("mine")
    later = max(part.stat().st_mtime for part in run_report._sources(RUN)) + 5
    os.utime(path, (later, later))
    assert run_report.ensure(RUN).read_text() == "mine"
    os.utime(EVAL / "metrics.json", (later + 1, later + 1))
    assert run_report.ensure(RUN).read_text() != "mine"


@pytest.mark.slow
def test_eval_ends_with_the_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_step.main(["--config", "c.yaml"]) == 0
    assert f"report: {PAGE}" in capsys.readouterr().out
    text = Elements(PAGE.read_text()).text
    assert "Most improved (4)" in text and "the same as the reference" in text
    assert all(answer in text for _, answer in CHATS[:4])
    PAGE.unlink()
    assert eval_step.main(["--config", "c.yaml"]) == 0  # up to date, and the report is there again
    assert PAGE.is_file()


# --- in a browser


def browse(address: str, *flags: str) -> str:
    """The page's elements after its script has run."""
    assert CHROMIUM
    with tempfile.TemporaryDirectory() as profile:
        words = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", "--window-size=1280,900", *flags, "--virtual-time-budget=3000", "--dump-dom",
        ]  # fmt: skip
        done = subprocess.run([*words, address], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_search_filter_and_curves_work_in_a_browser(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(PAGE.parent, {step: 1 / step for step in range(1, 9)}, {4: 0.5, 8: 0.4})
    rows = [sample(n, base="no", tuned="yes" if n % 2 else "yet", prompt=f"<b>Needle</b> {n}" if n < 3 else HOSTILE) for n in range(1, 61)]  # fmt: skip
    put_evaluation(rows)
    plain = browse((run / page_path()).as_uri())
    assert ">60 of 60 rows; 20 of them in full<" in plain
    assert plain.split('id="list"')[1].count("<details") == 25 and 'type="range"' in plain
    monkeypatch.setattr(
        run_report_page,
        "SCRIPT",
        SCRIPT
        + """
const input = (id, value, kind) => { by(id).value = value; by(id).dispatchEvent(new Event(kind)); };
input("search", "NEEDLE b>", "input");
document.querySelector("#list details").open = true;
document.querySelector("input[type=range]").value = 3;
document.querySelector("input[type=range]").dispatchEvent(new Event("input"));
""",
    )
    searched = browse((run / page_path()).as_uri())
    assert ">2 of 60 rows; " in searched
    assert searched.split('id="list"')[1].count("<details") == 2
    assert "&lt;b&gt;Needle&lt;/b&gt; 1" in searched.split('id="list"')[1] and "<b>Needle" not in searched
    assert "step 4: train loss 0.25, validation loss 0.5" in searched.split("<output>")[1].split("</output>")[0]
    assert "<img" not in searched


def page_path() -> Path:
    assert make() == 0
    return PAGE


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_nothing_is_wider_than_a_phone(run: Path) -> None:
    log(PAGE.parent, {step: 1 / step for step in range(1, 9)})
    interval = {"low": -0.1, "high": 0.9, "level": 0.95, "rows": 2, "resamples": 1000}
    put_evaluation(
        [sample(n, tuned="w" * 3000, prompt="https://example.com/" + "x" * 900) for n in range(3)],
        intervals=dict.fromkeys(metrics.METRICS, interval),
        verdict=dict.fromkeys(metrics.METRICS, "no clear change"),
    )
    frame = run / "frame.html"
    frame.write_text(
        f'<p id="said"></p><iframe id="f" width="360" height="800" src="{page_path().absolute().as_uri()}"></iframe>'
        "<script>f.onload = () => said.textContent = 'width ' + f.contentDocument.documentElement.scrollWidth + '.'</script>"
    )
    said = re.search(r"width (\d+)\.", browse(frame.as_uri(), "--allow-file-access-from-files"))
    assert said and int(said[1]) <= 360
