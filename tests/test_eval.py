"""What eval promises, on a run whose base gives wrong answers and whose adapter was taught the right ones."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import eval as eval_step
from scripts import process, render, train
from scripts.utils import comparison, evaluation, files, hparams, metrics, stages, stamp
from scripts.utils.answer_cache import AnswerCache
from scripts.utils.config import load_config
from scripts.utils.schema import Config
from tests.commands import ROOT, environment
from tests.tiny_models import CHATS, RUN, enter_run

pytestmark = pytest.mark.slow  # each test runs a whole step of its own


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter_run(tmp_path, monkeypatch)


def evaluate(*flags: str) -> int:
    return eval_step.main(["--config", "c.yaml", *flags])


def found() -> dict[str, Any]:
    return files.read_json(Path(f"outputs/{RUN}/eval/metrics.json"))


def sample_rows() -> list[dict[str, Any]]:
    return list(files.read_jsonl(Path(f"outputs/{RUN}/eval/samples.jsonl")))


def rewrite_split(split: str, numbers: range | tuple[int, ...]) -> None:
    """Replace a split's rows by some of the train rows, as a later render would have done."""
    folder = stages.folder("render", "demo")
    rows = list(files.read_jsonl(folder / "train.jsonl"))
    files.write_jsonl(folder / f"{split}.jsonl", [rows[n] for n in numbers])
    stages.write_manifest(folder, "render", {}, {})


def own_today() -> None:
    """Make the stamp say that the run was trained on the rows that lie here now."""
    facts = stamp.require(RUN)
    facts["data"]["hash"] = stages.data_hash(stages.read_manifest(stages.folder("render", "demo")) or {})
    stamp.write(RUN, facts)


