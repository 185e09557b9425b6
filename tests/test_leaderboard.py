"""The leaderboard: true figures, compared only where they may be, whatever single runs have lost, also while some train."""

import csv
import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import leaderboard as step
from scripts.utils import (
    event_log,
    files,
    hparams,
    leaderboard_plots,
    leaderboard_runs,
    leaderboard_table,
    metrics,
    stamp,
)
from scripts.utils import leaderboard_ranking as ranking
from scripts.utils.leaderboard_runs import Entry
from scripts.utils.schema import Config
from tests.commands import ROOT, environment

ODD_KEYS = "run status starts model tuning render data result settings tuned step loss eval_loss memory_gib tokens_seen lora train".split()
CSV, PAGE = Path("outputs/leaderboard.csv"), Path("outputs/leaderboard.html")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.utils import environment as variables

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(variables, "_HEAVY", ())


def put(
    run: str,
    right: Sequence[bool] | None = None,
    *,
    status: str = "finished",
    ended: str = "finished",
    settings: dict[str, Any] | None = None,
    new_tokens: int = 64,
    first: int = 0,
    losses: Sequence[float] = (2.0, 1.0, 1.5),
) -> Path:
    """A run's folder as the steps leave it, without training: ``right`` says which test rows were answered exactly."""
    folder = stamp.run_folder(run)
    config = Config().model_dump()
    config["run"]["name"] = run
    for key, value in (settings or {}).items():
        section, _, name = key.partition(".")
        config[section][name] = value
    starts = [
        {"at": "2026-01-01T10:00:00Z", "from_step": 0, "step": 3, "ended": ended, "until": "2026-01-01T10:02:30Z"}
    ]
    stamp.write(
        run,
        {
            "run": run,
            "status": status,
            "starts": starts,
            "model": {"name": "tiny-model", "revision": None},
            "tuning": {"mode": "lora"},
            "tokenizer_hash": "t",
            "render": {"template_hash": "h", "max_length": 64},
            "data": {"name": "demo", "hash": "d"},
            "result": {"steps": 3, "best_eval_loss": min(losses)} if status == "finished" else {},
        },
    )
    files.write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    lines = [
        {"step": n, "loss": loss, "tokens_per_second": 100.0, "tokens_seen": 100 * n, "memory_gib": 0.5 * n}
        for n, loss in enumerate(losses, 1)
    ]
    files.write_jsonl(
        folder / "metrics.jsonl", [*lines, *({"step": n, "eval_loss": loss} for n, loss in enumerate(losses, 1))]
    )
    events = event_log.EventFile(folder / "tensorboard")
    for n, loss in enumerate(losses, 1):
        events.scalars({"train/loss": loss, "eval/loss": loss}, n)
    events.close()
    if right is not None:
        rows = [
            {
                "id": f"{first + number:064x}",
                "reference": "yes sir",
                "tuned": "yes sir" if well else "no sir",
                "scores": {"tuned": {"exact_match": float(well), "loss": 0.1 if well else 0.9, "tokens": 2}},
            }
            for number, well in enumerate(right)
        ]
        files.write_jsonl(folder / "eval" / "samples.jsonl", rows)
        files.write_json(
            folder / "eval" / "metrics.json",
            {
                "run": run,
                "data": {"folder": "x", "available": len(rows), "rows_sha256": metrics.rows_hash(rows)},
                "settings": {"split": "test", "rows": len(rows), "generate": True, "max_new_tokens": new_tokens},
                "headline": "exact_match",
                "base": {},
                "tuned": {"exact_match": sum(right) / len(right), "loss": 0.5},
                "samples_sha256": files.sha256_file(folder / "eval" / "samples.jsonl"),
            },
        )
    return folder


def some(count: int, of: int = 40, seed: int = 0) -> list[bool]:
    chosen = [number < count for number in range(of)]
    random.Random(seed).shuffle(chosen)
    return chosen


