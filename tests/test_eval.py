"""What eval promises, on a run whose base gives wrong answers and whose adapter was taught the right ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from scripts import eval as eval_step
from scripts.utils import evaluation, files, stages, stamp
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
    from scripts.utils.config import load_config
    from scripts.utils.trained import load_trained

    assert evaluate() == 0
    rows = list(files.read_jsonl(stages.folder("render", "demo") / "test.jsonl"))
    alone = evaluation.evaluate(load_trained(RUN, which="base"), "base", rows, load_config("c.yaml"))
    assert alone.scores["loss"].value == pytest.approx(found()["base"]["loss"], rel=1e-5)
    assert [answer.text for answer in alone.generated] == [row["base"] for row in sample_rows()]


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
    assert "–" in captured.out and "no JSON parses, JSON equal: no reference is a JSON" in captured.err
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
    scores = evaluation.loss_scores(float("nan"), 5)
    assert scores["loss"].value is scores["perplexity"].value is None
    assert evaluation.loss_scores(5000.0, 5)["perplexity"].value is None
    assert evaluation.loss_scores(0.0, 0)["loss"].reason == "no token carries loss"
    json.dumps({name: score.value for name, score in scores.items()}, allow_nan=False)
