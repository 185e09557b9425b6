"""plan: what training will take, before anything is trained: memory by part, steps, hours, disk, and does it fit.

Reads the model's config.json and the manifest in data/rendered where there is one; loads no weights and writes nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, forecast, hardware, launching, planning
from scripts.utils.planning import Plan

if TYPE_CHECKING:
    from scripts.utils.schema import Config


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
    machine = forecast.imagined(arguments.gpu_gb) if arguments.gpu_gb else hardware.detect()
    precision = hardware.choose_precision(config, machine)
    plan = forecast.plan_of(config, machine, precision.actual, launching.layout().world)
    show_memory(plan)
    console.facts("the run", facts(plan, precision))
    console.result()
    console.result(plan.verdict())
    if plan.fits:
        return 0
    show_remedies(plan)
    return 4


def show_memory(plan: Plan) -> None:
    always = [(name, console.size(count)) for name, count in plan.memory.always.items() if count]
    turns = [
        (f"  {name}" + (" (counts)" if name == plan.memory.largest_turn else ""), console.size(count))
        for name, count in plan.memory.turns.items()
    ]
    rows = [*always, ("on top of it, one at a time:", ""), *turns, ("predicted peak", console.size(plan.memory.peak))]
    console.table("predicted memory", ("part", "size"), rows)


def facts(plan: Plan, precision: hardware.PrecisionChoice) -> list[tuple[str, object]]:
    config, shape = plan.config, plan.shape
    trained = forecast.trained_weights(plan)
    adapter = 0 if config.tuning.mode == "full" else trained
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
        if config.train.parallel == "deepspeed":
            engine = "ZeRO: each holds the whole model; counted as DDP, which takes more"
        lines.append(("processes", f"{processes}; the memory above is that of one. {engine}"))
    if plan.memory.host:
        each = f", for each of the {processes} processes" if processes > 1 else ""
        lines.append(("host memory", f"{console.size(plan.memory.host)} for what does not lie on the card{each}"))
    work = forecast.work_of(plan)
    if work is None:
        lines.append(("rows, steps", "unknown: no rendered rows (make render)"))
    else:
        lines += [
            (
                "rows, steps",
                f"{work.rows:,} train rows, about {work.tokens:,.0f} tokens an epoch; about {work.steps:,} steps",
            ),
            ("time", f"about {console.duration(work.seconds)}, {forecast.speed(plan)}{forecast.together(plan)}"),
        ]
    lines.append(
        (
            "disk",
            f"{console.size(forecast.disk(plan))} for checkpoints and export; {console.size(forecast.merged(plan))} more for make merge",
        )
    )
    return lines


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
