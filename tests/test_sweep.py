"""A sweep at work: its state, its places, its budget, and what becomes of it when it is killed. Runs real data steps."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.utils import files, growing, sweep_places, sweep_state
from tests.commands import ROOT, environment, run, script
from tests.terminal import Terminal
from tests.test_batch import CONFIG, write_rows

SWEEP = Path("outputs/sweeps/plan/sweep.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three data sets and a plan that only processes them, with a config."""
    for name in "abc":
        write_rows(tmp_path / "data" / "raw" / f"{name}.jsonl")
    (tmp_path / "one.yaml").write_text(CONFIG)
    write_plan(tmp_path)
    return tmp_path


def write_plan(
    folder: Path, more: str = "", data: str = "data/raw/a.jsonl, data/raw/b.jsonl, data/raw/c.jsonl"
) -> None:
    (folder / "plan.yaml").write_text(f"data: [{data}]\nconfigs: one.yaml\nsteps: [process]\n{more}")


def state_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SWEEP).read_text())


def states(folder: Path) -> dict[str, str]:
    return {entry["run"]: entry["state"] for entry in state_of(folder)["runs"]}


@pytest.fixture
def started(folder: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start the sweep beside the test; ended with it."""
    processes = []

    def start(*words: str, **extra: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, ROOT / "scripts" / "batch.py", "plan.yaml", *words],
            cwd=folder,
            env=environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return found


def steps_at_work(process: "subprocess.Popen[Any]") -> list[psutil.Process]:
    """Children of the sweep that have become a step."""
    found = []
    for child in psutil.Process(process.pid).children():
        try:
            if any("process.py" in word for word in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def test_the_state_says_of_each_run_what_the_leaderboard_needs(folder: Path) -> None:
    (folder / "data" / "raw" / "b.jsonl").write_text('{"neither": 1}\n')
    write_plan(folder, "grid: {train.lr: [1e-3]}\nseeds: [5]\n")
    done = script("batch", "plan.yaml", cwd=folder)
    assert done.returncode == 2, done.stderr
    state = state_of(folder)
    assert (state["name"], state["plan"]) == ("plan", "plan.yaml") and state["started"]
    well, failed, _ = state["runs"]
    assert well["run"] == "one-a-lr0.001-seed5" and well["state"] == "done" and well["exit_code"] == 0
    assert (well["data"], well["config"], well["seed"]) == ("data/raw/a.jsonl", "one.yaml", 5)
    assert well["variant"] == {"train.learning_rate": 0.001}
    assert (failed["state"], failed["step"], failed["exit_code"], failed["attempts"]) == ("failed", "process", 2, 1)
    assert failed["seconds"] > 0 and any("b.jsonl" in line for line in failed["last_lines"])
    # and the person sees the same
    assert "2 of 3 runs ended well" in done.stdout and failed["last_lines"][0] in done.stdout
    assert done.stderr.splitlines()[-1] == "sft-batch: exit code 2"


def test_no_token_of_the_environment_gets_into_the_state(folder: Path) -> None:
    secret = "hf_" + "a1B2" * 8
    (folder / "data" / "raw" / "a.jsonl").write_text(json.dumps({secret: 1}) + "\n")
    done = script("batch", "plan.yaml", cwd=folder, HF_TOKEN=secret)
    assert done.returncode == 2
    assert secret in (folder / "outputs" / "one-a" / "batch.log").read_text()
    assert secret not in (folder / SWEEP).read_text()


def test_no_new_run_begins_when_the_budget_is_spent_and_a_larger_one_goes_on(folder: Path) -> None:
    write_plan(folder, "budget: {runs: 2}\n")
    done = script("batch", "plan.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert states(folder) == {"one-a": "done", "one-b": "done", "one-c": "not started"}
    assert "budget spent" in done.stdout and "not started" in done.stdout
    assert states(folder) == {"one-a": "done", "one-b": "done", "one-c": "not started"}
    write_plan(folder, "budget: {runs: 3}\n")
    assert script("batch", "plan.yaml", cwd=folder).returncode == 0
    assert set(states(folder).values()) == {"done"}


def test_hours_are_counted_over_all_starts(folder: Path) -> None:
    write_plan(folder, "budget: {hours: 0.00001}\n")
    assert script("batch", "plan.yaml", cwd=folder).returncode == 0
    assert list(states(folder).values()) == ["done", "not started", "not started"]


def test_equal_data_steps_are_done_once_and_a_failure_is_not_taken_for_done(folder: Path) -> None:
    write_plan(folder, "grid: {train.lr: [1e-3, 1e-4]}\n", data="data/raw/a.jsonl, data/raw/b.jsonl")
    (folder / "data" / "raw" / "b.jsonl").write_text('{"neither": 1}\n')
    done = script("batch", "plan.yaml", cwd=folder)
    assert done.stderr.count("one-a-lr0.001: process") == 1 and "one-a-lr0.0001: process" not in done.stderr
    assert list(states(folder).values()) == ["done", "done", "failed", "failed"]


def test_a_second_sweep_of_the_same_name_is_refused_and_one_of_another_name_is_not(folder: Path) -> None:
    with files.file_lock(folder / "outputs/sweeps/plan/.lock", wait_seconds=0, what="test"):
        done = script("batch", "plan.yaml", cwd=folder)
        assert done.returncode == 3 and "'plan'" in done.stderr and "--name" in done.stderr
        assert not (folder / SWEEP).exists()
        assert script("batch", "plan.yaml", "--name", "other", cwd=folder).returncode == 0
    assert (folder / "outputs/sweeps/other/sweep.json").exists()


def test_it_waits_for_a_child_of_the_killed_sweep_to_end(folder: Path) -> None:
    with files.file_lock(folder / "outputs/sweeps/plan/.children.lock", wait_seconds=0, what="test") as lock:
        # holds the lock as a child does that is still saving
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"], pass_fds=(lock,)).returncode = 0
    done = script("batch", "plan.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "waiting for it to save" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child is not told of its parent's death")
def test_killed_the_sweep_takes_its_children_along_and_the_next_start_goes_on(
    folder: Path, started: Callable[..., "subprocess.Popen[str]"]
) -> None:
    write_rows(folder / "data" / "raw" / "a.jsonl", 300_000)
    process = started()
    (child,) = wait_for(lambda: steps_at_work(process))
    process.kill()
    child.wait(timeout=30)
    assert states(folder)["one-a"] == "running"
    write_rows(folder / "data" / "raw" / "a.jsonl", 30)
    done = script("batch", "plan.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [(entry["state"], entry["attempts"]) for entry in state_of(folder)["runs"]] == [
        ("done", 2),
        ("done", 1),
        ("done", 1),
    ]


def test_a_child_that_is_killed_is_told_and_the_others_go_on(
    folder: Path, started: Callable[..., "subprocess.Popen[str]"]
) -> None:
    write_rows(folder / "data" / "raw" / "a.jsonl", 300_000)
    process = started()
    (child,) = wait_for(lambda: steps_at_work(process))
    child.kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 137, err
    assert "killed (SIGKILL)" in out
    assert list(states(folder).values()) == ["failed", "done", "done"]


@pytest.mark.parametrize("presses", [1, 2])
def test_two_at_a_time_each_with_a_card_of_its_own(
    folder: Path, started: Callable[..., "subprocess.Popen[str]"], presses: int
) -> None:
    for name in "ab":
        write_rows(folder / "data" / "raw" / f"{name}.jsonl", 300_000)
    process = started(CUDA_VISIBLE_DEVICES="0,1")
    both = wait_for(lambda: found if len(found := steps_at_work(process)) == 2 else None)
    assert sorted(child.environ()["CUDA_VISIBLE_DEVICES"] for child in both) == ["0", "1"]
    assert sorted(states(folder).values()) == ["running", "running", "waiting"]
    for _ in range(presses):  # the second time means at once
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert sorted(states(folder).values()) == ["stopped", "stopped", "waiting"], state_of(folder)["runs"]
    assert "stopped in process" in out and "not run" in out


def test_a_closed_terminal_stops_the_runs_and_is_noted(folder: Path) -> None:
    write_rows(folder / "data" / "raw" / "a.jsonl", 300_000)
    with Terminal([sys.executable, ROOT / "scripts" / "batch.py", "plan.yaml"], folder) as terminal:
        wait_for(lambda: steps_at_work(terminal.program))
        terminal.hang_up()
        assert terminal.program.wait(60) == 143
    assert list(states(folder).values()) == ["stopped", "waiting", "waiting"]


def test_cards_are_those_that_this_process_may_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nprintf 'GPU-1\\nGPU-2\\n'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for given, jobs, places in [
        (None, None, ["GPU-1", "GPU-2"]),
        (None, 3, ["GPU-1", "GPU-2", "GPU-1"]),
        (None, 1, ["GPU-1"]),
        ("3, 1", None, ["3", "1"]),
        ("2,-1,0", None, ["2"]),
        ("", None, [None]),
        ("", 2, [None, None]),
    ]:
        if given is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert sweep_places.devices(jobs) == places


def test_a_step_gets_its_card_and_nothing_of_what_make_said_to_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SFT_RUN": "x", "SFT_SET": "y", "SFT_MODEL_CACHE": "kept"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = sweep_places.environment("GPU-2", 4)
    assert found["CUDA_VISIBLE_DEVICES"] == "GPU-2" and found["SFT_MODEL_CACHE"] == "kept"
    assert not {"SFT_RUN", "SFT_SET", "OMP_NUM_THREADS"} & set(found)
    assert int(sweep_places.environment(None, 2)["OMP_NUM_THREADS"]) >= 1
    assert "OMP_NUM_THREADS" not in sweep_places.environment(None, 1)


@pytest.mark.parametrize("jobs", ["0", "two", "-1", "1.5"])
def test_a_wrong_number_of_jobs_is_refused(folder: Path, jobs: str) -> None:
    done = script("batch", "plan.yaml", f"--jobs={jobs}", cwd=folder)
    assert done.returncode == 2 and jobs in done.stderr


def test_make_sweep_is_the_same_program(folder: Path) -> None:
    words = ["make", "-f", ROOT / "Makefile", "-C", ROOT, "sweep", f"SWEEP={folder / 'plan.yaml'}", "DRY_RUN=1"]
    write_plan(folder, data=f"{folder}/data/raw/a.jsonl")
    (folder / "plan.yaml").write_text((folder / "plan.yaml").read_text().replace("one.yaml", str(folder / "one.yaml")))
    done = run(words, folder)
    assert done.returncode == 0, done.stderr
    assert "one-a" in done.stdout and "nothing was run" in done.stdout


def test_a_run_whose_folder_cannot_be_made_fails_alone(folder: Path) -> None:
    (folder / "outputs").mkdir()
    (folder / "outputs" / "one-a").write_text("a file where the run's folder should be")
    done = script("batch", "plan.yaml", cwd=folder)
    assert "Traceback" not in done.stderr, done.stderr
    assert list(states(folder).values()) == ["failed", "done", "done"]


def test_a_damaged_state_is_refused_and_left_as_it_is(folder: Path) -> None:
    (folder / SWEEP).parent.mkdir(parents=True)
    (folder / SWEEP).write_text("{")
    done = script("batch", "plan.yaml", cwd=folder)
    assert done.returncode == 3 and "sweep.json" in done.stderr
    assert (folder / SWEEP).read_text() == "{"


def test_dry_run_says_what_is_not_known_and_takes_no_lock(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    with files.file_lock(folder / "lock", wait_seconds=0, what="test"):
        done = script("batch", "plan.yaml", "--dry-run", cwd=folder)
    assert done.returncode == 0, done.stderr
    line = next(line.split() for line in done.stdout.splitlines() if line.strip().startswith("one-a"))
    assert line[3:6] == ["waiting", "?", "?"] and line[6] != "?"
    assert "not rendered yet" in done.stdout
    assert sorted(path for path in folder.rglob("*") if path.name != "lock") == before


def test_dry_run_for_a_model_that_is_not_here_says_so(folder: Path) -> None:
    write_plan(folder, "set: [model.name=no/such-model]\n")
    done = script("batch", "plan.yaml", "--dry-run", cwd=folder, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "no/such-model" in done.stdout and "Traceback" not in done.stderr


def test_the_last_lines_of_a_log_are_what_was_last_to_be_seen(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"error: of an earlier step\n")
    size = log.stat().st_size
    with log.open("ab") as file:
        file.write(b"10 %\r50 %\r100 %\n\nerror: what is wrong\nhint: what helps\n\xff")
    lines = growing.tail(log, 5, since=size)
    assert lines == ["100 %", "error: what is wrong", "hint: what helps", "\ufffd"]
    assert growing.tail(log, 2, since=size) == lines[-2:]
    assert sweep_state.error_in(lines) == "what is wrong"
    assert growing.tail(tmp_path / "none", 5) == [] and sweep_state.error_in([]) == "it said nothing"


def test_clean_all_removes_what_sweeps_keep(folder: Path) -> None:
    assert script("batch", "plan.yaml", cwd=folder).returncode == 0
    assert script("clean", "--all", "--yes", cwd=folder).returncode == 0
    assert not (folder / "outputs" / "sweeps" / "plan").exists()
