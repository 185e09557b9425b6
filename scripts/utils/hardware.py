"""What this machine has, and which precision and backend suit it: every choice comes with its reason."""

import contextlib
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scripts.utils import files, ranks
from scripts.utils.errors import MachineError, RefusedError

if TYPE_CHECKING:
    from scripts.utils.schema import Config

Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Hardware:
    """The device that training would use. Memory in bytes; capability as CUDA's (major, minor), or None."""

    device: Literal["cuda", "mps", "cpu"]
    name: str
    memory: int
    capability: tuple[int, int] | None = None
    driver: str | None = None
    cpu_bf16_faster: bool = False


def detect() -> Hardware:
    """Look at the machine; imports torch."""
    import psutil
    import torch

    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        return Hardware(
            "cuda",
            properties.name,
            properties.total_memory,
            (properties.major, properties.minor),
            f"{(nvidia('driver_version').splitlines() or ['unknown'])[0]}, CUDA {torch.version.cuda}",
        )
    memory = psutil.virtual_memory().total
    if torch.backends.mps.is_available():
        return Hardware("mps", platform.processor() or "Apple GPU", memory, driver=f"macOS {platform.mac_ver()[0]}")
    measured = measure_cpu(files.REPO_ROOT / ".cache" / "cpu.json")
    torch.set_num_threads(measured.threads)
    name = f"{cpu_name()}, {measured.threads} threads"
    return Hardware("cpu", name, memory, cpu_bf16_faster=measured.bf16_faster)


def nvidia(*fields: str) -> str:
    """What nvidia-smi says of the cards, a line each, without torch; empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    words = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


@dataclass(frozen=True)
class MeasuredCpu:
    """``threads`` that multiply fastest together; ``bf16_faster``: by a clear margin than fp32."""

    threads: int
    bf16_faster: bool


def measure_cpu(cache: Path) -> MeasuredCpu:
    """What is fastest on this processor: measured once, kept in the file ``cache``. OMP_NUM_THREADS is taken as it stands.

    Measured at every start, a busy moment would give a run another precision than its first part had.
    """
    import torch

    asked = os.environ.get("OMP_NUM_THREADS")
    candidates = [torch.get_num_threads()] if asked else thread_counts()
    key = f"{cpu_name()}, {' or '.join(map(str, candidates))} threads, torch {torch.__version__}"
    with contextlib.suppress(OSError, RefusedError, AttributeError, KeyError, TypeError):
        known = files.read_json(cache)[key]
        return MeasuredCpu(int(known["threads"]), bool(known["bf16_faster"]))
    before, seconds = torch.get_num_threads(), {}
    for count in candidates:
        torch.set_num_threads(count)
        seconds[count] = _multiply_seconds()
    torch.set_num_threads(before)
    threads = min(candidates, key=lambda count: seconds[count]["fp32"])
    # a clear win only: fp32 is exact
    found = MeasuredCpu(threads, seconds[threads]["bf16"] < 0.8 * seconds[threads]["fp32"])
    with contextlib.suppress(OSError, MachineError):  # a read-only disk must not stop a run
        files.write_json(cache, {key: asdict(found)})
    return found


def thread_counts() -> list[int]:
    """Numbers of threads worth a try: one a processor that this process may use, and one a physical core of these."""
    import psutil

    from scripts.utils import workers  # --help does not wait for multiprocessing

    may_use = workers.cores()
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # a container's share of the machine, cgroup 2
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        may_use = max(1, min(may_use, round(int(quota) / int(period))))
    logical, physical = psutil.cpu_count() or may_use, psutil.cpu_count(logical=False) or may_use
    return sorted({may_use, max(1, may_use * physical // logical)}, reverse=True)


def _multiply_seconds() -> dict[str, float]:
    """The best time of a product of a small model's shape in each precision, taken in turn: a few milliseconds each."""
    import time

    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    pairs = {n: (torch.ones(256, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)) for n, dtype in dtypes.items()}
    best = dict.fromkeys(dtypes, 1e9)
    for _ in range(10):
        for name, (left, right) in pairs.items():
            start = time.perf_counter()
            left @ right
            best[name] = min(best[name], time.perf_counter() - start)
            if best[name] > 10 * best["fp32"]:
                return best  # emulated, which takes seconds: one look is enough
    return best


