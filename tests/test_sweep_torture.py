"""A sweep with real training: killed at random moments, changed, given up, predicted, started again."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import commands
from tests.commands import script

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed sweep's children end their step first")
def test_ten_kills_and_a_failure_and_each_finished_run_was_trained_exactly_once(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.sweep_torture", "--kills", "10", "--longest", "6"]
    done = commands.run(words, commands.ROOT, TMPDIR=str(tmp_path), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def runs_in(folder: Path, name: str = "plan") -> dict[str, Any]:
    path = folder / "outputs" / "sweeps" / name / "sweep.json"
    return {entry["run"]: entry for entry in json.loads(path.read_text())["runs"]}


def test_a_hopeless_run_is_given_up_keeps_its_checkpoint_and_is_left_alone(project: Callable[..., Path]) -> None:
    pytest.importorskip("optuna")
    each = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 20}
    folder = project(max_steps=60, gradient_accumulation=1, pack_length=64, scheduler="constant", warmup=0, **each)
    (folder / "plan.yaml").write_text(
        "configs: tiny.yaml\nsteps: [process, render, train]\nprune: {after_runs: 2, from_step: 2}\n"
        "variants:\n  - {name: good, train.lr: 3e-3}\n  - {name: fair, train.lr: 2e-3}\n  - {name: hopeless, train.lr: 1e-7}\n"
    )
    done = script("batch", "plan.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    runs = runs_in(folder)
    assert {name: entry["state"] for name, entry in runs.items()} == {
        "tiny-sums-good": "done",
        "tiny-sums-fair": "done",
        "tiny-sums-hopeless": "pruned",
    }
    run = "tiny-sums-hopeless"
    stamp = json.loads((folder / "outputs" / run / "backend.json").read_text())
    reached = stamp["starts"][-1]["step"]
    assert stamp["starts"][-1]["ended"] == "interrupted" and 2 <= reached < 60
    assert (folder / "outputs" / run / f"checkpoint-{reached}").is_dir()
    config = f"outputs/sweeps/plan/runs/{run}.yaml"
    assert f"make train CONFIG={config} RUN={run}" in done.stdout
    again = script("batch", "plan.yaml", cwd=folder)
    assert again.returncode == 0 and runs_in(folder) == runs
    # by hand, as the table said; the sweep then takes it for finished
    by_hand = script("train", "--config", config, "--run", run, cwd=folder)
    assert by_hand.returncode == 0, by_hand.stderr
    assert json.loads((folder / "outputs" / run / "backend.json").read_text())["starts"][-1]["from_step"] == reached
    assert script("batch", "plan.yaml", cwd=folder).returncode == 0
    assert runs_in(folder)[run]["state"] == "done"


def test_a_changed_plan_keeps_the_runs_that_are_still_the_same_and_the_dry_run_knows_them(
    project: Callable[..., Path],
) -> None:
    folder = project(max_steps=2)
    text = "configs: tiny.yaml\nset: [eval.max_new_tokens=4]\ngrid: {lora.r: [4, 8]}\n"
    (folder / "plan.yaml").write_text(text)
    done = script("batch", "plan.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    first = runs_in(folder)
    assert [entry["state"] for entry in first.values()] == ["done", "done"]
    tuned = json.loads((folder / "outputs" / "tiny-sums-r4" / "eval" / "metrics.json").read_text())["tuned"]
    assert f"{tuned['loss']:.4f}" in done.stdout
    (folder / "plan.yaml").write_text(text.replace("[4, 8]", "[2, 4]"))
    shown = script("batch", "plan.yaml", "--dry-run", cwd=folder)
    lines = {words[0]: words[1:] for line in shown.stdout.splitlines() if len(words := line.split()) > 6}
    assert (lines["tiny-sums-r2"][2], lines["tiny-sums-r4"][2]) == ("waiting", "done")
    # the planner's own figures, now that the rows are there
    planned = script("plan", "--config", "tiny.yaml", "--set", "lora.r=2", cwd=folder).stdout
    assert lines["tiny-sums-r2"][3] == "2" and "about 2 steps" in planned
    peak = next(line.split()[-2:] for line in planned.splitlines() if line.strip().startswith("predicted peak"))
    assert " ".join(peak) in shown.stdout
    done = script("batch", "plan.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    now = runs_in(folder)
    assert now["tiny-sums-r4"] == first["tiny-sums-r4"] and now["tiny-sums-r2"]["state"] == "done"
    assert (folder / "adapters" / "tiny-sums-r8").is_dir() and "tiny-sums-r8" not in now


def test_a_finished_run_whose_adapter_is_gone_is_not_taken_for_finished(project: Callable[..., Path]) -> None:
    folder = project(max_steps=2)
    (folder / "plan.yaml").write_text("configs: tiny.yaml\nsteps: [process, render, train]\n")
    assert script("batch", "plan.yaml", cwd=folder).returncode == 0
    (folder / "adapters" / "tiny-sums").rename(folder / "moved")
    done = script("batch", "plan.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    # exported once more from the run's checkpoints; not trained again
    assert (folder / "adapters" / "tiny-sums" / "adapter_model.safetensors").read_bytes() == (
        folder / "moved" / "adapter_model.safetensors"
    ).read_bytes()
