"""What each of SFT-Play's levers gives, what a shared beginning gives, and what a token costs as rows grow: in this process, on one
loaded model, each variant from the same weights over the same steps."""

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.rows import GROUP, ROOT, Job, Rows, encode, make_job
from scripts.utils.encoding import Encoded

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_WORDS = (
    "Answer the question as a patient teacher would, with an example where it helps, and say so when you are not sure. "
)
_STEPS = 4  # optimizer steps that are timed, after one that is not


@dataclass(frozen=True)
class Variant:
    """How a step is computed; the beginning is SFT-Play's own way."""

    name: str
    packed: bool = True
    shared: bool = True
    segments: bool = True
    chunked: bool = True
    checkpointing: bool = False
    optimizer: str = "adamw_torch"


VARIANTS = (
    Variant("all levers"),
    Variant("shared beginnings repeated (share_prefix off)", shared=False),
    Variant("dense mask over the row (segments off, so share_prefix too)", shared=False, segments=False),
    Variant("whole logits (no chunks)", chunked=False),
    Variant("padded (packing off)", packed=False, shared=False, segments=False),
    Variant("none of these", packed=False, shared=False, segments=False, chunked=False),
    Variant("gradient checkpointing on", checkpointing=True),
    Variant("optimizer adamw_torch_fused", optimizer="adamw_torch_fused"),
)


def load(job: Job) -> Any:
    """The model with its adapter, as train builds it."""
    from scripts.utils import backends, hardware
    from scripts.utils.config import load_config

    words = f"tuning.mode=lora train.gradient_checkpointing=false train.precision={job.precision} lora.r={job.rank} lora.alpha={job.alpha}"
    config = load_config(ROOT / "configs" / "base.yaml", words, {})
    return backends.load_for_training(config, Path(job.model), "bitsandbytes", job.precision, hardware.detect()).model


def run_steps(model: Any, steps: Sequence[Sequence[Encoded]], variant: Variant, job: Job) -> tuple[float, int | None]:
    """Seconds for all steps but the first, and the most memory meanwhile (bytes; None where the system does not tell)."""
    import torch

    from scripts.utils.attention import by_segment
    from scripts.utils.loss import on_device, summed_loss, whole_loss
    from scripts.utils.packing import rows_in_order, to_padded, to_row

    trained = [p for p in model.parameters() if p.requires_grad]
    kept, device = [p.detach().clone() for p in trained], trained[0].device
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0, fused="fused" in variant.optimizer)
    model.train()
    if variant.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _forget_peak()
    start = 0.0
    for number, examples in enumerate(steps):
        start = time.perf_counter() if number == 1 else start
        count = sum(example.trained_tokens for example in examples)
        order = rows_in_order(examples, range(len(examples)), job.pack_length, variant.shared) if variant.packed else []
        with by_segment(model, variant.segments):
            for row in order or [range(len(examples))]:
                part = [examples[i] for i in row]
                tensors = on_device(to_row(part, variant.shared) if variant.packed else to_padded(part, 0), device)
                with torch.autocast(device.type, torch.bfloat16, enabled=job.precision == "bf16"):
                    loss = (summed_loss if variant.chunked else whole_loss)(model, tensors) / max(count, 1)
                loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    peak = _peak()
    if variant.checkpointing:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    with torch.no_grad():
        for parameter, old in zip(trained, kept, strict=True):
            parameter.copy_(old)
    return seconds, peak


def _forget_peak() -> None:
    """Give freed memory back and begin the high-water mark anew (Linux; proc_pid_clear_refs(5))."""
    if _CLEAR.exists():
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")


def _peak() -> int | None:
    if not _CLEAR.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def in_turn(names: Sequence[str], rounds: int, measure: Callable[[str], tuple[float, int | None]]) -> dict[str, Any]:
    """Each name once a round, the order turned each time; medians of seconds and peak."""
    found: dict[str, list[tuple[float, int | None]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(measure(name))
            print(f"bench: {name}: {found[name][-1][0]:.1f} s", file=sys.stderr, flush=True)
    return {
        name: {
            "seconds": statistics.median(seconds for seconds, _ in runs),
            "peak_bytes": None if runs[0][1] is None else statistics.median(peak or 0 for _, peak in runs),
        }
        for name, runs in found.items()
    }


def levers(arguments: argparse.Namespace, base: Path, rows: Rows, model: Path) -> tuple[str, dict[str, Any], str]:
    from benchmarks import results

    job = make_job(model, rows, arguments.precision, arguments.max_length)
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
                _gib(row["peak_bytes"]),
            ]
            for name, row in middle.items()
        ],
    )
    found = {"machine": results.machine(), "date": date.today().isoformat(), "job": asdict(job), "medians": middle}
    why = f"{len(steps) - 1} steps of {GROUP} rows of `{Path(arguments.raw).name}`, {tokens:,} tokens"
    return f"levers-{job.precision}", found, _part(f"Lever by lever in {job.precision}", text, why, arguments)


def prefix(arguments: argparse.Namespace, base: Path, rows: Rows, model: Path) -> tuple[str, dict[str, Any], str]:
    from benchmarks import results

    job = make_job(model, rows, arguments.precision, arguments.max_length)
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
                _gib(with_it["peak_bytes"]),
                _gib(without["peak_bytes"]),
            ]
        )
    text = results.table(
        ["tokens of the system prompt", "faster", "real tokens/s, once", "repeated", "peak memory, once", "repeated"],
        lines,
    )
    found = {"machine": results.machine(), "date": date.today().isoformat(), "job": asdict(job), "medians": medians}
    why = f"steps of {GROUP} rows of `{Path(arguments.raw).name}` behind one system prompt"
    return "prefix", found, _part(f"A shared beginning, in {job.precision}", text, why, arguments)


def context(arguments: argparse.Namespace, base: Path, rows: Rows, model: Path) -> tuple[str, dict[str, Any], str]:
    """With gradient checkpointing, so that the longest fits; the operations that a token needs grow with the length by attention alone."""
    from benchmarks import flops, results

    job = make_job(model, rows, arguments.precision, arguments.max_length)
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
                _gib(row["peak_bytes"]),
            ]
            for name, row in middle.items()
        ],
    )
    found = {"machine": results.machine(), "date": date.today().isoformat(), "job": asdict(job), "medians": middle}
    why = "one row a step, half of it with loss, gradient checkpointing on"
    return "context", found, _part(f"Long rows, in {job.precision}", text, why, arguments)


def groups(examples: Sequence[Encoded]) -> list[list[Encoded]]:
    """Whole optimizer steps of ``GROUP`` examples, the first one to warm up."""
    whole = len(examples) // GROUP
    return [list(examples[step * GROUP : (step + 1) * GROUP]) for step in range(min(whole, _STEPS + 1))]


def system_prompt(model: Path, tokens: int) -> str:
    """A text of about so many tokens."""
    from scripts.utils import chat

    tokenizer = chat.load_tokenizer(model)
    ids = tokenizer(_WORDS * (tokens // 15 + 1), add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[:tokens])).strip()


def _gib(peak: float | None) -> str:
    return "–" if peak is None else f"{peak / 2**30:.2f} GiB"


def _part(title: str, text: str, why: str, arguments: argparse.Namespace) -> str:
    from benchmarks import results

    ended = f"{why}; medians of {arguments.rounds} rounds. {results.machine()}, {date.today().isoformat()}."
    return f"### {title}\n\n{text}\n\n{ended[0].upper()}{ended[1:]}\n"