def board(*words: str) -> list[dict[str, str]]:
    """The rows of the CSV that the command wrote."""
    assert step.main(list(words)) == 0
    with CSV.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_runs_are_ranked_by_their_headline_with_every_figure_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    put("low", some(10), settings={"lora.r": 4})
    put("high", some(39), settings={"lora.r": 8})
    rows = board()
    assert [(row["run"], row["rank"], row["state"]) for row in rows] == [
        ("high", "1", "trained"),
        ("low", "2", "trained"),
    ]
    high = rows[0]
    assert (high["exact_match"], high["val_loss"], high["lora.r"], high["steps"]) == ("0.975", "1.0", "8", "3")
    assert (high["tokens_per_second"], high["seconds"], high["peak_memory_gib"]) == ("100.0", "150.0", "1.5")
    assert (high["base"], high["data"]) == ("tiny-model", "demo")
    out = capsys.readouterr().out
    assert "best: high, exact match 97.5 %" in out and "clear winner: ahead of low" in out
    assert "97.5 %" in PAGE.read_text(encoding="utf-8")


def test_only_settings_in_which_runs_differ_are_columns() -> None:
    put("a", settings={"lora.r": 4, "train.logging_steps": 1, "style.text": "be brief"})
    put("b", settings={"lora.r": 8, "train.logging_steps": 2, "style.text": "be brief"})
    names = board()[0]
    # how often something is logged decides nothing
    assert "lora.r" in names and not {"train.logging_steps", "style.text", "train.learning_rate"} & set(names)


def test_equally_good_runs_have_no_clear_winner(capsys: pytest.CaptureFixture[str]) -> None:
    put("one", some(30, seed=1), settings={"lora.r": 4})
    put("two", some(29, seed=2), settings={"lora.r": 8})
    board()
    out = capsys.readouterr().out
    assert "best: one" in out and "no clear winner" in out and "holds 0" in out


def test_the_lead_is_widened_for_the_number_of_runs_it_was_chosen_from(capsys: pytest.CaptureFixture[str]) -> None:
    """A lead that is clear between two runs is no longer so as the best of 39."""
    put("best", some(34, seed=1), settings={"lora.r": 1})
    put("next", some(24, seed=2), settings={"lora.r": 2})
    board()
    assert "clear winner: ahead of next" in capsys.readouterr().out
    for number in range(3, 40):
        put(f"n{number}", [True] * 20 + [False] * 20, settings={"lora.r": number})
    board()
    out = capsys.readouterr().out
    assert "no clear winner: the lead over next" in out and "widened for 38 comparisons" in out
    assert "chosen as the best of 39 by these very rows" in out


def test_runs_that_answered_other_rows_or_otherwise_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    put("a", some(20), settings={"lora.r": 4})
    put("b", some(30), settings={"lora.r": 8})
    put("other-rows", some(39), first=1000)
    put("other-decoding", some(39), new_tokens=8)
    ranks = {row["run"]: row["rank"] for row in board()}
    assert (ranks["b"], ranks["a"]) == ("A1", "A2")
    assert {ranks["other-rows"], ranks["other-decoding"]} == {"B1", "C1"}
    out = capsys.readouterr().out
    assert "compared within each group only" in out
    assert out.count("no other run was evaluated on these rows in this way") == 2


def test_loss_is_compared_only_with_the_same_tokenizer_and_template() -> None:
    put("a", some(20))
    put("b", some(20), settings={"lora.r": 8})
    facts = stamp.require("b")
    stamp.write("b", {**facts, "render": {**facts["render"], "template_hash": "another"}})
    assert [row["rank"] for row in board("--by", "loss")] == ["A1", "B1"]
    assert [row["rank"] for row in board("--by", "exact_match")] == ["1", "2"]  # answers are texts


def test_an_evaluation_that_did_not_write_its_rows_hash_is_compared_by_its_samples() -> None:
    folder = put("old", some(20))
    put("new", some(30), settings={"lora.r": 8})
    found = files.read_json(folder / "eval" / "metrics.json")
    del found["data"]["rows_sha256"]
    files.write_json(folder / "eval" / "metrics.json", found)
    assert [row["rank"] for row in board()] == ["1", "2"]


def test_runs_equal_but_for_the_seed_have_a_mean_and_a_spread_and_are_no_rivals(
    capsys: pytest.CaptureFixture[str],
) -> None:
    put("r8-s1", some(36), settings={"lora.r": 8, "train.seed": 1})
    put("r8-s2", some(34), settings={"lora.r": 8, "train.seed": 2})
    put("r4-s1", some(10), settings={"lora.r": 4, "train.seed": 1})
    board()
    out = capsys.readouterr().out
    assert "lora.r 8: 87.5 % mean of 2 seeds, standard deviation 3.5 pp (r8-s1, r8-s2)" in out
    assert "clear winner: ahead of r4-s1" in out  # not of the same settings with another seed
    assert "<h2>Over seeds</h2>" in PAGE.read_text(encoding="utf-8")


