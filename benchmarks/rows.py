"""What every contestant gets: the same rows as messages, and one job description, in a folder of its own."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measured import run
from scripts.utils import files
from scripts.utils.encoding import Encoded
from scripts.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
GROUP = 8  # examples in an optimizer step; the batch size that TRL and transformers begin with


@dataclass(frozen=True)
class Job:
    """``model``: a local folder; ``pack_length``: tokens of a packed row, such that one holds ``GROUP`` examples on average."""

    model: str
    precision: str
    pack_length: int
    max_length: int
    examples: int = GROUP
    learning_rate: float = 2e-4
    warmup: float = 0.05
    rank: int = 16
    alpha: int = 32
    seed: int = 42
    mode: str = "lora"


@dataclass(frozen=True)
class Rows:
    """``train`` and ``held`` as messages, and as SFT-Play encodes them."""

    train: list[dict[str, Any]]
    held: list[dict[str, Any]]
    encoded: list[Encoded]
    encoded_held: list[Encoded]


def clean_environment(**extra: str) -> dict[str, str]:
    """For commands that are measured: nothing of make's variables, no network, and the same thread settings for all."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SFT_") or k == "SFT_MODEL_CACHE"}
    kept.setdefault("SFT_MODEL_CACHE", str(ROOT / ".cache" / "models"))
    kept |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "NO_COLOR": "1"}
    return {**kept, **extra}


def read(raw: Path, model: Path, count: int, longest: int, folder: Path) -> Rows:
    """``count`` rows of at most ``longest`` tokens that end with an answer, by the split that SFT-Play's process makes of ``raw``."""
    if not raw.exists():
        raise UserError(f"no rows: {raw.absolute()} is not there", "RAW=… names a file or folder")
    folder.mkdir(parents=True)
    settings = {"model": {"name": str(model)}, "data": {"raw": str(raw.absolute()), "name": "rows"}}
    (folder / "run.yaml").write_text(json.dumps(settings))
    run([sys.executable, str(ROOT / "scripts" / "process.py"), "--config", "run.yaml"], folder, clean_environment())
    found: dict[str, list[dict[str, Any]]] = {}
    for split in ("train", "val", "test"):
        path = folder / "data" / "processed" / "rows" / f"{split}.jsonl"
        found[split] = [{"messages": row["messages"]} for row in files.read_jsonl(path)] if path.is_file() else []
    train, encoded = _fitting(found["train"], model, count, longest)
    if len(train) < count:
        raise UserError(
            f"{raw}: {len(train)} train rows of up to {longest} tokens, {count} are wanted",
            "lower ROWS, or name more rows with RAW",
        )
    held, encoded_held = _fitting([*found["val"], *found["test"]], model, max(8, min(32, count // 2)), longest)
    return Rows(train, held, encoded, encoded_held)


def _fitting(
    rows: Sequence[dict[str, Any]], model: Path, count: int, longest: int
) -> tuple[list[dict[str, Any]], list[Encoded]]:
    kept, encoded = [], []
    for row, example in zip(rows, encode(model, rows[: 4 * count]), strict=False):
        if len(kept) < count and len(example.ids) <= longest and row["messages"][-1]["role"] == "assistant":
            kept.append(row)
            encoded.append(example)
    return kept, encoded


def encode(model: Path, rows: Sequence[dict[str, Any]], system: str | None = None) -> list[Encoded]:
    """As SFT-Play's render and train do it; ``system`` takes the place of each row's own system message."""
    from scripts.utils import chat, rendered

    tokenizer = chat.load_tokenizer(model)
    template = chat.choose_template(tokenizer, "auto")
    made = []
    for row in rows:
        messages = row["messages"]
        if system is not None:
            turns = [message for message in messages if message["role"] != "system"]
            messages = [{"role": "system", "content": system}, *turns]
        made.append(vars(chat.render_conversation(template, tokenizer, messages)))
    return rendered.to_examples(tokenizer, made)


def make_job(model: Path, rows: Rows, arguments: argparse.Namespace) -> Job:
    lengths = [len(example.ids) for example in rows.encoded]
    # never below the longest row, which a peer that packs would cut
    budget = max(GROUP * sum(lengths) // len(lengths), *lengths)
    return Job(str(model), arguments.precision, budget, arguments.max_length, mode=arguments.mode)


def write(folder: Path, job: Job, rows: Rows) -> None:
    """Rows, job.json and SFT-Play's run.yaml: all else that a contestant needs is its command."""
    folder.mkdir(parents=True)
    files.write_jsonl(folder / "rows.jsonl", rows.train)
    files.write_json(folder / "job.json", asdict(job))
    settings = {
        "run": {"name": "bench"},
        "model": {"name": job.model},
        "data": {"raw": "rows.jsonl", "val_fraction": 0.0, "test_fraction": 0.0},
        "render": {"max_length": job.max_length},
        "tuning": {"mode": job.mode},
        "lora": {"r": job.rank, "alpha": job.alpha},
        "train": {
            "epochs": 1,
            "gradient_accumulation": 1,
            "pack_length": job.pack_length,
            "learning_rate": job.learning_rate,
            "warmup": job.warmup,
            "optimizer": "adamw_torch",
            "precision": job.precision,
            "logging_steps": 1,
            "seed": job.seed,
        },
    }
    (folder / "run.yaml").write_text(json.dumps(settings, indent=1))
