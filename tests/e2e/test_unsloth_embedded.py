"""`make train-unsloth` on the embedded model, where Unsloth is installed: it trains, is killed, and resumes."""

import os
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts.utils import files
from tests.commands import ROOT, environment
from tests.e2e.test_quick_start import active, clone  # noqa: F401  (fixtures)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed (make install EXTRAS=unsloth)"),
]
WORDS = (
    "train.max_steps=2 train.eval_strategy=no train.save_strategy=steps train.save_steps=1 train.pack_length=64 "
    "train.logging_steps=1 render.max_length=192 train.packing=false train.self_test=false"
)


def start(clone: Path, active: Path, run: str) -> subprocess.Popen[str]:  # noqa: F811
    words = ["make", "train-unsloth", "CONFIG=configs/quickstart.yaml", "RAW=data/sample", f"RUN={run}", f"SET={WORDS}"]
    variables = environment(VIRTUAL_ENV=str(active), SFT_MODEL_CACHE=str(ROOT / ".cache" / "models"))
    log = (clone / f"{run}.log").open("a")
    return subprocess.Popen(
        words,
        cwd=clone,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        text=True,
        start_new_session=True,
    )


@pytest.mark.timeout(1500)
def test_the_embedded_model_trains_with_unsloth_is_killed_and_resumes_to_the_same_adapter(
    clone: Path,  # noqa: F811
    active: Path,  # noqa: F811
) -> None:
    assert start(clone, active, "whole").wait(600) == 0, (clone / "whole.log").read_text()[-3000:]
    stamp = files.read_json(clone / "outputs/whole/backend.json")
    assert stamp["backend"]["actual"] == "unsloth" and stamp["status"] == "finished"
    killed = start(clone, active, "killed")
    end = time.monotonic() + 600
    while not (clone / "outputs/killed/checkpoint-1").is_dir():
        assert time.monotonic() < end and killed.poll() is None, (clone / "killed.log").read_text()[-3000:]
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert start(clone, active, "killed").wait(600) == 0, (clone / "killed.log").read_text()[-3000:]
    starts = files.read_json(clone / "outputs/killed/backend.json")["starts"]
    assert [entry["ended"] for entry in starts] == ["killed", "finished"] and starts[1]["from_step"] == 1
    name = "adapter_model.safetensors"
    assert files.sha256_file(clone / "adapters/killed" / name) == files.sha256_file(clone / "adapters/whole" / name)