def test_a_run_that_is_training_is_shown_and_not_touched(capsys: pytest.CaptureFixture[str]) -> None:
    folder = put("live", status="running", ended="running", losses=(2.0, 1.2))
    put("dead", status="running", ended="running")
    put("broken", status="unfinished", ended="failed: out of memory on a single example")
    put("stopped", status="unfinished", ended="interrupted")
    before = sorted(path.name for path in (folder / "tensorboard").iterdir())
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "lo')  # it is being written now
    with files.file_lock(folder / ".lock", wait_seconds=0, what="the run"):
        states = {row["run"]: row["state"] for row in board()}
    assert states == {"live": "training", "dead": "killed", "broken": "failed", "stopped": "interrupted"}
    captured = capsys.readouterr()
    assert "broken: out of memory on a single example" in captured.out
    assert "damaged" not in captured.err
    assert sorted(path.name for path in (folder / "tensorboard").iterdir()) == before


def test_looking_at_a_run_does_not_keep_it_from_starting() -> None:
    path = put("a") / ".lock"
    with files.file_lock(path, wait_seconds=0, what="the run"):
        assert leaderboard_runs.is_locked(path)
    assert not leaderboard_runs.is_locked(path)
    with files.file_lock(path, wait_seconds=0, what="the run"):
        pass


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"run": 3}'])
@pytest.mark.parametrize(
    "name", ["backend.json", "config.yaml", "metrics.jsonl", "eval/metrics.json", "eval/samples.jsonl"]
)
def test_a_damaged_file_of_one_run_is_a_warning_and_the_others_are_shown(
    name: str, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    put("good", some(20), settings={"lora.r": 4})
    put("bad", some(39), settings={"lora.r": 8})
    (Path("outputs/bad") / name).write_bytes(damage)
    rows = {row["run"]: row for row in board()}
    assert rows["good"]["exact_match"] == "0.5" and "bad" in rows
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if name in ("backend.json", "eval/metrics.json"):
        assert re.search(r"warning: run bad: .+", captured.err)
    if name == "eval/samples.jsonl":
        assert "no interval" in captured.out
    PAGE.read_text(encoding="utf-8")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(ODD_KEYS) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(max_examples=60)
@given(st.sampled_from(["backend.json", "config.yaml", "metrics.jsonl", "eval/metrics.json"]), json_values)
def test_whatever_a_run_holds_instead_is_no_traceback(name: str, value: Any) -> None:
    put("good", some(20), settings={"lora.r": 4})
    put("bad", some(39), settings={"lora.r": 8})
    path = Path("outputs/bad") / name
    known = yaml.safe_load(path.read_text()) if name != "metrics.jsonl" else {"step": 1}
    mixed = (
        {**known, **value} if isinstance(value, dict) else value
    )  # right but for some of its keys, or altogether wrong
    path.write_text(json.dumps(mixed))
    assert "good" in {row["run"] for row in board()}


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "eval/metrics.json", "eval/samples.jsonl"])
def test_a_missing_file_of_one_run_costs_its_figures_only(name: str) -> None:
    put("good", some(20), settings={"lora.r": 4})
    (put("bad", some(39), settings={"lora.r": 8}) / name).unlink()
    assert {row["run"] for row in board()} == {"good", "bad"}


def test_without_evaluations_runs_are_ranked_by_their_validation_loss(capsys: pytest.CaptureFixture[str]) -> None:
    put("a", losses=(3.0, 2.0))
    put("b", losses=(3.0, 1.0), settings={"lora.r": 8})
    assert [(row["run"], row["rank"]) for row in board()] == [("b", "1"), ("a", "2")]
    assert "best: b, val loss 1.0000; the val loss has no interval" in capsys.readouterr().out


@pytest.mark.parametrize("by", ["exactmatch", "mean_tokens", "1"])
def test_a_metric_that_ranks_nothing_is_named_with_those_that_do(by: str, capsys: pytest.CaptureFixture[str]) -> None:
    put("a", some(20))
    assert step.main(["--by", by]) == 2
    err = capsys.readouterr().err
    assert f"BY={by}" in err and "exact_match" in err and not CSV.exists()


