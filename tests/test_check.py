"""check tells the truth, in its lines and in its exit code; clean removes only what can be made again."""

import fcntl
import json
import sys
from pathlib import Path

import pytest

from scripts import check
from scripts.utils.findings import Finding
from scripts.utils.hardware import Hardware
from tests import commands
from tests.commands import ROOT, script
from tests.planted import Environment

CONFIG = f"include: {ROOT / 'configs' / 'base.yaml'}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    (raw / "rows.jsonl").write_text('{"question": "a?", "answer": "b"}\n')
    return tmp_path


def lines(text: str) -> dict[str, str]:
    """State by topic, the worst where a topic has several lines."""
    order = ["ok", "warning", "error"]
    states: dict[str, str] = {}
    for words in (line.split() for line in text.splitlines()):
        if words and words[0] in order:
            states[words[1]] = max(states.get(words[1], "ok"), words[0], key=order.index)
    return states


def findings(settings: str) -> list[Finding]:
    """What check says of run.yaml and the device, less what runs in child processes."""
    arguments = check.build_parser().parse_args(["--config", "run.yaml", "--set", settings])
    config, found = check.load(arguments, set())
    if config:
        found += check.on_device(arguments, config, Hardware("cpu", "a CPU", 16 * 2**30))
    return found


@pytest.mark.slow
def test_check_says_each_line_and_the_mend_below_it(folder):
    done = script("check", "--config", "run.yaml", "--set", "train.precision=fp16", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    states = lines(done.stdout)
    topics = "python system packages torch disk memory access device attention bitsandbytes hub token config precision plan run data rendered rows backend"
    assert [topic for topic in topics.split() if topic not in states] == []
    assert "error" not in states.values() and states["precision"] == "warning"
    at = next(number for number, line in enumerate(done.stdout.splitlines()) if "fp16 was asked for" in line)
    assert done.stdout.splitlines()[at + 1].strip().startswith("precision-changed: SET=")


def test_check_says_which_backend_will_run_and_why(folder, tiny_model, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "unsloth", None)  # as where it is not installed
    model = f"model.name={tiny_model}"
    assert [f for f in findings(model) if f.topic == "backend"] == []  # transformers says, in a child process
    asked = f"{model} tuning.backend=unsloth"
    (fallen,) = [f for f in findings(asked) if f.topic == "backend"]
    assert fallen.state == "warning" and "not installed; bitsandbytes will run" in fallen.text
    assert fallen.hint == "make install EXTRAS=unsloth"
    (never,) = [f for f in findings(f"{asked} tuning.fallback=never") if f.topic == "backend"]
    assert never.code == 4 and "nothing will run" in never.text


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["model.attention=eager", "model.attention=eager tuning.backend=unsloth"])
def test_check_says_the_attention_that_will_run_also_after_a_fallback(folder, tmp_path, settings):
    planted = Environment(tmp_path / "environment")
    planted.without("unsloth")
    words = [planted.python, ROOT / "scripts" / "check.py", "--config", "run.yaml", "--set", settings]
    done = commands.run(words, folder)
    assert "attention eager: model.attention is eager" in done.stdout, done.stdout


@pytest.mark.slow
def test_check_fails_on_missing_data(folder):
    (folder / "data" / "raw" / "rows.jsonl").unlink()
    done = script("check", "--config", "run.yaml", cwd=folder)
    assert done.returncode == 2
    assert lines(done.stdout)["data"] == "error"
    assert done.stderr.splitlines()[-1] == "sft-check: exit code 2"


@pytest.fixture
def worked(folder: Path) -> Path:
    """A folder after some work: derived data, runs in every state, an adapter, caches."""
    for name in ("processed/a", "processed_with_style/a", "rendered/a"):
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "train.jsonl").write_text("{}\n")
        (folder / "data" / name / "manifest.json").write_text("{}")
    (folder / "data" / "processed" / "mine").mkdir()
    (folder / "data" / "processed" / "mine" / "notes.txt").touch()
    (folder / "data" / "processed" / ".gitkeep").touch()
    for run, status in {"done": "finished", "resumable": "unfinished", "failed": "running", "going": "running"}.items():
        (folder / "outputs" / run).mkdir(parents=True)
        (folder / "outputs" / run / "backend.json").write_text(json.dumps({"status": status}))
        (folder / "outputs" / run / ".lock").touch()
    (folder / "outputs" / "resumable" / "checkpoint-5").mkdir()
    (folder / "outputs" / "my notes").mkdir()
    (folder / "adapters" / "done").mkdir(parents=True)
    (folder / "adapters" / "done" / "sft-adapter.json").write_text("{}")
    (folder / "adapters" / "thesis").mkdir()
    (folder / "adapters" / "thesis" / "thesis.txt").touch()
    (folder / "outputs" / ".trackio").mkdir()
    (folder / "outputs" / "leaderboard.html").touch()
    (folder / ".ruff_cache").mkdir()
    (folder / "scripts" / "__pycache__").mkdir(parents=True)
    (folder / ".cache" / "models" / "m").mkdir(parents=True)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (elsewhere / "manifest.json").write_text("{}")
    (folder / "data" / "rendered" / "linked").symlink_to(elsewhere)
    return folder


def there(folder: Path, *names: str) -> list[bool]:
    return [(folder / name).exists() for name in names]


def test_clean_removes_only_what_can_be_made_again_and_says_what(worked):
    with (worked / "outputs" / "going" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = script("clean", cwd=worked)
        assert script("clean", cwd=worked).stdout == "clean: nothing to remove\n"
    assert done.returncode == 0, done.stderr
    gone = [
        "data/processed/a",
        "data/processed_with_style/a",
        "data/rendered/a",
        "data/rendered/linked",
        "outputs/failed",
    ]
    gone += [".ruff_cache", "scripts/__pycache__", "outputs/leaderboard.html"]
    assert there(worked, *gone) == [False] * len(gone)
    assert [name for name in gone if f"removed {name}" not in done.stdout] == []
    kept = ["data/raw/rows.jsonl", "data/processed/.gitkeep", "outputs/done", "outputs/resumable", "outputs/going"]
    kept += ["outputs/my notes", "adapters/done", "elsewhere/precious", ".cache/models/m"]
    kept += ["data/processed/mine/notes.txt", "adapters/thesis/thesis.txt", "outputs/.trackio"]
    assert there(worked, *kept) == [True] * len(kept)
    assert "kept outputs/resumable" in done.stderr and "kept outputs/going" in done.stderr


def test_clean_all_refuses_without_an_answer_and_removes_nothing(worked):
    before = sorted(worked.rglob("*"))
    done = script("clean", "--all", cwd=worked)
    assert done.returncode == 2
    assert sorted(worked.rglob("*")) == before


def test_clean_all_with_yes_leaves_raw_data_and_a_run_that_goes_on(worked):
    with (worked / "outputs" / "going" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = script("clean", "--all", cwd=worked, SFT_YES="1")
    assert done.returncode == 0, done.stderr
    assert (
        there(worked, "outputs/done", "outputs/resumable", "outputs/.trackio", "adapters/done", ".cache/models")
        == [False] * 5
    )
    assert there(worked, "data/raw/rows.jsonl", "outputs/going", "outputs/my notes") == [True] * 3
