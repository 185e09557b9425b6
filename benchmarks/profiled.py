"""Where the time of a training step goes: torch's profiler over SFT-Play's own steps, by kind of work."""

import argparse
import time
from collections import defaultdict
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.rows import GROUP, Rows, make_job
from benchmarks.steps import VARIANTS, groups, load, run_steps

# the first whose words stand in an operator's name takes it
KINDS = {
    "attention": ("scaled_dot_product", "ShortAttention", "flash_attention"),
    "matrix products": ("mm", "linear", "matmul"),
    "copies and casts": ("copy_", "cat", "contiguous", "clone", "index", "_to_copy", "fill_", "zero_", "gather", "embedding"),
    "softmax of the loss": ("softmax", "exp", "scatter"),
    "optimizer": ("_foreach", "adamw", "lerp", "addcmul", "addcdiv", "norm"),
}  # fmt: skip
OTHER = "element by element (norms, rotary positions, gates, sums)"


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), OTHER)


def profile(arguments: argparse.Namespace, base: Path, rows: Rows, model: Path) -> tuple[str, dict[str, Any], str]:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watched

    from benchmarks import flops, results

    job = make_job(model, rows, arguments)
    loaded, shape = load(job), flops.shape_of(model, job.rank)
    steps = groups(rows.encoded)
    run_steps(loaded, steps, VARIANTS[0], job)  # warm
    start = time.perf_counter()
    seconds, _ = run_steps(loaded, steps, VARIANTS[0], job)
    plain = time.perf_counter() - start
    with watched(activities=[ProfilerActivity.CPU], with_flops=True) as found:
        run_steps(loaded, steps, VARIANTS[0], job)
    spent: dict[str, float] = defaultdict(float)
    operations = 0
    for event in found.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total
        operations += event.flops
    total = sum(spent.values())
    limit = flops.limit(job.precision)
    needed = sum(shape.step([len(e.ids) for e in step], sum(e.trained_tokens for e in step)) for step in steps[1:])
    share = spent["matrix products"] / total
    in_products = operations / (share * plain)
    text = results.table(
        ["kind of work", "share of the time"],
        [[kind, f"{100 * part / total:.0f} %"] for kind, part in sorted(spent.items(), key=lambda item: -item[1])],
    )
    reached = needed / seconds
    text += (
        f"\n\nThe steps reach {reached / 1e9:,.0f} GFLOP/s of work that had to be done, {100 * reached / limit:.0f} % of the {limit / 1e9:,.0f} that large matrix products "
        f"reach here; the products alone run at about {in_products / 1e9:,.0f}. Were all else free, {100 * reached / share / limit:.0f} % would be reached."
    )
    why = f"{len(steps)} steps of {GROUP} rows of `{Path(arguments.raw).name}`, under torch's profiler"
    facts = {"job": asdict(job), "spent": dict(spent), "limit": limit, "reached": reached, "products": in_products}
    facts |= {"machine": results.machine(), "date": date.today().isoformat()}
    ended = f"{why[0].upper()}{why[1:]}. {results.machine()}, {facts['date']}."
    return f"profile-{job.precision}", facts, f"### Where the time goes in {job.precision}\n\n{text}\n\n{ended}\n"
