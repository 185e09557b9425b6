"""Who is measured, and by which command; TRL is fetched at first use into a folder that only its own commands see."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.flops import Shape
from benchmarks.measured import Measured, run
from benchmarks.rows import ROOT, Job, Rows, clean_environment, write
from scripts.utils import files
from scripts.utils.errors import MachineError

TRL = "1.14.2"  # the newest that trains on a CPU: 1.15.0 needs Triton
NAMES = {
    "sft-play": "SFT-Play",
    "sft-play-low": "SFT-Play, low memory",
    "sft-play-unsloth": "SFT-Play, Unsloth backend",
    "trl-defaults": f"TRL {TRL}, its defaults",
    "trl-best": f"TRL {TRL}, best settings",
    "padded": "padded Trainer, all logits, fp32",
}
OURS = ("sft-play", "sft-play-low", "sft-play-unsloth")
# as `make train` runs them
STEPS = 'for step in process style render train; do "$0" "$1/$step.py" --config run.yaml || exit; done'
_STEP = re.compile(r"^train: step (\d+)/(\d+)")


@dataclass(frozen=True)
class Result:
    """One run of one contestant. Rates are tokens a second after the first step; ``flops`` operations a second that had to be done."""

    name: str
    round: int
    seconds: float
    first_step: float
    peak_bytes: int
    rate: float
    trained_rate: float
    flops: float
    steps: int
    tokens: int
    trained_tokens: int
    train_loss: float


def trl_folder() -> Path:
    """Where TRL lies, fetched without its dependencies: those that it needs here are the project's own."""
    folder = ROOT / ".cache" / "bench" / f"trl-{TRL}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        landing = Path(tempfile.mkdtemp(prefix="trl-", dir=folder.parent))
        uv = shutil.which("uv")
        command = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
        command += ["--quiet", "--no-deps", "--target", str(landing), f"trl=={TRL}"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(landing)
            raise MachineError(
                f"TRL {TRL} cannot be fetched: {done.stderr.strip()[-300:]}",
                "check the connection to the package index, or leave it out: --contestants sft-play,padded",
            )
        landing.rename(folder)
    return folder


def measure(name: str, round_number: int, folder: Path, job: Job, rows: Rows, shape: Shape) -> Result:
    """Run one contestant in ``folder``, from its command to its adapter on disk."""
    write(folder, job if name != "padded" else replace(job, precision="fp32", mode="lora"), rows)
    paths = [str(ROOT)]
    if name in OURS:
        settings = json.loads((folder / "run.yaml").read_text())
        if name == "sft-play-low":
            settings["train"]["gradient_checkpointing"] = True
        if name == "sft-play-unsloth":
            settings["tuning"] |= {"backend": "unsloth", "fallback": "never"}
        (folder / "run.yaml").write_text(json.dumps(settings))
        command = ["sh", "-c", STEPS, sys.executable, str(ROOT / "scripts")]
    else:
        paths = [str(trl_folder()), *paths] if name.startswith("trl") else paths
        command = [sys.executable, "-m", "benchmarks.train_peer", name]
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    measured = run(command, folder, clean_environment(PYTHONPATH=os.pathsep.join(paths)))
    facts = _own_facts(folder) if name in OURS else files.read_json(folder / "facts.json")
    return evaluate(name, round_number, measured, facts, [len(e.ids) for e in rows.encoded], shape)


def _own_facts(folder: Path) -> dict[str, Any]:
    """What a peer writes down itself, from SFT-Play's metrics.jsonl and manifest."""
    logged = [line for line in files.read_jsonl(folder / "outputs" / "bench" / "metrics.jsonl") if "loss" in line]
    seen = [0, *(line["tokens_seen"] for line in logged)]
    on_card = stamp_of(folder)["hardware"]["device"] == "cuda"
    device_peak = max(int(line["memory_gib"] * 2**30) for line in logged) if on_card else None
    counted = files.read_json(folder / "data" / "rendered" / "rows" / "manifest.json")["tokens"]
    return {
        "tokens": [after - before for before, after in zip(seen, seen[1:], strict=False)],
        "trained_tokens": counted["trained"],
        "loss": sum(line["loss"] for line in logged) / len(logged),
        "steps": len(logged),
        "device_peak": device_peak,
    }


def stamp_of(folder: Path) -> dict[str, Any]:
    return files.read_json(folder / "outputs" / "bench" / "backend.json")


def evaluate(
    name: str, round_number: int, measured: Measured, facts: dict[str, Any], lengths: Sequence[int], shape: Shape
) -> Result:
    """From the moments when the steps ended, as this program saw them, and the tokens in each."""
    ends = [at for at, line in measured.lines if _STEP.match(line)]
    if len(ends) != facts["steps"] or len(ends) < 2:
        raise MachineError(
            f"{name} said that {len(ends)} of {facts['steps']} steps ended", "this is a bug of the benchmark"
        )
    tokens, share = sum(facts["tokens"]), facts["trained_tokens"] / sum(facts["tokens"])
    rate = sum(facts["tokens"][1:]) / (ends[-1] - ends[0])
    a_token = shape.step(lengths, round(share * sum(lengths))) / sum(lengths)
    return Result(
        name=name,
        round=round_number,
        seconds=measured.seconds,
        first_step=ends[0],
        peak_bytes=facts.get("device_peak") or measured.peak_bytes,
        rate=rate,
        trained_rate=rate * share,
        flops=rate * a_token,
        steps=len(ends),
        tokens=tokens,
        trained_tokens=facts["trained_tokens"],
        train_loss=facts["loss"],
    )


def adapter_of(name: str, folder: Path) -> Path:
    return folder / "adapters" / "bench" if name in OURS else folder / "adapter"


def compete(
    names: Sequence[str], rounds: int, base: Path, job: Job, rows: Rows, shape: Shape
) -> tuple[list[Result], dict[str, Path]]:
    """Every contestant once a round, each round in the opposite order of the one before; and the first round's adapters."""
    results, adapters = [], {}
    for number in range(1, rounds + 1):
        for name in names if number % 2 else reversed(names):
            folder = base / f"{number}-{name}"
            result = measure(name, number, folder, job, rows, shape)
            results.append(result)
            print(
                f"bench: round {number}/{rounds}  {NAMES[name]}: {result.rate:,.1f} tok/s, "
                f"{result.peak_bytes / 2**30:.2f} GiB, {result.seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            if number == 1:
                adapters[name] = adapter_of(name, folder)
            else:
                shutil.rmtree(folder)
    return results, adapters


def judge(adapters: dict[str, Path], job: Job, rows: Rows, folder: Path) -> dict[str, float]:
    """Loss of each adapter on the held-out rows, by one evaluator in a process of its own."""
    folder.mkdir()
    files.write_jsonl(folder / "held.jsonl", [asdict(example) for example in rows.encoded_held])
    request = {"model": job.model, "adapters": {name: str(path) for name, path in adapters.items()}}
    files.write_json(folder / "judge.json", request)
    run([sys.executable, "-m", "benchmarks.judge"], folder, clean_environment(PYTHONPATH=str(ROOT)))
    return files.read_json(folder / "judged.json")
