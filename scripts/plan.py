"""plan: what training will take, before anything is trained: memory by part, steps, hours, disk, and does it fit.

Reads the model's config.json and the manifest in data/rendered where there is one; loads no weights and writes nothing.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import architecture, command, console, hardware, launching, model_store, planning, stages
from scripts.utils.config import data_name
from scripts.utils.errors import UserError
from scripts.utils.planning import Plan

if TYPE_CHECKING:
    from scripts.utils.schema import Config

# floating-point operations a second that training really gets, by class of device: assumed, not measured
SPEED = {"cuda": 12e12, "mps": 2e12, "cpu": 0.1e12}


def build_parser() -> argparse.ArgumentParser:
    examples = [
        "make plan",
        "make plan CONFIG=configs/run_bnb.yaml GPU_GB=8",
        "make plan MODEL=Qwen/Qwen2.5-7B-Instruct GPU_GB=8",
        'make plan GPU_GB=24 NPROC=4 SET="train.parallel=fsdp"',
        "sft-plan --gpu-gb 12 --set train.batch_size=auto",
    ]
    parser = command.new_parser(
        "plan", "Predict memory, steps, hours and disk of a training run.", examples, keys=["raw", "model", "backend"]
    )
    parser.add_argument(
        "--gpu-gb",
        default=command.from_make("GPU_GB"),
        metavar="GB",
        help="plan for a CUDA card with this much memory (GiB), here or not; left out: for this machine",
    )
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> int:
    machine = imagined(arguments.gpu_gb) if arguments.gpu_gb else hardware.detect()
    precision = hardware.choose_precision(config.train, machine)
    backend = config.tuning.backend
    folder = Path(config.model.name).expanduser()
    if not (folder / "config.json").is_file():  # a folder with this file alone will do
        folder = model_store.resolve(config.model.name, config.model.revision, tokenizer_only=True).path
    processes = launching.layout().world
    plan = planning.make(config, architecture.read(folder), machine, precision.actual, backend, processes)
    show_memory(plan)
    console.facts("the run", facts(plan, precision))
    console.result()
    console.result(plan.verdict())
    if plan.fits:
        return 0
    show_remedies(plan)
    return 4


def imagined(words: str) -> hardware.Hardware:
    """A CUDA card that need not be there, of the Ampere generation or newer."""
    try:
        gigabytes = float(words)
    except ValueError:
        gigabytes = math.nan
    if not 0 < gigabytes < 10_000:
        raise UserError(f"GPU_GB is {words!r}, expected a number of GiB", "for example: make plan GPU_GB=8")
    return hardware.Hardware("cuda", f"a CUDA card of {gigabytes:g} GiB", round(gigabytes * 2**30), (8, 6))


def show_memory(plan: Plan) -> None:
    always = [(name, console.size(count)) for name, count in plan.memory.always.items() if count]
    turns = [
        (f"  {name}" + (" (counts)" if name == plan.memory.largest_turn else ""), console.size(count))
        for name, count in plan.memory.turns.items()
    ]
    rows = [*always, ("on top of it, one at a time:", ""), *turns, ("predicted peak", console.size(plan.memory.peak))]
    console.table("predicted memory", ("part", "size"), rows)


def facts(plan: Plan, precision: hardware.PrecisionChoice) -> list[tuple[str, object]]:
    config, train, shape = plan.config, plan.config.train, plan.shape
    adapter = 0 if config.tuning.mode == "full" else shape.adapter(plan.run.rank, plan.run.targets)
    trained = adapter or shape.total
    lines: list[tuple[str, object]] = [
        ("name", f"{config.model.name}, {config.tuning.mode}"),
        ("model", f"{shape.family}, {shape.total:,} weights, {trained:,} of them train" if not adapter
         else f"{shape.family}, {shape.total:,} weights; {adapter:,} in the adapter train"),
        ("backend", f"{plan.backend} in {precision.actual} ({precision.why})"),
        ("micro batch", plan.choices()),
        ("optimizer", plan.run.optimizer),
        ("assumed", "0.8 GiB for the CUDA context and kernels" if plan.run.device == "cuda" else "0.7 GiB for the libraries"),
    ]  # fmt: skip
    processes = plan.run.processes
    if processes > 1:
        engine = "FSDP: each holds a part of the model" if plan.run.sharded else "DDP: each holds the whole model"
        lines.append(("processes", f"{processes}; the memory above is that of one. {engine}"))
    if plan.memory.host:
        each = f", for each of the {processes} processes" if processes > 1 else ""
        lines.append(("host memory", f"{console.size(plan.memory.host)} for what does not lie on the card{each}"))
    rows = rows_in_data(config)
    if rows is None:
        lines.append(("rows, steps", "unknown: no rendered rows (make render)"))
    else:
        count, tokens = rows
        micro = math.ceil(tokens / plan.run.tokens) if train.packing else math.ceil(count / train.micro_batch)
        steps = train.max_steps or math.ceil(math.ceil(micro / train.gradient_accumulation) * train.epochs)
        busy = min(processes, train.gradient_accumulation)  # a step has no more rows to deal out
        seen = tokens * min(steps * train.gradient_accumulation / max(micro, 1), 1e9)
        lines += [
            ("rows, steps", f"{count:,} train rows, about {tokens:,.0f} tokens an epoch; about {steps:,} steps"),
            (
                "time",
                f"about {console.duration(seen * operations(plan) / SPEED[plan.run.device] / busy)}, {speed(plan)}"
                + (f", on {busy} processes if what they send costs nothing (it does)" if busy > 1 else ""),
            ),
        ]
    need = trained * (6 if "8bit" in plan.run.optimizer else 12)
    disk = (train.save_total_limit + 2) * need + trained * 4
    lines.append(
        (
            "disk",
            f"{console.size(disk)} for checkpoints and export; {console.size(2 * shape.total)} more for make merge",
        )
    )
    return lines


def operations(plan: Plan) -> float:
    """Floating-point operations a token: 2 a weight forward, 2 for the activations' gradients, 2 for trained weights' own."""
    passes = 2 + (1 if plan.run.checkpointing else 0) + (1 if plan.run.mode == "full" else 0)
    return 2.0 * passes * (plan.shape.in_linears + plan.shape.embedding)


def speed(plan: Plan) -> str:
    device = plan.run.device
    return f"if the {device} does {SPEED[device] / 1e12:g} TFLOP/s in training (assumed, not measured): {SPEED[device] / operations(plan):,.0f} tokens/s"


def rows_in_data(config: "Config") -> tuple[int, float] | None:
    """Train rows and their tokens (the mean of all rows), where render has counted them."""
    manifest: dict[str, Any] | None = stages.read_manifest(stages.folder("render", data_name(config)))
    if manifest is None or not manifest["splits"].get("train"):
        return None
    count = manifest["splits"]["train"]
    return count, manifest["tokens"]["total"] * count / max(sum(manifest["splits"].values()), 1)


def show_remedies(plan: Plan) -> None:
    found = planning.remedies(plan)
    if found:
        cells = [(words, price, console.size(new.memory.peak)) for words, price, new in found]
        console.table("change, in order of cost, each with those above", ("SET", "price", "peak then"), cells, left=2)
    if not found or not found[-1][2].fits:
        console.result("none of the settings is enough: take a smaller model, or a larger card")
        return
    console.result(f'so: SET="{" ".join(words for words, _, _ in found)}"')


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
