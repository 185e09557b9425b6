"""Environment variables that must be set before torch and transformers are imported, and the .env file.

Standard library only. ``prepare`` refuses to run after a heavy module was imported, so that the order is checked
at every run instead of hoped for.
"""

import logging
import os
import sys
from pathlib import Path

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
    # nothing here looks at images, and a torchvision that does not fit torch stops the import of transformers
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    # on a CPU with AVX-512 BF16 it asks for a kernel from the hub, which is not used here (backends.keep_four_bits)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def show_torchvision() -> None:
    """Take back what ``prepare`` hid, for Unsloth."""
    if sys.modules.get("torchvision", "") is None:
        del sys.modules["torchvision"]
