"""Whether Unsloth works here, found out in a child process before this one imports anything heavy.

The child (``unsloth_child``) trains one step of a tiny model of the wanted architecture. Its verdict is kept in
.cache/probes, under a key of all that can change it: a working one for good, a failing one for an hour, as the user
may have mended something that has no version. A crash or a hang is never kept.
"""

import contextlib
import os
import platform
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scripts.utils import console, files, hardware, trial
from scripts.utils.errors import MachineError, RefusedError

if TYPE_CHECKING:
    from scripts.utils.schema import Config

Kind = Literal["absent", "accelerator", "import", "architecture", "step", "crash", "hang"]
SECONDS = 300  # 25 s on two slow cores; 117 s on an H100, where the kernels are compiled first
_TRUSTED_SECONDS = 3600
_PACKAGES = (
    "unsloth unsloth_zoo torch transformers peft bitsandbytes xformers triton torchvision flash_attn trl accelerate"
).split()
_SWITCHES = ("CUDA_VISIBLE_DEVICES", "PYTHONPATH")  # and UNSLOTH_*


@dataclass(frozen=True)
class Verdict:
    """``reason`` is one line, None where Unsloth works; ``xformers`` is on, off: <reason>, or not installed.

    ``tried`` says how far the probe could go; ``attention`` and ``precision`` are what the tiny model really had.
    """

    reason: str | None = None
    kind: Kind | None = None
    xformers: str = "not installed"
    attention: str | None = None
    precision: str | None = None
    tried: str = ""

    @property
    def works(self) -> bool:
        return self.reason is None


def verdict(config: "Config", model: Path, *, fresh: bool = False, seconds: float = SECONDS) -> Verdict:
    """Ask the cache, then the child. ``model`` is a local folder with config.json and tokenizer; ``fresh`` renews."""
    xformers = "not installed" if find_spec("xformers") is None else "not tried"
    if find_spec("unsloth") is None:
        return Verdict("it is not installed", "absent", xformers)
    path = cache_folder() / f"{key(config, model)}.json"
    if not fresh and (known := _kept(path)):
        return known
    console.note(
        "train",
        "trying Unsloth on a tiny model of this architecture first: up to two minutes, and kept for the next time",
    )
    question = {"config": config.model_dump(), "model": str(model), "xformers_off": None}
    found, stage = _ask(question, seconds)
    about_xformers = stage == "xformers" or "memory_efficient_attention" in (found.reason or "")
    if not found.works and about_xformers and not found.xformers.startswith("off"):
        # xformers took the child down, or only fails in the model's own shapes: once more without it
        found, _ = _ask({**question, "xformers_off": found.reason}, seconds)
    if found.kind not in ("crash", "hang"):
        with contextlib.suppress(OSError, MachineError):  # a cache only: a read-only disk must not stop a run
            files.write_json(path, {"at": time.time(), **asdict(found)})
    return found


def cache_folder() -> Path:
    return files.REPO_ROOT / ".cache" / "probes"


def _kept(path: Path) -> Verdict | None:
    try:
        entry = files.read_json(path)
        at = entry.pop("at")
        kept = Verdict(**entry)
    except (OSError, RefusedError, TypeError, KeyError, AttributeError):
        return None
    return kept if kept.works or 0 <= time.time() - at < _TRUSTED_SECONDS else None


def key(config: "Config", model: Path) -> str:
    """Hash of all that can change the verdict."""
    train = config.train
    return files.sha256_json(
        {
            "python": [platform.python_version(), sys.prefix],
            "versions": {name: version(name) for name in _PACKAGES},
            "device": hardware.nvidia("name", "driver_version") or hardware.cpu_name(),
            "precision": [train.precision, train.bf16, train.fp16],
            "tuning": [config.tuning.mode, config.model.attention, train.gradient_checkpointing],
            "architecture": (model / "config.json").read_text(encoding="utf-8"),
            "switches": {
                name: value for name, value in os.environ.items() if name.startswith("UNSLOTH_") or name in _SWITCHES
            },
        }
    )[:32]


def version(package: str) -> str | None:
    from importlib import metadata  # brings email and more along, which --help need not wait for

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _ask(question: dict[str, Any], seconds: float) -> tuple[Verdict, str]:
    """Run the child to its end; the verdict, and the stage that it came to."""
    # a folder of its own: Unsloth writes its compiled code into the current one
    with tempfile.TemporaryDirectory(prefix="sft-probe-") as folder:
        begun = trial.start("scripts.utils.unsloth_child", question=question, folder=Path(folder))
        ended = trial.finish(begun, seconds)
    stage = ended.get("stage") or "start"
    if ended.said and "verdict" in ended.said[-1]:
        return Verdict(**ended.said[-1]["verdict"]), stage
    where = f"while it was trying {_STAGES[stage]}"
    if ended.code is None:
        return Verdict(f"its trial did not end within {seconds:g} seconds ({where})", "hang"), stage
    if ended.code < 0:
        return Verdict(f"its trial was ended by {signal.Signals(-ended.code).name} {where}", "crash"), stage
    return Verdict(f"its trial ended with code {ended.code} {where}: {ended.last}", "crash"), stage


_STAGES = {
    "start": "to start",
    "xformers": "the attention of xformers",
    "import": "its import",
    "model": "to load a tiny model",
    "step": "one step on a tiny model",
}
