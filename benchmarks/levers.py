"""What each of SFT-Play's levers gives, what a shared beginning gives, and what a token costs as rows grow."""

import argparse
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.rows import GROUP, Rows, encode, make_job
from benchmarks.steps import VARIANTS, Variant, gib, groups, in_turn, load, part, run_steps
from scripts.utils.encoding import Encoded

_WORDS = (
    "Answer the question as a patient teacher would, with an example where it helps, and say so when you are not sure. "
)


def levers(arguments: argparse.Namespace, base: Path, rows: Rows, model: Path) -> tuple[str, dict[str, Any], str]:
    from benchmarks import results

    job = make_job(model, rows, arguments)
    loaded = load(job)
    steps = groups(rows.encoded)
    known = {variant.name: variant for variant in VARIANTS}
    middle = in_turn(list(known), arguments.rounds, lambda name: run_steps(loaded, steps, known[name], job))
    tokens = sum(len(example.ids) for step in steps[1:] for example in step)
    first = middle[VARIANTS[0].name]
    text = results.table(
        ["", "real tokens/s", "of all levers' speed", "peak memory"],
        [
            [
                name,
                f"{tokens / row['seconds']:,.1f}",
                f"{first['seconds'] / row['seconds']:.2f}×",
                gib(row["peak_bytes"]),
            ]
            for name, row in middle.items()
        ],
    )
    found = {"machine": results.machine(), "date": date.today().isoformat(), "job": asdict(job), "medians": middle}
    why = f"{len(steps) - 1} steps of {GROUP} rows of `{Path(arguments.raw).name}`, {tokens:,} tokens"
    return f"levers-{job.precision}", found, part(f"Lever by lever in {job.precision}", text, why, arguments)


def prefix(arguments: argparse.Namespace, base: Path, rows: Rows, model: Path) -> tuple[str, dict[str, Any], str]:
    from benchmarks import results

    job = make_job(model, rows, arguments)
    loaded = load(job)
    lines, medians = [], {}
    for wanted in arguments.prefix:
        system = system_prompt(model, wanted)
        examples = encode(model, rows.train, system)
        tokens = [len(example.ids) for example in examples]
        wide = replace(job, pack_length=GROUP * sum(tokens) // len(tokens) + 1)
        steps = groups(examples)
        once, repeated = VARIANTS[0], VARIANTS[1]
        by_name = {f"{wanted} tokens, once": once, f"{wanted} tokens, repeated": repeated}
        middle = in_turn(
            list(by_name),
            arguments.rounds,
            lambda name, steps=steps, wide=wide, by_name=by_name: run_steps(loaded, steps, by_name[name], wide),
        )
        medians |= middle
        real = sum(len(example.ids) for step in steps[1:] for example in step)
        with_it, without = middle.values()
        lines.append(
            [
                f"{wanted}",
                f"{without['seconds'] / with_it['seconds']:.2f}×",
                f"{real / with_it['seconds']:,.1f}",
                f"{real / without['seconds']:,.1f}",
                gib(with_it["peak_bytes"]),
                gib(without["peak_bytes"]),
            ]
        )
    text = results.table(
        ["tokens of the system prompt", "faster", "real tokens/s, once", "repeated", "peak memory, once", "repeated"],
        lines,
    )
    found = {"machine": results.machine(), "date": date.today().isoformat(), "job": asdict(job), "medians": medians}
    why = f"steps of {GROUP} rows of `{Path(arguments.raw).name}` behind one system prompt"
    return "prefix", found, part(f"A shared beginning, in {job.precision}", text, why, arguments)


def context(arguments: argparse.Namespace, base: Path, rows: Rows, model: Path) -> tuple[str, dict[str, Any], str]:
    """With gradient checkpointing, so that the longest fits; the operations that a token needs grow with the length by attention alone."""
    from benchmarks import flops, results

    job = make_job(model, rows, arguments)
    loaded, shape = load(job), flops.shape_of(model, job.rank)
    stream = [token for example in rows.encoded for token in example.ids]
    lengths = {f"{length:,} tokens": length for length in arguments.context}

    def measure(name: str) -> tuple[float, int | None]:
        length = lengths[name]
        ids = (stream * (length // len(stream) + 1))[:length]
        # the second half carries loss; a step without a measured time warms up
        example = Encoded(ids, [place >= length // 2 for place in range(length)])
        return run_steps(
            loaded, [[example], [example]], Variant(name, checkpointing=True), replace(job, pack_length=length)
        )

    middle = in_turn(list(lengths), arguments.rounds, measure)
    first = next(iter(lengths))

    def needed(length: int) -> float:
        return shape.step([length], length // 2) / length

    text = results.table(
        ["length of the row", "milliseconds a token", "against the shortest", "operations needed", "peak memory"],
        [
            [
                name,
                f"{1000 * row['seconds'] / lengths[name]:.2f}",
                f"{row['seconds'] / lengths[name] / (middle[first]['seconds'] / lengths[first]):.2f}×",
                f"{needed(lengths[name]) / needed(lengths[first]):.2f}×",
                gib(row["peak_bytes"]),
            ]
            for name, row in middle.items()
        ],
    )
    found = {"machine": results.machine(), "date": date.today().isoformat(), "job": asdict(job), "medians": middle}
    why = "one row a step, half of it with loss, gradient checkpointing on"
    return "context", found, part(f"Long rows, in {job.precision}", text, why, arguments)


def system_prompt(model: Path, tokens: int) -> str:
    """A text of about so many tokens."""
    from scripts.utils import chat

    tokenizer = chat.load_tokenizer(model)
    ids = tokenizer(_WORDS * (tokens // 15 + 1), add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[:tokens])).strip()
