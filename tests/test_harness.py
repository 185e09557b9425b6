"""eval-harness: the run's own model through the real lm-evaluation-harness, without a hub, and one message for what is wrong."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import harness, merge
from scripts.utils import files, harness_tasks
from tests.commands import ROOT
from tests.commands import run as run_command
from tests.tiny_models import CHATS, RUN, enter_run

pytestmark = pytest.mark.slow  # most of them run a whole step


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="EXTRAS=harness")
    return enter_run(tmp_path, monkeypatch)


@pytest.fixture
def without_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    return enter_run(tmp_path, monkeypatch)


def ask(*flags: str) -> int:
    return harness.main(["--config", "c.yaml", *flags])


def found(which: str = "tuned") -> dict[str, Any]:
    return files.read_json(Path(f"outputs/{RUN}/eval/harness.json"))[which]


def value(task: str, key: str, which: str = "tuned") -> float:
    return found(which)[task]["results"][task][key]


def sums(path: str, count: int = 6) -> None:
    rows = [{"question": f"How much is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(count)]
    files.write_jsonl(Path(path), rows)


def test_the_runs_own_rows_are_answered_as_eval_answers_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("--tasks", "own_rows") == 0
    captured = capsys.readouterr()
    assert "own_rows" in captured.out and "exact_match" in captured.out and "1.0000" in captured.out
    assert value("own_rows", "exact_match,none") == 1.0
    assert ask("--tasks", "own_rows", "--which", "base", "--limit", "3") == 0
    assert value("own_rows", "exact_match,none", "base") == 0.0
    assert found("base")["own_rows"]["n-samples"]["own_rows"]["effective"] == 3
    assert value("own_rows", "exact_match,none") == 1.0, "the tuned model's results stay beside"
    assert found()["own_rows"]["chat_template"] is False
    assert str(Path.home()) not in Path(f"outputs/{RUN}/eval/harness.json").read_text()


def test_a_fully_tuned_model_is_taken_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="EXTRAS=harness")
    enter_run(tmp_path, monkeypatch, mode="full")
    assert ask("--tasks", "own_rows") == 0
    assert value("own_rows", "exact_match,none") == 1.0


def test_the_merged_model_is_taken_too(run: Path) -> None:
    assert merge.main(["--config", "c.yaml"]) == 0
    assert ask("--tasks", "own_rows", "--which", "merged") == 0
    assert value("own_rows", "exact_match,none", "merged") == 1.0


def test_own_rows_takes_a_file_of_chats_and_the_system_message_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="EXTRAS=harness")
    enter_run(tmp_path, monkeypatch, style=True)
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in CHATS
    ]
    files.write_jsonl(Path("chats.jsonl"), rows)
    assert ask("--tasks", "own_rows", "--input", "chats.jsonl") == 0
    assert value("own_rows", "exact_match,none") == 1.0
    files.write_jsonl(Path("chats.jsonl"), [{"prompt": "hello"}])
    assert ask("--tasks", "own_rows", "--input", "chats.jsonl") == 2


def test_word_problems_come_from_a_local_file(run: Path) -> None:
    sums("sums.jsonl")
    assert ask("--tasks", "gsm8k_jsonl", "--input", "sums.jsonl", "--limit", "4") == 0
    entry = found()["gsm8k_jsonl"]
    assert entry["chat_template"] is True
    assert entry["n-samples"]["gsm8k_jsonl"]["effective"] == 4
    assert {"exact_match,after-mark", "exact_match,last-number"} <= set(entry["results"]["gsm8k_jsonl"])


@pytest.mark.parametrize(
    ("answer", "marked", "last"),
    [
        ("1 + 1 = 2\n#### 2", 1.0, 1.0),
        ("It is 2.", 0.0, 1.0),
        ("#### $2.00", 1.0, 1.0),
        ("2 or 3", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_two_ways_of_reading_a_number(answer: str, marked: float, last: float, tmp_path: Path) -> None:
    """The task file's own filters and metric, by the harness's code, on answers that a model could give."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="EXTRAS=harness")
    from lm_eval.api.instance import Instance

    files.write_jsonl(tmp_path / "rows.jsonl", [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}])
    source = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    spec = {**harness_tasks.read("gsm8k_jsonl"), "dataset_kwargs": source}
    task = tasks.TaskManager(include_defaults=False).load([spec])["tasks"]["gsm8k_jsonl"]
    doc = task.test_docs()[0]
    asked = Instance(request_type="generate_until", doc=doc, arguments=(), idx=0, metadata=("gsm8k_jsonl", 0, 1))
    asked.resps = [answer]
    task._instances = [asked]
    task.apply_filters()
    read = {name: task.process_results(doc, [text])["exact_match"] for name, text in asked.filtered_resps.items()}
    assert read == {"after-mark": marked, "last-number": last}