def test_no_runs_is_the_users_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main([]) == 2
    assert "there are no runs to compare" in capsys.readouterr().err


# --- a sweep's record


def put_sweep(*runs: dict[str, Any], name: str = "rates") -> Path:
    path = Path("outputs/sweeps") / name / "sweep.json"
    empty = {
        "data": "demo",
        "config": "c.yaml",
        "variant": {},
        "seed": None,
        "step": "",
        "exit_code": None,
        "seconds": 1.0,
    }
    known = [{**empty, "attempts": 1, "last_lines": [], **run} for run in runs]
    files.write_json(path, {"name": name, "plan": f"configs/{name}-plan.yaml", "started": stamp.now(), "runs": known})
    return path


@pytest.mark.parametrize("given", ["rates", "configs/rates-plan.yaml", "somewhere/rates.yaml"])
def test_a_sweeps_runs_are_shown_with_its_states_and_failures(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    put("one", some(20), settings={"lora.r": 4})
    put("two", status="unfinished", ended="failed: x", settings={"lora.r": 8})
    put("of-another-sweep", some(39))
    put_sweep(
        {"run": "one", "state": "done"},
        {"run": "two", "state": "failed", "step": "train", "exit_code": 4, "attempts": 2, "last_lines": ["…", "error: out of memory", "hint: y"]},
        {"run": "three", "state": "waiting", "variant": {"lora.r": 16}, "seed": 7},
        {"run": "four", "state": "pruned", "step": "train"},
    )  # fmt: skip
    rows = {row["run"]: row for row in board("--sweep", given)}
    assert {run: row["state"] for run, row in rows.items()} == {
        "one": "trained",
        "two": "failed",
        "three": "waiting",
        "four": "pruned",
    }
    assert rows["three"]["lora.r"] == "16" and rows["three"]["data"] == "demo"
    assert rows["two"]["detail"] == "failed at train, exit code 4, 2 attempts: out of memory"
    assert "sweep rates: 4 runs" in capsys.readouterr().out
    assert "out of memory" in PAGE.read_text(encoding="utf-8")


def test_a_missing_sweep_is_named_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    put_sweep({"run": "one", "state": "done"})
    assert step.main(["--sweep", "rate"]) == 2
    err = capsys.readouterr().err
    assert "there is no sweep 'rate'" in err and "sweeps here: rates" in err


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"runs": 3}', '{"runs": [3]}', '{"runs": [{"run": null}]}'])
def test_a_damaged_sweep_is_refused_and_nothing_is_written(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    put_sweep().write_text(text)
    assert step.main(["--sweep", "rates"]) == 3
    assert "sweep.json" in capsys.readouterr().err and not CSV.exists()


def test_the_command_starts_without_torch() -> None:
    put("a", some(20))
    code = (
        "import sys; from scripts import leaderboard\n"
        "assert leaderboard.main([]) == 0\n"
        "loaded = {name for name, module in sys.modules.items() if module}  # environment.py hides some\n"
        "assert not {'torch', 'transformers', 'datasets', 'pandas'} & loaded\n"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- the table


@given(st.integers(20, 250), st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=4, unique=True))
def test_the_table_keeps_to_the_terminals_width(width: int, names: list[str]) -> None:
    entries = [
        Entry(
            name, "trained", base=name, settings={"style.text": name * 3, "lora.r": at}, scores={"val_loss": 1.0 + at}
        )
        for at, name in enumerate(names)
    ]
    made = leaderboard_table.arrange(entries, "", "title")
    chosen, left_out = leaderboard_table.fit(made, width)
    wide = sum(max(len(c.title), *(len(c.show(e)) for e in entries)) + 3 for c in chosen)
    assert wide <= width or len(chosen) == 2
    assert {"run"} <= {c.name for c in chosen}
    assert not {c.name for c in chosen} & {c.name for c in left_out}


# --- the page


def test_hostile_names_are_shown_and_never_run() -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    put("a", some(20), settings={"style.text": hostile}, status="unfinished", ended=f"failed: {hostile}")
    put("b", some(30), settings={"style.text": "x"})
    (put("c", some(30)).rename("outputs/<img src=x onerror=alert(1)>") / "report.html").write_text("x")
    put("d", some(30)).rename("outputs/<img src=y onerror=alert(2)>")
    board()
    text = PAGE.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<img" not in text
    assert text.count("<script") == 1 and "Content-Security-Policy" in text
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)


