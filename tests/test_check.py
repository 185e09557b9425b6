"""check tells the truth, in its lines and in its exit code; clean removes only what can be made again."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import check
from tests.commands import ROOT, environment, script

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
    order = ["ok", "warning", "failed"]
    states: dict[str, str] = {}
    for words in (line.split() for line in text.splitlines()):
        if words and words[0] in order:
            states[words[1]] = max(states.get(words[1], "ok"), words[0], key=order.index)
    return states


def test_check_is_content_with_a_good_config_and_data(folder):
    done = script("check", "--config", "run.yaml", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    states = lines(done.stdout)
    assert set(states) == {"python", "packages", "disk", "memory", "device", "config", "backend", "data"}
    assert "failed" not in states.values()


def test_check_fails_on_a_wrong_config_with_the_users_code(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (finding,) = check.check_config("run.yaml", "train.lrr=1")
    assert (finding.topic, finding.code) == ("config", 2)
    assert "train.learning_rate" in finding.text


def test_check_says_which_backend_and_attention_will_run_and_why(folder, tiny_model, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "unsloth", None)  # as where it is not installed
    model = f"model.name={tiny_model}"
    (plain,) = [f for f in check.check_config("run.yaml", model) if f.topic == "backend"]
    assert "bitsandbytes, attention sdpa" in plain.text and plain.state == "ok"
    (eager,) = [f for f in check.check_config("run.yaml", f"{model} model.attention=eager") if f.topic == "backend"]
    assert "attention eager: model.attention is eager" in eager.text
    asked = f"{model} tuning.backend=unsloth"
    fallen, attention = [f for f in check.check_config("run.yaml", asked) if f.topic == "backend"]
    assert fallen.state == "warning" and "not installed; bitsandbytes will run" in fallen.text
    assert fallen.hint == "make install EXTRAS=unsloth" and "attention sdpa" in attention.text
    (never,) = [f for f in check.check_config("run.yaml", f"{asked} tuning.fallback=never") if f.topic == "backend"]
    assert never.code == 4 and "nothing will run" in never.text


def test_check_fails_on_missing_data(folder):
    (folder / "data" / "raw" / "rows.jsonl").unlink()
    done = script("check", "--config", "run.yaml", cwd=folder)
    assert done.returncode == 2
    assert lines(done.stdout)["data"] == "failed"
    assert done.stderr.splitlines()[-1] == "sft-check: exit code 2"


def test_check_works_without_any_package_and_says_what_is_missing(folder):
    words = [sys.executable, "-S", str(ROOT / "scripts" / "check.py")]  # -S: no site-packages
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert lines(done.stdout)["packages"] == "failed"
    assert "torch" in done.stdout and "make install" in done.stdout


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