def test_tuned_answers_are_scored_apart_from_base_answers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompt is no part of an answer: counted in, exact match could only be 0."""
    assert evaluate() == 0
    base, tuned = found()["base"], found()["tuned"]
    assert (base["exact_match"], tuned["exact_match"]) == (0.0, 1.0)
    assert (base["json_exact"], tuned["json_exact"]) == (0.0, 1.0)
    assert tuned["rouge_l"] == 1.0 > base["rouge_l"]
    assert tuned["loss"] < 0.2 < 2.0 < base["loss"]
    assert tuned["perplexity"] == pytest.approx(2.718281828 ** tuned["loss"], rel=1e-6)
    assert tuned["hit_limit"] == 0.0
    for row, (_, answer) in zip(sample_rows(), CHATS, strict=False):
        assert row["tuned"] == row["reference"] == answer != row["base"]
        assert (row["base_exact"], row["tuned_exact"]) == (False, True)
        assert row["prompt"].endswith("<|im_start|>assistant\n")
    out = capsys.readouterr().out
    assert "exact match" in out and "100.0 %" in out and "metrics.json" in out


def test_base_scores_are_those_of_the_base_model_loaded_alone(run: Path) -> None:
    from scripts.utils.trained import load_trained

    assert evaluate() == 0
    rows = list(files.read_jsonl(stages.folder("render", "demo") / "test.jsonl"))
    with AnswerCache(run / "other.jsonl") as cache:
        base = load_trained(RUN, which="base")
        alone = evaluation.evaluate(base, "base", rows, load_config("c.yaml").eval, cache)
    assert sum(alone.losses) / sum(alone.tokens) == pytest.approx(found()["base"]["loss"], rel=1e-5)
    assert [answer.text for answer in alone.answers] == [row["base"] for row in sample_rows()]


def test_a_fully_tuned_run_is_compared_with_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_run(tmp_path, monkeypatch, mode="full")
    assert evaluate() == 0
    assert (found()["base"]["exact_match"], found()["tuned"]["exact_match"]) == (0.0, 1.0)


def test_the_same_evaluation_is_not_run_twice(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate() == 0
    first = found()
    assert evaluate() == 0
    second = capsys.readouterr()
    assert "up to date" in second.err and "exact match" in second.out
    assert found() == first
    assert evaluate("--set", "eval.max_new_tokens=1") == 0
    assert found()["identity"] != first["identity"]
    assert found()["tuned"]["hit_limit"] == 1.0
    assert found()["tuned"]["exact_match"] == 0.0
    Path(f"outputs/{RUN}/eval/samples.jsonl").write_text("{}\n")
    capsys.readouterr()
    assert evaluate("--set", "eval.max_new_tokens=1") == 0
    assert "up to date" not in capsys.readouterr().err
    assert evaluate("--set", "eval.max_new_tokens=1", "--force") == 0
    assert "up to date" not in capsys.readouterr().err


def test_other_weights_are_evaluated_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    assert evaluate("--limit", "1") == 0
    before = found()["tuned"]["loss"]
    weights = Path(f"adapters/{RUN}/adapter_model.safetensors")
    save_file({name: value * 0.5 for name, value in load_file(weights).items()}, weights)
    assert evaluate("--limit", "1") == 0
    assert "up to date" not in capsys.readouterr().err
    assert found()["tuned"]["loss"] > before + 0.01


def test_metrics_that_cannot_be_computed_are_null_with_a_reason(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--split", "val") == 0  # the val rows hold no JSON
    assert found()["tuned"]["json_valid"] is None
    assert "JSON" in found()["reasons"]["json_valid"]
    captured = capsys.readouterr()
    assert (
        "JSON" not in captured.out and "no JSON parses, JSON equal, JSON keys: no reference is a JSON" in captured.err
    )
    assert evaluate("--set", "eval.generate=false") == 0
    assert found()["tuned"]["exact_match"] is None
    assert found()["tuned"]["loss"] < 0.2
    assert "eval.generate" in found()["reasons"]["exact_match"]


def test_an_empty_test_split_falls_back_to_val_and_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite_split("test", ())
    own_today()
    assert evaluate() == 0
    assert found()["settings"]["split"] == "val"
    assert "no test rows" in capsys.readouterr().err


def test_no_rows_to_evaluate_is_the_users_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite_split("test", ())
    rewrite_split("val", ())
    assert evaluate() == 2
    assert "neither test nor val rows" in capsys.readouterr().err
    assert evaluate("--split", "val") == 2
    shutil.rmtree("data/rendered/demo")
    assert evaluate() == 2
    assert str(Path("data/rendered/demo").absolute()) in capsys.readouterr().err
    assert not Path(f"outputs/{RUN}/eval").exists()


def test_rows_other_than_the_run_was_trained_on_are_warned_about_by_both_hashes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    then = stamp.require(RUN)["data"]["hash"]
    rewrite_split("test", (0, 1))
    now = stages.data_hash(stages.read_manifest(stages.folder("render", "demo")) or {})
    assert evaluate("--set", "eval.generate=false") == 0
    err = capsys.readouterr().err
    assert "warning" in err and then[:12] in err and now[:12] in err


def test_limits_choose_how_many_rows(run: Path) -> None:
    def rows(*flags: str) -> int:
        assert evaluate("--set", "eval.generate=false eval.quick_limit=2 eval.limit=3", *flags) == 0
        return found()["settings"]["rows"]

    assert rows() == 3
    assert rows("--quick") == 2
    assert rows("--full") == 4
    assert rows("--limit", "1") == 1


def test_a_missing_adapter_is_an_error_that_names_its_path_not_the_base_model(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(f"adapters/{RUN}")
    assert evaluate() == 2
    assert str(Path(f"adapters/{RUN}").absolute()) in capsys.readouterr().err
    assert not Path(f"outputs/{RUN}/eval").exists()


def test_an_unknown_run_names_the_runs_there_are(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--run", "nope") == 2
    err = capsys.readouterr().err
    assert "nope" in err and f"runs here: {RUN}" in err


def test_metrics_file_is_strict_json_even_without_a_finite_loss() -> None:
    scores, measures = comparison.loss_scores([float("nan"), 1.0], [4, 1])
    assert scores["loss"].value is scores["perplexity"].value is None and not measures
    assert comparison.loss_scores([5000.0], [5])[0]["perplexity"].value is None
    assert comparison.loss_scores([0.0], [0])[0]["loss"].reason == "no token carries loss"
    json.dumps({name: score.value for name, score in scores.items()}, allow_nan=False)


# --- intervals and rows


def many_rows(count: int) -> None:
    """A test split of ``count`` rows: the first chat with other parcels, which the tuned model has not learnt."""
    folder = stages.folder("render", "demo")
    first = next(files.read_jsonl(folder / "train.jsonl"))
    rows = [
        {**first, "id": f"{number + 100:064x}", "text": first["text"].replace("Parcel 12", f"Parcel {number + 10}")}
        for number in range(count)
    ]
    files.write_jsonl(folder / "test.jsonl", rows)
    stages.write_manifest(folder, "render", {}, {})
    own_today()


def test_differences_have_intervals_and_only_clear_ones_a_verdict(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many_rows(24)
    assert evaluate() == 0
    figures = found()
    assert set(figures["intervals"]) == set(figures["verdict"]) == set(metrics.METRICS)
    loss = figures["intervals"]["loss"]
    assert loss["low"] < figures["tuned"]["loss"] - figures["base"]["loss"] < loss["high"] < 0
    assert (loss["level"], loss["rows"], loss["resamples"]) == (0.95, 24, 2000)
    assert figures["verdict"]["loss"] == figures["verdict"]["perplexity"] == "better"
    assert figures["verdict"]["hit_limit"] == "no clear change"
    out = capsys.readouterr().out
    assert "95 % interval" in out and "better" in out and "no clear change" in out and "tokens/s" in out


def test_too_few_rows_have_no_interval_and_say_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate() == 0
    assert set(found()["intervals"].values()) == {None}
    assert set(found()["verdict"].values()) == {"unknown"}
    captured = capsys.readouterr()
    assert "at least 10 rows" in captured.err and "better" not in captured.out


def test_each_row_brings_its_scores_for_the_report(run: Path) -> None:
    assert evaluate() == 0
    figures, rows = found(), sample_rows()
    assert figures["headline"] == "json_keys"
    assert figures["json_keys"]["city"] == {"rows": 3, "base": 0.0, "tuned": 1.0}
    assert set(figures["speed"]["tuned"]) == {"tokens_per_second", "seconds_per_answer"}
    assert figures["warnings"] == []
    names = {metrics.row_name(name) for name in metrics.METRICS} - {"perplexity"}
    for row in rows:
        assert set(row["scores"]["base"]) == set(row["scores"]["tuned"]) == names
    assert [row["scores"]["tuned"]["json_keys"] for row in rows] == [1.0, 1.0, 1.0, None]
    for name in ("exact_match", "f1", "rouge_l", "hit_limit"):
        values = [row["scores"]["base"][name] for row in rows]
        assert sum(values) / len(values) == pytest.approx(figures["base"][name])


def test_the_metric_that_rows_are_ranked_by_can_be_chosen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--set", "eval.headline=f1") == 0
    assert found()["headline"] == "f1"
    assert evaluate("--set", "eval.headline=number_match") == 0
    assert found()["headline"] == "json_keys"
    assert "number_match has no value" in found()["warnings"][0]
    assert "number_match has no value" in capsys.readouterr().err
    assert evaluate("--set", "eval.headline=blue") == 2
    assert "eval.headline" in capsys.readouterr().err


def test_loss_is_the_trainers_own_val_loss(project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.utils import environment as prepared

    monkeypatch.setattr(prepared, "_HEAVY", ())
    project(rows=60)
    config = load_config("tiny.yaml")
    for module in (process, render, train):
        module.work(module.build_parser().parse_args(["--config", "tiny.yaml"]), config)
    last = [e["eval_loss"] for e in files.read_jsonl(Path("outputs/tiny-sums/metrics.jsonl")) if "eval_loss" in e][-1]
    words = ["--config", "tiny.yaml", "--split", "val", "--set", "eval.max_new_tokens=4"]
    assert eval_step.main(words) == 0
    figures = files.read_json(Path("outputs/tiny-sums/eval/metrics.json"))
    assert figures["settings"]["rows"] > 2
    assert figures["tuned"]["loss"] == pytest.approx(last, rel=1e-5)
    assert figures["tuned"]["perplexity"] == pytest.approx(2.718281828**last, rel=1e-5)
    assert figures["base"]["loss"] > figures["tuned"]["loss"]


# --- going on


def lasting() -> tuple[Any, Any]:
    """What must be the same to the last digit, whenever and however often it is computed."""
    changing = ("speed", "seconds", "at", "identity", "samples_sha256")
    return {key: value for key, value in found().items() if key not in changing}, sample_rows()


def cache_lines() -> list[dict[str, Any]]:
    path = Path(f"outputs/{RUN}/eval/answers.jsonl")
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_evaluation_goes_on_and_ends_in_the_same_figures(
    run: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    many_rows(40)
    words = [sys.executable, str(ROOT / "scripts" / "eval.py"), "--config", "c.yaml"]
    cache = Path(f"outputs/{RUN}/eval/answers.jsonl")
    child = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not (cache.is_file() and cache.read_bytes().count(b'"text"') >= 6):
        time.sleep(0.002)
    child.send_signal(number)
    _, err = child.communicate()
    assert child.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], err
    assert not Path(f"outputs/{RUN}/eval/metrics.json").exists()
    before = cache_lines()
    assert 6 <= sum("text" in line for line in before) < 80

    assert evaluate() == 0
    assert "answers are there from before" in capsys.readouterr().err
    assert cache_lines()[: len(before)] == before
    keys = [line["key"] for line in cache_lines()]
    assert len(keys) == len(set(keys)) == 2 * 40 * 2  # losses and answers of both sides, none of them twice
    resumed = lasting()
    assert evaluate("--force") == 0
    assert lasting() == resumed


def test_answers_from_the_cache_need_no_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_rows(12)
    assert evaluate() == 0
    first = lasting(), found()["speed"]
    Path(f"outputs/{RUN}/eval/metrics.json").unlink()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(evaluation, "generate", refuse)
    monkeypatch.setattr(evaluation, "losses_in_row", refuse)
    assert evaluate() == 0
    assert (lasting(), found()["speed"]) == first


def test_a_new_adapter_is_asked_again_and_the_base_is_not(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert evaluate() == 0
    before = cache_lines()
    weights = Path(f"adapters/{RUN}/adapter_model.safetensors")
    save_file({name: value * 0.5 for name, value in load_file(weights).items()}, weights)
    assert evaluate() == 0
    new = cache_lines()[len(before) :]
    assert {line["side"] for line in new} == {"tuned"}
    assert len(new) == 8


def test_texts_do_not_depend_on_the_batch_in_fp32(run: Path) -> None:
    many_rows(10)
    texts = []
    for size in (1, 3, 64):
        assert evaluate("--set", f"eval.batch_size={size}") == 0
        texts.append([(row["base"], row["tuned"]) for row in sample_rows()])
        assert not [text for text in found()["warnings"] if "batch" in text]
    assert texts[0] == texts[1] == texts[2]


def test_in_16_bits_it_is_said_that_texts_depend_on_the_batch(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = stamp.require(RUN)
    facts["precision"]["actual"] = "bf16"
    stamp.write(RUN, facts)
    assert evaluate("--limit", "2") == 0
    assert found()["model"]["precision"] == "bf16"
    assert "share its batch" in found()["warnings"][0]
    capsys.readouterr()
    assert evaluate("--limit", "2") == 0
    assert capsys.readouterr().err.count("share its batch") == 1


# --- what goes wrong leaves earlier results as they were


def test_two_evaluations_of_a_run_at_once_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with files.file_lock(Path(f"outputs/{RUN}/eval/.lock"), wait_seconds=0, what="x"):
        assert evaluate() == 3
    assert "in use by another process" in capsys.readouterr().err
    assert evaluate() == 0


def test_a_full_disk_is_one_message_and_the_earlier_figures_stay(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate() == 0
    before = Path(f"outputs/{RUN}/eval/metrics.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert evaluate("--set", "eval.max_new_tokens=3") == 4
    err = capsys.readouterr().err
    assert "the disk is full" in err and "answers.jsonl" in err and "Traceback" not in err
    assert Path(f"outputs/{RUN}/eval/metrics.json").read_bytes() == before
    assert evaluate("--set", "eval.max_new_tokens=3") == 0


def test_an_adapter_of_another_base_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    assert evaluate() == 0
    before = Path(f"outputs/{RUN}/eval/metrics.json").read_bytes()
    weights = Path(f"adapters/{RUN}/adapter_model.safetensors")
    kept = load_file(weights)
    save_file({name: value[:, :-4].contiguous() for name, value in kept.items()}, weights)
    assert evaluate() == 3
    assert "of another base" in capsys.readouterr().err
    save_file(kept, weights)
    facts = stamp.require(RUN)
    facts["model"]["path_hash"] = "0" * 64
    stamp.write(RUN, facts)
    assert evaluate() == 3
    assert "not the one this run was trained on" in capsys.readouterr().err
    assert Path(f"outputs/{RUN}/eval/metrics.json").read_bytes() == before


def test_an_unknown_split_is_the_users_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--split", "tset") == 2
    assert "eval.split" in capsys.readouterr().err


def test_a_named_run_brings_its_own_settings_and_a_named_config_wins(run: Path) -> None:
    """Else what a newcomer types after a first run would evaluate it by another config's settings, and take far longer."""
    hparams.write_config(
        stamp.run_folder(RUN), Config.model_validate({"eval": {"limit": 2, "max_new_tokens": 7}}).model_dump()
    )

    def settings(*words: str) -> tuple[int, int]:
        assert eval_step.main(["--run", RUN, *words]) == 0
        used = found()["settings"]
        return used["rows"], used["max_new_tokens"]

    assert settings() == (2, 7)
    assert settings("--limit", "1") == (1, 7)
    assert settings("--config", "c.yaml", "--limit", "1") == (1, 24)
    assert eval_step.main(["--run", "../elsewhere"]) == 2
