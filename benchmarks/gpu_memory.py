"""Peak memory of real training steps on a CUDA card beside what ``make plan`` predicts for them, and a run under a cap.

    python -m benchmarks.gpu_memory                  # the table
    python -m benchmarks.gpu_memory --only 8B        # rows whose name holds 8B
    python -m benchmarks.gpu_memory --cap 8 --model FOLDER --raw FILE    # train as a card of 8 GiB would have to

Measured is torch's own count of live bytes (``max_memory_allocated``) from the loaded model on; what the allocator reserved and
what the card lost beside it (context, kernels, libraries) stand next to it. Models are random Llamas with the dimensions of
the named ones; ``--work`` holds their files meanwhile. The cap is the allocator's (``set_per_process_memory_fraction``) and so
no small card: fragmentation is as real, the time of a small card is not.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.plan_memory import ROOT, make_steps, predicted
from benchmarks.rows import clean_environment

# hidden, intermediate, layers, heads, kv heads, vocabulary, tied
SHAPES: dict[str, tuple[Any, ...]] = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
}
# model, mode, tokens, checkpointing, precision, optimizer, embeddings, offload
Combination = tuple[str, str, int, bool, str, str, str, bool]
COMBINATIONS: list[Combination] = [
    ("0.5B", "full", 1024, False, "bf16", "adamw_torch_fused", "device", False),
    ("0.5B", "full", 2048, True, "bf16", "paged_adamw_8bit", "device", False),
    ("0.5B", "lora", 2048, False, "fp32", "adamw_torch_fused", "device", False),
    ("1.5B", "lora", 2048, False, "bf16", "adamw_torch_fused", "device", False),
    ("1.5B", "qlora", 2048, False, "bf16", "adamw_torch_fused", "device", False),
    ("1.5B", "qlora", 2048, True, "bf16", "paged_adamw_8bit", "device", False),
    ("1.5B", "qlora", 8192, True, "bf16", "adamw_8bit", "device", False),
    ("1.5B", "qlora", 8192, True, "bf16", "paged_adamw_8bit", "device", True),
    ("3B", "qlora", 2048, True, "bf16", "paged_adamw_8bit", "device", False),
    ("8B", "qlora", 2048, True, "bf16", "paged_adamw_8bit", "device", False),
    ("8B", "qlora", 2048, True, "bf16", "paged_adamw_8bit", "host", False),
]


def make_model(name: str, folder: Path) -> Path:
    """A random Llama of this size in bf16, made on the card."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[name]
    shape = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied, max_position_embeddings=8192,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(shape)
    torch.set_default_dtype(torch.float32)
    path = folder / name
    model.save_pretrained(path)
    del model
    clean()
    return path


def clean() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def config_of(path: Path, combination: Combination) -> Any:
    from scripts.utils.schema import Config

    _, mode, tokens, checkpointing, precision, optimizer, embeddings, offload = combination
    train = {"gradient_checkpointing": checkpointing, "precision": precision, "optimizer": optimizer}
    return Config.model_validate(
        {
            "model": {"name": str(path), "embeddings": embeddings},
            "render": {"max_length": tokens},
            "tuning": {"mode": mode},
            "train": {**train, "activation_offload": offload},
        }
    )


def guessed(path: Path, combination: Combination) -> int:
    """Bytes of live tensors, by plan."""
    from scripts.utils import architecture

    _, mode, tokens, checkpointing, precision, optimizer, embeddings, offload = combination
    return predicted(
        architecture.read(path),
        device="cuda",
        mode=mode,
        precision=precision,
        tokens=tokens,
        checkpointing=checkpointing,
        optimizer=optimizer,
        host_embeddings=embeddings == "host",
        offload=offload,
    )


def measure(path: Path, combination: Combination) -> tuple[int, int, int, int]:
    """Bytes at the peak: live, reserved, the card's beside these; and live ones while the model was loaded."""
    import torch

    from scripts.utils import backends, hardware

    clean()
    torch.cuda.reset_peak_memory_stats()
    config, precision = config_of(path, combination), combination[4]
    loaded = backends.load_for_training(config, path, "bitsandbytes", precision, hardware.detect())  # type: ignore[arg-type]
    loading = torch.cuda.max_memory_allocated()
    clean()
    torch.cuda.reset_peak_memory_stats()
    make_steps(loaded.model, config, precision, combination[2])
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), beside, loading


