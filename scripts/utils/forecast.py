"""Steps, hours and disk of a run, from its plan and the counts that render left: what make plan and a sweep's dry run show.

The speed is assumed, not measured; loads no weights.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import architecture, model_store, planning, stages
from scripts.utils.config import data_name
from scripts.utils.errors import UserError
from scripts.utils.hardware import Hardware, Precision
from scripts.utils.planning import Plan

if TYPE_CHECKING:
    from scripts.utils.schema import Config

# floating-point operations a second that training really gets, by class of device: assumed, not measured
SPEED = {"cuda": 12e12, "mps": 2e12, "cpu": 0.1e12}


@dataclass(frozen=True)
class Work:
    """``rows`` and ``tokens`` of an epoch; ``steps`` and ``seconds`` of the run."""

    rows: int
    tokens: float
    steps: int
    seconds: float


def imagined(words: str) -> Hardware:
    """A CUDA card that need not be there, of the Ampere generation or newer."""
    try:
        gigabytes = float(words)
    except ValueError:
        gigabytes = math.nan
    if not 0 < gigabytes < 10_000:
        raise UserError(f"GPU_GB is {words!r}, expected a number of GiB", "for example: make plan GPU_GB=8")
    return Hardware("cuda", f"a CUDA card of {gigabytes:g} GiB", round(gigabytes * 2**30), (8, 6))


def plan_of(config: "Config", machine: Hardware, precision: Precision, processes: int = 1) -> Plan:
    """The plan of a run, by its model's config.json (fetched where it is not here)."""
    folder = Path(config.model.name).expanduser()
    if not (folder / "config.json").is_file():  # a folder with this file alone will do
        folder = model_store.resolve(config.model.name, config.model.revision, tokenizer_only=True).path
    return planning.make(config, architecture.read(folder), machine, precision, config.tuning.backend, processes)


def work_of(plan: Plan) -> Work | None:
    """None where the rows are not rendered yet."""
    found = rows_in_data(plan.config)
    if found is None:
        return None
    train, (rows, tokens) = plan.config.train, found
    micro = math.ceil(tokens / plan.run.tokens) if train.packing else math.ceil(rows / train.micro_batch)
    steps = train.max_steps or math.ceil(math.ceil(micro / train.gradient_accumulation) * train.epochs)
    seen = tokens * min(steps * train.gradient_accumulation / max(micro, 1), 1e9)
    return Work(rows, tokens, steps, seen * operations(plan) / SPEED[plan.run.device] / busy(plan))


def busy(plan: Plan) -> int:
    """How many processes have something to do: a step has no more rows to deal out than micro batches."""
    return min(plan.run.processes, plan.config.train.gradient_accumulation)


def together(plan: Plan) -> str:
    return f", on {busy(plan)} processes if what they send costs nothing (it does)" if busy(plan) > 1 else ""


def operations(plan: Plan) -> float:
    """Floating-point operations a token: 2 a weight forward, 2 for the activations' gradients, 2 for trained weights' own."""
    passes = 2 + (1 if plan.run.checkpointing else 0) + (1 if plan.run.mode == "full" else 0)
    return 2.0 * passes * (plan.shape.in_linears + plan.shape.embedding)


def speed(plan: Plan) -> str:
    device = plan.run.device
    return f"if the {device} does {SPEED[device] / 1e12:g} TFLOP/s in training (assumed, not measured): {SPEED[device] / operations(plan):,.0f} tokens/s"


def trained_weights(plan: Plan) -> int:
    """How many weights train: the adapter's, or all."""
    full = plan.config.tuning.mode == "full"
    return plan.shape.total if full else plan.shape.adapter(plan.run.rank, plan.run.targets)


def disk(plan: Plan) -> int:
    """Bytes of the checkpoints and the export."""
    trained = trained_weights(plan)
    need = trained * (6 if "8bit" in plan.run.optimizer else 12)
    return (plan.config.train.save_total_limit + 2) * need + trained * 4


def merged(plan: Plan) -> int:
    """Bytes that make merge adds."""
    return 2 * plan.shape.total


def rows_in_data(config: "Config") -> tuple[int, float] | None:
    """Train rows and their tokens (the mean of all rows), where render has counted them."""
    manifest: dict[str, Any] | None = stages.read_manifest(stages.folder("render", data_name(config)))
    if manifest is None or not manifest["splits"].get("train"):
        return None
    count = manifest["splits"]["train"]
    return count, manifest["tokens"]["total"] * count / max(sum(manifest["splits"].values()), 1)
