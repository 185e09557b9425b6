"""Environment variables that must be set before torch and transformers are imported, and the .env file.

Standard library only. ``prepare`` refuses to run after a heavy module was imported, so that the order is checked
at every run instead of hoped for.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# of what transformers imports wherever it is installed, and never uses here: torchvision, which stops the import when it
# does not fit torch, and what costs seconds at every start (sklearn and scipy for one way of speculative decoding and for
# losses on pictures, datasets with pandas for Trainer's own column names)
_HIDDEN = ("torchvision", "sklearn", "scipy", "datasets")
_ENGINES = ("deepspeed",)  # Accelerate imports it wherever it is installed; zero.py shows it where a run asks for it
_alone = False
_HEAVY = ("torch", "transformers", "tokenizers", "datasets", "unsloth")

# telemetry is off by default; a user who wants it sets the variable
_DEFAULTS = {
    # threads that wait by spinning slow each other down as soon as anything else runs: beside two busy processes on
    # two cores, waiting asleep was measured 3 times faster
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",  # forks after use warn on every step otherwise
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and through it transformers, trl and trackio
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets and evaluate
    "DO_NOT_TRACK": "1",
    "DISABLE_TELEMETRY": "1",  # diffusers
    "WANDB_DISABLE_CODE": "true",
    "WANDB_ERROR_REPORTING": "false",
    "GRADIO_ANALYTICS_ENABLED": "False",  # trackio's dashboard
    "OTEL_SDK_DISABLED": "true",  # OpenTelemetry, which wandb brings
    "VLLM_NO_USAGE_STATS": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # tensorboard looks for TensorFlow and is told about it in ten lines
    "BITSANDBYTES_NOWELCOME": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # less fragmentation on small cards
}


def read_dotenv(path: Path) -> dict[str, str]:
    """Read ``NAME=value`` lines; quotes around a value are dropped, ``export`` and comments are passed over."""
    values: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        return values
    for line in text.splitlines():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if not equals or name.startswith("#"):
            continue
        value = value.strip()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        if value:
            values[name.strip()] = value
    return values


def prepare(root: Path) -> None:
    """Set what is not set yet; what the user's shell says wins over .env, and .env over the defaults."""
    early = [name for name in _HEAVY if sys.modules.get(name)]
    if early:
        raise RuntimeError(f"environment.prepare must run before {', '.join(early)} is imported")
    for name, value in {**_DEFAULTS, **read_dotenv(root / ".env")}.items():
        os.environ.setdefault(name, value)
    for package in (*_HIDDEN, *_ENGINES):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]
    # on a CPU with AVX-512 BF16 it asks for a kernel from the hub, which is not used here (backends.keep_four_bits)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def serve_one_command() -> None:
    """This process ends with its command, so that ``leave_out`` may hide what the command does not need."""
    global _alone
    _alone = True


def show_hidden(packages: Sequence[str] = _HIDDEN) -> None:
    """Take back what ``prepare`` hid, for those that use it: Unsloth, lm-evaluation-harness and ZeRO."""
    for package in packages:
        if sys.modules.get(package, "") is None:
            del sys.modules[package]


def leave_out(package: str) -> None:
    """Let imports of ``package`` fail from here on, as if it were not installed; libraries that can do without it do.

    Without torch, transformers has tokenizers and no models, at a third of the time and memory; without bitsandbytes,
    PEFT starts a second sooner. Nothing happens where it is there already, or where others share this process.
    """
    if _alone and package not in sys.modules:
        sys.modules[package] = None  # type: ignore[assignment]
        if package == "torch":
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that it found no torch