def table(work: Path, only: str) -> None:
    print(
        "| model | tuning | tokens | checkpointing | precision | optimizer | embeddings, activations | predicted | measured | ratio | reserved | beside | loading |"
    )
    print("| --- " * 13 + "|")
    paths: dict[str, Path] = {}
    for combination in [c for c in COMBINATIONS if only in c[0]]:
        name, mode, tokens, checkpointing, precision, optimizer, embeddings, offload = combination
        path = paths.get(name) or paths.setdefault(name, make_model(name, work))
        guess = guessed(path, combination)
        live, reserved, beside, loading = measure(path, combination)
        where = f"{embeddings}, {'host' if offload else 'device'}"
        facts = [name, mode, f"{tokens:,}", "on" if checkpointing else "off", precision, optimizer, where]
        sizes = [f"{size / 2**20:,.0f} MiB" for size in (guess, live)]
        rest = [f"{size / 2**20:,.0f} MiB" for size in (reserved, beside, loading)]
        print(f"| {' | '.join([*facts, *sizes, f'{guess / live - 1:+.1%}', *rest])} |", flush=True)


# train, whose allocator may take the bytes of the first word; what the others say goes to train
CAPPED = """
import sys
from scripts import train
from scripts.utils import environment

def prepare(root, real=environment.prepare):
    real(root)
    import torch
    torch.cuda.set_per_process_memory_fraction(float(sys.argv.pop(1)) / torch.cuda.get_device_properties(0).total_memory)

environment.prepare = prepare
words = sys.argv[2:]
raise SystemExit(train.main(words))
"""


def capped(gib: float, model: Path, raw: Path, work: Path, words: str) -> None:
    """process, render and three steps of train, whose allocator may take ``gib`` less the framework, on the settings of the plan."""
    from scripts.utils import memory

    settings = {
        "run": {"name": "capped"},
        "model": {"name": str(model), "embeddings": "host"},
        "data": {"raw": str(raw.absolute()), "name": "rows"},
        "tuning": {"mode": "qlora"},
        "train": {
            "max_steps": 3, "gradient_accumulation": 2, "precision": "bf16", "optimizer": "paged_adamw_8bit",
            "gradient_checkpointing": True, "logging_steps": 1, "self_test": False, "eval_strategy": "epoch",
        },
    }  # fmt: skip
    (work / "run.yaml").write_text(json.dumps(settings))
    environment = clean_environment(PYTHONPATH=f"{ROOT}:{':'.join(p for p in sys.path if p)}")
    for step in ("process", "render"):
        subprocess.run(
            [sys.executable, str(ROOT / "scripts" / f"{step}.py"), "--config", "run.yaml"],
            cwd=work,
            env=environment,
            check=True,
        )
    room = gib * 2**30 - memory.FRAMEWORK["cuda"]
    start = time.monotonic()
    command = [sys.executable, "-c", CAPPED, str(room), "--config", "run.yaml", *(["--set", words] if words else [])]
    done = subprocess.run(command, cwd=work, env=environment)
    print(f"cap {room / 2**30:.2f} GiB: exit code {done.returncode}, {time.monotonic() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose model's name holds this")
    parser.add_argument("--work", type=Path, help="folder for the models (a temporary one)")
    parser.add_argument("--cap", type=float, help="GiB of the card that is not there")
    parser.add_argument("--model", type=Path, help="model folder with a tokenizer, for --cap")
    parser.add_argument("--raw", type=Path, default=ROOT / "data" / "sample", help="rows, for --cap")
    parser.add_argument("--set", default="", dest="words", help="settings for --cap: 'render.max_length=4096'")
    arguments = parser.parse_args()
    from scripts.utils import environment

    environment.prepare(ROOT)
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA card here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(prefix="sft-gpu-", dir=arguments.work) as name:
        if arguments.cap:
            capped(arguments.cap, arguments.model, arguments.raw, Path(name), arguments.words)
        else:
            table(arguments.work or Path(name), arguments.only)


if __name__ == "__main__":
    main()
