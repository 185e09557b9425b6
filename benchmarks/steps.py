"""Optimizer steps in this process, on one loaded model, each variant from the same weights over the same examples."""

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.measured import status
from benchmarks.rows import GROUP, ROOT, Job
from scripts.utils.encoding import Encoded

_CLEAR = Path("/proc/self/clear_refs")
_STEPS = 4  # optimizer steps that are timed, after one that is not


@dataclass(frozen=True)
class Variant:
    """How a step is computed; the beginning is SFT-Play's own way."""

    name: str
    packed: bool = True
    shared: bool = True
    segments: bool = True
    chunked: bool = True
    lean: bool = True
    kernel: bool = True
    checkpointing: bool = False
    optimizer: str = "adamw_torch"


VARIANTS = (
    Variant("all levers"),
    Variant("shared beginnings repeated (share_prefix off)", shared=False),
    Variant("dense mask over the row (segments off, so share_prefix too)", shared=False, segments=False),
    Variant("whole logits (no chunks)", chunked=False),
    Variant("PEFT's own adapter (lean_lora off)", lean=False),
    Variant("padded (packing off)", packed=False, shared=False, segments=False),
    Variant("none of these", packed=False, shared=False, segments=False, chunked=False, lean=False),
    Variant("segments one by one (no variable-length kernel; CUDA only)", kernel=False),
    Variant("gradient checkpointing on", checkpointing=True),
    Variant("optimizer adamw_torch_fused", optimizer="adamw_torch_fused"),
)


def load(job: Job) -> Any:
    """The model with its adapter, as train builds it."""
    from scripts.utils import backends, hardware
    from scripts.utils.config import load_config

    words = f"tuning.mode={job.mode} train.gradient_checkpointing=false train.precision={job.precision} lora.r={job.rank} lora.alpha={job.alpha}"
    config = load_config(ROOT / "configs" / "base.yaml", words, {})
    return backends.load_for_training(config, Path(job.model), "bitsandbytes", job.precision, hardware.detect()).model


def run_steps(model: Any, steps: Sequence[Sequence[Encoded]], variant: Variant, job: Job) -> tuple[float, int | None]:
    """Seconds for all steps but the first, and the most memory meanwhile (bytes; None where the system does not tell)."""
    import torch

    from scripts.utils.attention import by_segment, has_kernel
    from scripts.utils.lean_lora import lean
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
    start, kernel = 0.0, variant.kernel and has_kernel(model)
    for number, examples in enumerate(steps):
        if number == 1:
            _wait()
            start = time.perf_counter()
        count = sum(example.trained_tokens for example in examples)
        order = rows_in_order(examples, range(len(examples)), job.pack_length, variant.shared) if variant.packed else []
        with by_segment(model, variant.segments, kernel), lean(model, variant.lean):
            for row in order or [range(len(examples))]:
                part = [examples[i] for i in row]
                tensors = on_device(to_row(part, variant.shared) if variant.packed else to_padded(part, 0), device)
                with torch.autocast(device.type, torch.bfloat16, enabled=job.precision == "bf16"):
                    loss = (summed_loss if variant.chunked else whole_loss)(model, tensors) / max(count, 1)
                loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _wait()
    seconds = time.perf_counter() - start
    peak = status("VmHWM") if _CLEAR.exists() else None
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    if variant.checkpointing:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    with torch.no_grad():
        for parameter, old in zip(trained, kept, strict=True):
            parameter.copy_(old)
    return seconds, peak


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget_peak() -> None:
    """Give freed memory back and begin the high-water mark anew (Linux; proc_pid_clear_refs(5))."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if _CLEAR.exists():
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")


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


def groups(examples: Sequence[Encoded]) -> list[list[Encoded]]:
    """Whole optimizer steps of ``GROUP`` examples, the first one to warm up."""
    whole = len(examples) // GROUP
    return [list(examples[step * GROUP : (step + 1) * GROUP]) for step in range(min(whole, _STEPS + 1))]


def gib(peak: float | None) -> str:
    return "–" if peak is None else f"{peak / 2**30:.2f} GiB"


def part(title: str, text: str, why: str, arguments: argparse.Namespace) -> str:
    from benchmarks import results

    ended = f"{why}; {results.of_rounds(arguments.rounds)}. {results.machine()}, {date.today().isoformat()}."
    return f"### {title}\n\n{text}\n\n{ended[0].upper()}{ended[1:]}\n"
