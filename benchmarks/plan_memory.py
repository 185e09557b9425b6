"""Peak memory of real training steps on the CPU beside what ``make plan`` predicts for them.

    python -m benchmarks.plan_memory

Each combination runs in a process of its own: a random model (or the embedded one) is loaded as train loads it and makes two
optimizer steps of two full rows each. Measured is the peak of resident memory from the loaded model on (VmHWM of
/proc/self/status, Linux only), less what the process held before the model was there. glibc gives freed memory back at
once here (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_), so that the peak is of live tensors, as a GPU's allocator
counts them; ``--plain`` leaves malloc as it is.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import status

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = "embedded/smollm2-135m-instruct"
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
Combination = tuple[Any, str, int, bool, str]
# model (None: the embedded one; else hidden, intermediate, layers, heads, kv heads, vocabulary, tied), mode, tokens, checkpointing, precision
_TINY = (64, 128, 2, 2, 2, 500, True)
_SMALL = (256, 688, 6, 4, 4, 16000, True)
_MIDDLE = (512, 1408, 8, 8, 2, 32000, False)
_LARGE = (768, 2048, 10, 12, 4, 49152, True)
COMBINATIONS: list[Combination] = [
    (_SMALL, "lora", 2048, False, "fp32"),
    (_SMALL, "full", 512, False, "fp32"),
    (_MIDDLE, "lora", 1024, False, "fp32"),
    (_MIDDLE, "lora", 1024, False, "bf16"),
    (_MIDDLE, "qlora", 1024, False, "fp32"),
    (_MIDDLE, "qlora", 2048, True, "bf16"),
    (_MIDDLE, "full", 1024, True, "fp32"),
    (_LARGE, "lora", 512, False, "fp32"),
    (_LARGE, "lora", 2048, True, "fp32"),
    (_SMALL, "full", 1024, False, "bf16"),
    (None, "lora", 256, False, "fp32"),
    (None, "lora", 512, True, "fp32"),
]


def make_config(model: str, mode: str, tokens: int, checkpointing: bool, precision: str) -> Any:
    from scripts.utils.schema import Config

    return Config.model_validate(
        {
            "model": {"name": model},
            "render": {"max_length": tokens},
            "tuning": {"mode": mode},
            "train": {"gradient_checkpointing": checkpointing, "precision": precision, "optimizer": "adamw_torch"},
        }
    )


def save_random(shape: tuple[Any, ...], precision: str, folder: Path) -> None:
    """A random Llama of this shape, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = shape
    torch.set_default_dtype({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=tied,
        )
    ).save_pretrained(folder)


def memory_line(name: str) -> int:
    found = status(name)
    if found is None:
        raise SystemExit(f"no {name} in /proc/self/status: this benchmark needs Linux")
    return found


def train_steps(config: Any, path: Path, precision: str, tokens: int, examples: int = 4) -> None:
    """On the CPU, with the peak of resident memory counted from the loaded model on."""
    import gc

    from scripts.utils import backends, hardware

    machine = hardware.Hardware("cpu", "CPU", 2**40)
    loaded = backends.load_for_training(config, path, "bitsandbytes", precision, machine)  # type: ignore[arg-type]
    # out of the file's mapping, whose pages stay beside 4-bit weights until the system wants them back
    for parameter in loaded.model.parameters():
        if type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.clone()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    make_steps(loaded.model, config, precision, tokens, examples)


