"""Unsloth for real, where it is installed: each run in a process of its own, as an import of it patches the process.

Runs that several tests look at are made once, in one folder.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from scripts.utils import files, stamp
from tests.commands import ROOT, environment, script
from tests.tiny_models import smollm2_tokenizer, tiny_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed (make install EXTRAS=unsloth)"),
]
STEPS = 5
# runs train.main() with something planted first, in a process that has imported nothing heavy yet
PLANTED = f"import sys, os\nsys.path.insert(0, {str(ROOT)!r})\nfrom scripts import train\nfrom scripts.utils import loss_choice\n{{}}\nraise SystemExit(train.main())"
FIRST_STEP_FAILS = "def fail(*_): raise RuntimeError('planted in the first step')\nloss_choice.fused_loss = fail"
# two micro batches a step: the fifth belongs to step 3
CTRL_C_AT_STEP_3 = (
    "real, calls = loss_choice.fused_loss, []\n"
    "def press(*words):\n"
    "    calls.append(1)\n"
    "    if len(calls) == 5: os.kill(os.getpid(), 2)\n"
    "    return real(*words)\n"
    "loss_choice.fused_loss = press"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rendered rows, a config, and a tiny model that is wide enough for Unsloth's 4 bit on a CPU."""
    folder = tmp_path_factory.mktemp("unsloth")
    tiny_llama(hidden=64).save_pretrained(folder / "model")
    smollm2_tokenizer().save_pretrained(folder / "model")
    rows = [{"question": f"How much is {n} plus {n + 1}?", "answer": f"It is {2 * n + 1}."} for n in range(24)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "model": {"name": str(folder / "model")},
        "data": {"raw": "sums.jsonl"},
        "render": {"max_length": 128},
        "tuning": {"mode": "lora"},
        "lora": {"r": 4, "alpha": 8},
        "train": {"max_steps": STEPS, "gradient_accumulation": 2, "learning_rate": 0.003, "logging_steps": 1}
        | {"precision": "fp32", "packing": False, "self_test": False},
    }
    (folder / "tiny.yaml").write_text(json.dumps(config))
    for step in ("process", "render"):
        assert script(step, "--config", "tiny.yaml", cwd=folder).returncode == 0
    return folder


