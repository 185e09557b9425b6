"""Unsloth for real, where it is installed: each run in a process of its own, as an import of it patches the process."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts.utils import files, stamp

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed (make install EXTRAS=unsloth)"),
]


def train(run: str, backend: str, overrides: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    words = ["--config", "tiny.yaml", "--run", run, "--backend", backend, "--set", f"train.packing=false {overrides}"]
    environment = {**os.environ, **variables}
    for step in ("process", "render"):
        script = files.REPO_ROOT / "scripts" / f"{step}.py"
        subprocess.run([sys.executable, script, "--config", "tiny.yaml"], check=True, capture_output=True)
    script = files.REPO_ROOT / "scripts" / "train.py"
    return subprocess.run([sys.executable, script, *words], env=environment, capture_output=True, text=True)


def losses(run: str) -> list[float]:
    return [entry["loss"] for entry in files.read_jsonl(Path("outputs") / run / "metrics.jsonl") if "loss" in entry]


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_unsloth_trains_on_the_same_rows_and_masks_as_bitsandbytes(project: Callable[..., Path], mode: str) -> None:
    project(max_steps=4)
    done = train("fast", "unsloth", f"tuning.mode={mode}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert stamp.require("fast")["backend"] == {"requested": "unsloth", "actual": "unsloth", "fallback_reason": None}
    assert train("plain", "bitsandbytes", f"tuning.mode={mode}").returncode == 0
    # the adapters begin with other random numbers, and with an effect of zero: the first loss is that of the base
    assert losses("fast")[0] == pytest.approx(losses("plain")[0], rel=1e-4)
    assert losses("fast") == pytest.approx(losses("plain"), rel=2e-2)
    assert (Path("adapters") / "fast" / "adapter_model.safetensors").is_file()


def test_packing_is_used_only_where_it_is_exact(project: Callable[..., Path]) -> None:
    project(max_steps=2)
    done = train("packed", "unsloth", "train.packing=true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert stamp.require("packed")["packing"] is True or "packing is off" in done.stderr


def test_an_unsloth_that_finds_no_accelerator_falls_back_with_the_losses_of_a_direct_run(
    project: Callable[..., Path],
) -> None:
    project(max_steps=3)
    done = train("fallen", "unsloth", UNSLOTH_DISABLE_CPU_FALLBACK="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bitsandbytes instead" in done.stderr
    facts = stamp.require("fallen")["backend"]
    assert (facts["requested"], facts["actual"]) == ("unsloth", "bitsandbytes") and facts["fallback_reason"]
    assert train("direct", "bitsandbytes").returncode == 0
    assert losses("fallen") == losses("direct")
    never = train("never", "unsloth", "tuning.fallback=never", UNSLOTH_DISABLE_CPU_FALLBACK="1")
    assert never.returncode == 4 and not (Path("outputs") / "never" / "backend.json").exists()