def test_a_run_with_a_report_is_a_link_to_it_from_wherever_the_page_lies() -> None:
    (put("a", some(20)) / "report.html").write_text("x")
    put("b", some(30), settings={"lora.r": 8})
    board()
    text = PAGE.read_text(encoding="utf-8")
    assert 'href="a/report.html"' in text and 'href="b/report.html"' not in text
    board("--html", "elsewhere/deep/page.html")
    assert 'href="../../outputs/a/report.html"' in Path("elsewhere/deep/page.html").read_text(encoding="utf-8")


def test_the_page_draws_every_run_through_what_differs_and_every_loss_curve() -> None:
    put("a", some(20), settings={"train.learning_rate": 1e-4})
    put("b", some(30), settings={"train.learning_rate": 1e-3})
    put("live", status="running", ended="running", settings={"train.learning_rate": 2e-3}, losses=(1.9,))
    board()
    text = PAGE.read_text(encoding="utf-8")
    axes = text[text.index('class="axes"') : text.index('id="curves"')]
    assert (
        axes.count("<path") == 4 and "train.learning_rate" in axes and "exact match ↑" in axes and "val loss ↓" in axes
    )
    drawn = text[text.index('id="curves"') :]
    assert "Validation loss by step of 3 runs; lowest 1, of b" in drawn or "lowest 1, of a" in drawn
    assert "Training loss by step of 3 runs" in drawn


numbers = st.floats(1e-9, 1e9) | st.integers(-1000, 1000) | st.booleans() | st.text(max_size=5) | st.none()


@given(st.lists(numbers, min_size=2, max_size=8))
def test_every_setting_has_a_place_on_its_axis(values: list[Any]) -> None:
    axis = leaderboard_plots._axis("lora.r", values)
    for place, value in zip(axis.places, values, strict=True):
        assert (place is None and value is None) or (place is not None and -1e-9 <= place <= 1 + 1e-9)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place, _ in axis.labels)


@given(st.lists(st.booleans(), min_size=10, max_size=60), st.integers(0, 5))
def test_two_runs_with_the_same_answers_never_have_a_winner(right: list[bool], seed: int) -> None:
    rows = [{"scores": {"tuned": {"exact_match": float(well)}}, "id": str(n)} for n, well in enumerate(right)]
    found = ranking.measure(rows, "exact_match")
    assert found is not None
    lead = ranking.intervals.bootstrap(found, found, 0.95)
    assert lead is not None and lead.low == lead.high == 0 and lead.changed == 0


@pytest.mark.parametrize("name", ["exact_match", "loss", "perplexity", "bleu", "chrf"])
def test_each_metric_is_measured_over_the_rows(name: str) -> None:
    put("a", some(20))
    rows = leaderboard_runs.samples("a", files.read_json(Path("outputs/a/eval/metrics.json")))
    found = ranking.measure(rows, name)
    assert found is not None and len(found.stats) == 40
    values = {"exact_match": 0.5, "loss": 0.5, "perplexity": 2.718281828459045**0.5}
    if name in values:
        assert found.value == pytest.approx(values[name])


# --- TensorBoard's HPARAMS page