@pytest.fixture(autouse=True)
def _there(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


def train(
    run: str, backend: str = "unsloth", overrides: str = "", *, plant: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    words = ["--config", "tiny.yaml", "--run", run, "--backend", backend, "--set", overrides]
    start = [str(ROOT / "scripts" / "train.py")] if plant is None else ["-c", PLANTED.format(plant)]
    return subprocess.run(
        [sys.executable, *start, *words], env=environment(**variables), capture_output=True, text=True, timeout=300
    )


def trained(run: str, backend: str, overrides: str = "") -> dict[str, Any]:
    """The stamp of a run that is made where it is not there yet."""
    if not (Path("outputs") / run).exists():
        done = train(run, backend, overrides)
        assert done.returncode == 0, done.stderr[-3000:]
    return stamp.require(run)


def entries(run: str, name: str) -> list[float]:
    return [entry[name] for entry in files.read_jsonl(Path("outputs") / run / "metrics.jsonl") if name in entry]


def losses(run: str) -> list[float]:
    return entries(run, "loss")


def adapter(run: str) -> str:
    return files.sha256_file(Path("adapters") / run / "adapter_model.safetensors")


def step(name: str, run: str, overrides: Sequence[str] = ()) -> None:
    done = script(name, "--config", "tiny.yaml", "--run", run, "--set", " ".join(overrides), cwd=Path.cwd())
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_unsloth_trains_on_the_same_rows_and_masks_as_bitsandbytes(mode: str) -> None:
    facts = trained(f"fast-{mode}", "unsloth", f"tuning.mode={mode}")
    xformers = "not installed" if find_spec("xformers") is None else facts["backend"]["xformers"]
    assert facts["backend"] == {
        "requested": "unsloth",
        "actual": "unsloth",
        "fallback_reason": None,
        "xformers": xformers,
    }
    assert facts["quantisation"] == ("nf4, double" if mode == "qlora" else None)
    trained(f"plain-{mode}", "bitsandbytes", f"tuning.mode={mode}")
    # the adapters begin with other random numbers, and with an effect of zero: the first loss is that of the base
    assert losses(f"fast-{mode}")[0] == pytest.approx(losses(f"plain-{mode}")[0], rel=1e-4)
    assert losses(f"fast-{mode}") == pytest.approx(losses(f"plain-{mode}"), rel=2e-2)
    assert losses(f"fast-{mode}")[-1] < losses(f"fast-{mode}")[0]


def test_packing_is_used_only_where_it_is_exact() -> None:
    done = train("packed", "unsloth", "train.packing=true train.max_steps=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert stamp.require("packed")["packing"] is True or "packing is off" in done.stderr


def test_resume_with_unsloth_matches_an_uninterrupted_run_bit_for_bit() -> None:
    trained("fast-lora", "unsloth")
    cut = train("cut", plant=CTRL_C_AT_STEP_3)
    assert cut.returncode == 130, cut.stderr[-3000:]
    assert f"step 3/{STEPS}" in cut.stderr
    assert train("cut").returncode == 0
    facts = stamp.require("cut")
    assert [start["ended"] for start in facts["starts"]] == ["interrupted", "finished"]
    assert facts["starts"][1]["from_step"] == 3 and facts["backend"]["actual"] == "unsloth"
    assert losses("cut") == losses("fast-lora")
    assert adapter("cut") == adapter("fast-lora")


def test_what_unsloth_trained_is_evaluated_by_transformers_with_the_loss_that_training_saw() -> None:
    trained("fast-qlora", "unsloth", "tuning.mode=qlora")
    step("eval", "fast-qlora", ["eval.split=val", "eval.generate=false", "tuning.mode=qlora"])
    found = files.read_json(Path("outputs/fast-qlora/eval/metrics.json"))
    assert found["tuned"]["loss"] == pytest.approx(min(entries("fast-qlora", "eval_loss")), rel=1e-4)
    assert found["base"]["loss"] > found["tuned"]["loss"] * 1.01


def test_a_run_never_goes_on_with_the_other_backend() -> None:
    trained("fast-lora", "unsloth")
    trained("plain-lora", "bitsandbytes")
    for run, other in (("fast-lora", "bitsandbytes"), ("plain-lora", "unsloth")):
        done = train(run, other)
        assert done.returncode == 3 and "backend" in done.stderr and "init_adapter" in done.stderr, done.stderr[-2000:]


def test_what_unsloth_trained_is_merged() -> None:
    trained("fast-lora", "unsloth")
    step("merge", "fast-lora")
    assert list(Path("outputs/fast-lora/merged").glob("*.safetensors"))


def fell_back(run: str, done: subprocess.CompletedProcess[str], said: str) -> None:
    """The run ended with a bitsandbytes adapter, a truthful stamp, and the losses and adapter of a direct run."""
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("Unsloth was asked for, but") == 1 and "What helps: " in done.stderr
    facts = stamp.require(run)["backend"]
    assert (facts["requested"], facts["actual"]) == ("unsloth", "bitsandbytes") and said in facts["fallback_reason"]
    trained("plain-lora", "bitsandbytes")
    assert losses(run) == losses("plain-lora") and adapter(run) == adapter("plain-lora")


def test_an_unsloth_that_finds_no_accelerator_falls_back_with_the_losses_of_a_direct_run() -> None:
    done = train("no-gpu", UNSLOTH_DISABLE_CPU_FALLBACK="1")
    fell_back("no-gpu", done, "no accelerator")
    never = train("never", overrides="tuning.fallback=never", UNSLOTH_DISABLE_CPU_FALLBACK="1")
    assert never.returncode == 4 and not (Path("outputs") / "never" / "backend.json").exists()


def test_a_torchvision_that_breaks_the_import_falls_back_with_the_losses_of_a_direct_run(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms is missing')")
    fell_back("vision", train("vision", PYTHONPATH=str(tmp_path)), "its import fails in torchvision")


def test_a_failure_in_the_first_step_falls_back_once_with_the_losses_of_a_direct_run() -> None:
    fell_back("planted", train("planted", plant=FIRST_STEP_FAILS), "planted in the first step")
    starts = stamp.require("planted")["starts"]
    assert [start["ended"].partition(":")[0] for start in starts] == ["failed", "finished"]
    never = train("planted-never", overrides="tuning.fallback=never", plant=FIRST_STEP_FAILS)
    assert never.returncode == 4 and "planted in the first step" in never.stderr


def test_an_absent_unsloth_falls_back_with_the_losses_of_a_direct_run() -> None:
    fell_back("absent", train("absent", plant="sys.modules['unsloth'] = None"), "not installed")