def test_a_task_whose_data_is_on_the_hub_says_so_without_a_hub(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("--tasks", "arc_easy", "--limit", "2") == 4
    err = capsys.readouterr().err
    assert "arc_easy" in err and "hub" in err and "Traceback" not in err
    assert not Path(f"outputs/{RUN}/eval/harness.json").exists()


def test_a_missing_extra_names_the_command(without_extra: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("--tasks", "own_rows") == 4
    assert "make install EXTRAS=harness" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no tasks are named"),
        (["--tasks", "own_rwos"], "did you mean own_rows"),
        (["--tasks", "own_rows", "--run", "nope"], "there is no run 'nope'"),
        (["--tasks", "own_rows", "--which", "best"], "choose tuned, base or merged"),
        (["--tasks", "own_rows", "--which", "merged"], "has no merged model"),
        (["--tasks", "own_rows", "--split", "tset"], "eval.split"),
        (["--tasks", "gsm8k_jsonl"], "INPUT=rows.jsonl"),
        (["--tasks", "gsm8k_jsonl", "--input", "none.jsonl"], "none.jsonl"),
        (["--tasks", "gsm8k_jsonl", "--input", "empty.jsonl"], "has no rows"),
        (["--tasks", "gsm8k_jsonl", "--input", "other.jsonl"], "row 2 has no answer"),
        (["--tasks", "gsm8k_jsonl", "--input", "broken.jsonl"], "broken.jsonl:1: not valid JSON"),
        (["--tasks", "gsm8k_jsonl", "--input", "latin.jsonl"], "not UTF-8"),
        (["--tasks", "own_rows gsm8k_jsonl", "--input", "other.jsonl"], "one after the other"),
    ],
)
def test_what_the_user_can_get_wrong_is_one_message(
    flags: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sums("sums.jsonl")
    Path("empty.jsonl").write_text("")
    Path("other.jsonl").write_text('{"question": "a", "answer": "1"}\n{"question": "b"}\n')
    Path("broken.jsonl").write_text("{oops\n")
    Path("latin.jsonl").write_bytes(json.dumps({"question": "a"}).encode() + b"\xff\n")
    assert ask(*flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert not Path(f"outputs/{RUN}/eval/harness.json").exists()


def test_input_for_a_task_that_reads_none_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sums("sums.jsonl")
    assert ask("--tasks", "arc_easy", "--input", "sums.jsonl") == 2
    assert "none of the tasks reads it" in capsys.readouterr().err


def test_every_task_file_here_is_whole_and_bears_its_name() -> None:
    assert {"own_rows", "gsm8k_jsonl"} <= set(harness_tasks.local())
    for name in harness_tasks.local():
        assert harness_tasks.read(name)["task"] == name


def test_make_hands_the_tasks_over(tmp_path: Path) -> None:
    done = run_command(["make", "eval-harness", "TASKS=own_rows", "RUN=nope"], ROOT)
    assert done.returncode != 0
    assert "there is no run 'nope'" in done.stderr