def supported(precision: Precision, hardware: Hardware) -> tuple[bool, str]:
    """Whether the hardware computes in ``precision``, and why (not). bf16 came with Ampere, capability 8.0."""
    if precision == "fp32":
        return True, "fp32 runs everywhere"
    if hardware.device == "cuda":
        major, minor = hardware.capability or (0, 0)
        if precision == "bf16" and major < 8:
            return False, f"{hardware.name} (capability {major}.{minor}) has no bf16; that needs Ampere (8.0) or newer"
        if precision == "fp16" and (major, minor) < (5, 3):
            return False, f"{hardware.name} (capability {major}.{minor}) has no fp16 arithmetic"
        return True, f"{hardware.name} supports {precision}"
    if hardware.device == "mps":
        if precision == "fp16":
            return False, "gradient scaling for fp16 needs CUDA"
        release = (hardware.driver or "").removeprefix("macOS ").partition(".")[0]
        if release.isdigit() and int(release) < 14:
            return False, f"bf16 on an Apple GPU needs macOS 14, this is {hardware.driver}"
        return True, "MPS supports bf16"
    if precision == "fp16":
        return False, "fp16 does not train on a CPU"
    return True, "bf16 runs on this CPU"


def best_precision(hardware: Hardware, mode: str = "lora") -> tuple[Precision, str]:
    """The precision that ``auto`` means on this hardware for this tuning.mode, and why."""
    if hardware.device == "cpu":
        if hardware.cpu_bf16_faster and mode == "full":
            return "fp32", "exact, and beside fp32 weights bf16 gains little on a CPU"
        # it rounds each gradient by several per cent; whole runs learn as well (docs/benchmarks.md, "bf16 beside fp32")
        if hardware.cpu_bf16_faster:
            return "bf16", "measured faster than fp32 on this CPU; train.precision: fp32 is exact"
        return "fp32", "exact, and measured at least as fast as bf16 on this CPU"
    for precision in ("bf16", "fp16"):
        fits, reason = supported(precision, hardware)  # type: ignore[arg-type]
        if fits:
            return precision, reason  # type: ignore[return-value]
    return "fp32", "neither bf16 nor fp16 runs here"


@dataclass(frozen=True)
class PrecisionChoice:
    """``requested`` as the config put it, ``actual`` as it will run; ``changed`` asks for a warning."""

    requested: str
    actual: Precision
    why: str
    changed: bool


def choose_precision(config: "Config", hardware: Hardware, earlier: Precision | None = None) -> PrecisionChoice:
    """Resolve train.precision, train.bf16 and train.fp16 against the hardware; auto stays with a run's ``earlier`` one.

    Raises ``MachineError`` with ``train.precision_strict`` when what was asked for cannot be had.
    """
    train, mode = config.train, config.tuning.mode
    wanted = [name for name in ("bf16", "fp16") if getattr(train, name) or train.precision == name]
    if train.precision == "fp32":
        wanted.append("fp32")
    requested = " and ".join(wanted) or "auto"
    if not wanted:
        actual, why = best_precision(hardware, mode)
        if earlier and earlier != actual and supported(earlier, hardware)[0]:
            actual, why = earlier, "as this run began"
        return PrecisionChoice(requested, actual, why, changed=False)
    fitting = [name for name in wanted if supported(name, hardware)[0]]  # type: ignore[arg-type]
    if len(wanted) == 1 and fitting:
        actual = wanted[0]  # type: ignore[assignment]
        return PrecisionChoice(requested, actual, f"asked for; {supported(actual, hardware)[1]}", changed=False)
    reasons = "; ".join(supported(name, hardware)[1] for name in wanted if name not in fitting)  # type: ignore[arg-type]
    if train.precision_strict:
        raise MachineError(
            f"precision {requested} cannot be had: {reasons or 'only one precision can be trained in'}",
            "set train.precision: auto, or precision_strict: false to take the nearest one",
        )
    if fitting:
        actual = fitting[0]  # type: ignore[assignment]
        return PrecisionChoice(
            requested, actual, reasons or f"only one can be; {actual} needs no loss scaling", changed=True
        )
    actual, why = best_precision(hardware, mode)
    return PrecisionChoice(requested, actual, f"{reasons}; {why}", changed=True)


def optimizer_name(config: "Config", hardware: Hardware) -> str:
    """TrainingArguments' name for train.optimizer; raises ``MachineError`` for 8-bit states without CUDA."""
    wanted = config.train.optimizer
    if wanted == "auto":
        if hardware.device != "cuda":
            return "adamw_torch"
        if ranks.world_size() > 1 and config.train.parallel != "ddp":
            return "adamw_torch_fused"  # 8-bit states have no shards
        return "paged_adamw_8bit" if hardware.memory < 12 * 2**30 else "adamw_torch_fused"
    if "8bit" in wanted and hardware.device != "cuda":
        raise MachineError(
            f"train.optimizer {wanted} needs an NVIDIA card, this is {hardware.name}", "use train.optimizer: auto"
        )
    return {"adamw_8bit": "adamw_bnb_8bit"}.get(wanted, wanted)


def memory_in_use(hardware: Hardware) -> int:
    """Peak bytes so far: the device's allocator on CUDA, the resident peak of this process elsewhere."""
    if hardware.device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    if os.name == "posix":
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak) if sys.platform == "darwin" else int(peak) * 1024  # macOS counts bytes, Linux KiB
    import psutil

    return int(psutil.Process().memory_info().rss)