def hparams_page(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """Settings and newest metric values by session, as TensorBoard's own backend reads them from the event files."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(TBContext(data_provider=provider, logdir=str(folder)))
    request = RequestContext()
    experiment = get_experiment.Handler(request, context, "", api_pb2.GetExperimentRequest()).run()
    sort = [api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos]
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=100, col_params=sort, allowed_statuses=[0, 1, 2, 3], include_metrics=True
    )
    found = list_session_groups.Handler(request, context, "", asked).run()
    settings, values = {}, {}
    for group in found.session_groups:
        settings[group.name] = {
            name: getattr(value, str(value.WhichOneof("kind"))) for name, value in group.hparams.items()
        }
        values[group.name] = {metric.name.tag: metric.value for metric in group.metric_values}
    return settings, values


def test_tensorboards_hparams_page_has_the_settings_and_results_of_ended_runs() -> None:
    put("a", some(20), settings={"lora.r": 4, "style.text": "be brief"})
    put("b", some(30), settings={"lora.r": 8, "train.packing": False})
    board()
    settings, values = hparams_page(Path("outputs"))
    assert (
        settings["a"]["lora.r"] == 4 and settings["a"]["style.text"] == "be brief" and settings["a"]["data"] == "demo"
    )
    assert settings["b"]["lora.r"] == 8 and settings["b"]["train.packing"] is False
    assert values["a"]["test/exact_match"] == 0.5 and values["b"]["test/exact_match"] == 0.75
    assert values["a"]["eval/best_loss"] == 1.0


def test_results_are_filled_in_once_and_again_only_after_another_evaluation() -> None:
    folder = put("a", some(20)) / "tensorboard"

    def now() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    board()
    first = now()
    assert len(first) == 2
    board()
    assert not hparams.fill("a") and now() == first
    put("a", some(30))
    assert hparams.fill("a")
    names = [name for name in now() if name.endswith(event_log.RESULTS)]
    assert len(names) == 1 and names[0] not in first
    assert hparams_page(Path("outputs"))[1]["a"]["test/exact_match"] == 0.75


def test_a_run_without_tensorboard_files_stays_without(capsys: pytest.CaptureFixture[str]) -> None:
    folder = put("a", some(20)) / "tensorboard"
    for path in folder.iterdir():
        path.unlink()
    assert not hparams.fill("a") and list(folder.iterdir()) == []
    assert json.loads((Path("outputs/a") / "backend.json").read_text())["status"] == "finished"


# --- the page in a browser


@pytest.mark.slow
def test_a_click_sorts_the_table_and_a_row_marks_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.utils import leaderboard_page
    from tests.test_report import CHROMIUM, browse

    if not CHROMIUM:
        pytest.skip("no Chromium here")
    for name, rate, count in (("a", 1e-3, 20), ("b", 2e-5, 39), ("c", 3e-4, 30)):
        put(name, some(count), settings={"train.learning_rate": rate})
    put("none", status="unfinished", ended="interrupted", settings={"train.learning_rate": 5e-1}, losses=())

    def order(html: str) -> list[str]:
        return re.findall(r'<span data-run="\d+">(\w+)</span>', html.split('id="table"')[1].split("</table>")[0])

    board()
    plain = browse(PAGE.absolute().as_uri())
    assert order(plain) == ["b", "c", "a", "none"] and '<th scope="col"><button type="button">run' in plain
    press = """
const click = text => [...document.querySelectorAll("th button")].find(one => one.textContent === text).click();
click("train.learning_rate"); click("%s");
document.querySelector('#table [data-run="2"]').dispatchEvent(new Event("focusin", { bubbles: true }));
"""
    page_script = leaderboard_page.BOARD_SCRIPT
    for title, wanted in (("steps", ["b", "c", "a", "none"]), ("train.learning_rate", ["none", "a", "c", "b"])):
        monkeypatch.setattr(leaderboard_page, "BOARD_SCRIPT", page_script + press % title)
        board()
        pressed = browse(PAGE.absolute().as_uri())
        assert order(pressed) == wanted, title
        assert re.findall(r'<path class="c2 chosen" data-run="2"', pressed) and 'class="dimmed"' in pressed


@pytest.mark.slow
def test_nothing_on_the_page_is_wider_than_a_phone() -> None:
    from tests.test_report import CHROMIUM, browse

    if not CHROMIUM:
        pytest.skip("no Chromium here")
    put("a" * 90, some(20), settings={"style.text": "w" * 300, "train.learning_rate": 1e-3})
    put("b" * 90, some(30), status="unfinished", ended="failed: " + "x" * 500)
    board()
    frame = Path("frame.html").absolute()
    frame.write_text(
        f'<p id="said"></p><iframe id="f" width="360" height="800" src="{PAGE.absolute().as_uri()}"></iframe>'
        "<script>f.onload = () => said.textContent = 'width ' + f.contentDocument.documentElement.scrollWidth + '.'</script>"
    )
    said = re.search(r"width (\d+)\.", browse(frame.as_uri(), "--allow-file-access-from-files"))
    assert said and int(said[1]) <= 360