def make_steps(model: Any, config: Any, precision: str, tokens: int, examples: int = 4) -> None:
    """Two optimizer steps of two micro batches on one row of ``tokens``, all of them trained, as train makes them."""
    import contextlib
    import random

    import torch

    from scripts.utils.attention import by_segment, has_kernel
    from scripts.utils.encoding import Encoded
    from scripts.utils.lean_lora import lean
    from scripts.utils.loss import on_device, summed_loss
    from scripts.utils.offload import activations_on_host
    from scripts.utils.packing import to_row

    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    model.train()
    if "8bit" in config.train.optimizer:
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(trained, lr=1e-4, is_paged="paged" in config.train.optimizer)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    size, vocabulary = tokens // examples, model.config.vocab_size
    draw = random.Random(0)
    row = to_row([Encoded([draw.randrange(vocabulary) for _ in range(size)], [True] * size) for _ in range(examples)])
    row = on_device(row, device)
    mixed = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    offloads = config.train.activation_offload and device.type == "cuda"
    with by_segment(model, kernel=has_kernel(model)), lean(model):
        for _ in range(2):  # Adam's states are there from the second on
            for _ in range(2):  # micro batches
                with mixed, activations_on_host(model, offloads):
                    loss = summed_loss(model, row) / tokens
                loss.backward()
                del loss
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def measure_here(tiny: str, model: str, mode: str, tokens: int, checkpointing: bool, precision: str) -> int:
    """Bytes at the peak above what the libraries took; a tiny model of the same kind has made its steps before."""
    train_steps(make_config(tiny, mode, 64, checkpointing, precision), Path(tiny), precision, 64)
    gc.collect()
    before = memory_line("VmRSS")
    train_steps(make_config(model, mode, tokens, checkpointing, precision), Path(model), precision, tokens)
    return memory_line("VmHWM") - before


def child(what: str, *arguments: Any, plain: bool = False) -> str:
    """Do ``what`` in a new process and return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in _GIVE_BACK}
    environment = {**kept, **({} if plain else _GIVE_BACK), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait must not take the processor from others
    words = [sys.executable, "-m", "benchmarks.plan_memory", "--child", json.dumps([what, *arguments])]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout


def measure_all(combinations: Sequence[Combination], plain: bool = False) -> Iterator[tuple[Combination, int, int]]:
    """Each combination with the predicted and the measured bytes."""
    from scripts.utils import architecture, model_store

    with tempfile.TemporaryDirectory(prefix="sft-plan-") as name:
        folder = Path(name)
        paths = {(_TINY, p): folder / f"tiny-{p}" for p in ("fp32", "bf16")}
        for number, (shape, *_, precision) in enumerate(combinations):
            new = folder / f"model-{number}" if shape else model_store.resolve(EMBEDDED).path
            paths.setdefault((shape, precision), new)
        child("make", [(shape, precision, str(path)) for (shape, precision), path in paths.items() if shape])
        for combination in combinations:
            shape, *settings, precision = combination
            path = paths[shape, precision]
            words = [str(paths[_TINY, precision]), str(path), *settings, precision]
            used = int(child("measure", *words, plain=plain).split()[-1])
            names = ("mode", "tokens", "checkpointing", "precision")
            known = dict(zip(names, combination[1:], strict=True))
            guess = predicted(architecture.read(path), device="cpu", optimizer="adamw_torch", **known)
            yield combination, guess, used


def predicted(shape: Any, **setting: Any) -> int:
    """Bytes, less the libraries, which the measurements leave out too; ``setting`` as in memory.Setting, r = 16, four examples a row."""
    from scripts.utils import memory

    run = memory.Setting(longest=setting["tokens"] // 4, rank=16, targets=None, dropout=False, **setting)
    found = memory.predict(shape, run)
    return found.peak - found.always["framework"]


def as_child(words: str) -> None:
    what, *arguments = json.loads(words)
    if what == "make":
        for shape, precision, path in arguments[0]:
            save_random(shape, precision, Path(path))
    else:
        print(measure_here(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="malloc as it is, which keeps what was freed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        as_child(arguments.child)
        return
    print("| model | tuning | tokens | checkpointing | precision | predicted | measured | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (shape, mode, tokens, checkpointing, precision), guess, used in measure_all(COMBINATIONS, arguments.plain):
        name = f"Llama {shape[0]} x {shape[2]}" if shape else "SmolLM2-135M"
        facts = [name, mode, f"{tokens:,}", "on" if checkpointing else "off", precision]
        sizes = [f"{guess / 2**20:,.0f} MiB", f"{used / 2**20:,.0f} MiB", f"{guess / used - 1:+.1%}"]
        print(f"| {' | '.join([*facts, *sizes])} |", flush=True)


if __name__ == "__main__":
    main()
