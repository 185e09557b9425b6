"""What a bug report needs, as texts without secrets: the check, the stamp, the config, ends of logs, packages, driver.

No data row, no weight, no system message. Each part is made by itself, and one that cannot be made says why: a bundle is
wanted most where something is broken. Works before anything is installed.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from scripts.utils import growing, scrubbing
from scripts.utils.files import REPO_ROOT

CHECK_SECONDS = 300
LOG_LINES, METRIC_LINES = 200, 100
# lines of logs that a step says of itself; what it shows of rows, answers and system messages has other beginnings
_STEPS = "process render train model check install plan merge report selftest tensorboard batch sweep sft-[a-z-]+ quick_start"
_TOLD = re.compile(
    rf"(?:(?:{'|'.join(_STEPS.split())}): |(?:error|warning|hint): |Traceback |  File \"|[\w.]*(?:Error|Exception|Interrupt)\b)"
)
_VARIABLES = re.compile(
    r"^(SFT_|HF_|CUDA_|NVIDIA_|NCCL_|TORCH|PYTORCH_|TOKENIZERS_|TRANSFORMERS_|BNB_|UNSLOTH_|WANDB_|TRACKIO_|OMP_|MKL_|"
    r"ACCELERATE_|XDG_CACHE_HOME$|LD_LIBRARY_PATH$|LD_PRELOAD$|VIRTUAL_ENV$|CONDA_|PYTHON|TMPDIR$|LANG$|LC_ALL$|DO_NOT_TRACK$)"
)
_ROWS = {"SFT_STYLE", "SFT_PROMPT", "SFT_INPUT"}  # what a user wrote, or asks a model
_COMMITS = ("commit", "revision")

README = """What this is: the facts of one SFT-Play run or machine, for a bug report (make support-bundle).

check.json          what make check found          stamp.json     what ran: backend, precision, versions, how it ended
config.yaml         the resolved config            metrics.jsonl  the last {metrics} lines: steps, losses, rates
log.txt             last lines that steps said     packages.txt   names and versions
nvidia-smi.txt      cards and driver               machine.json   system, and variables that libraries read

Left out: rows, answers, system messages, weights. Taken out (***): tokens, keys, passwords, credentials in addresses,
mail addresses, names of user and machine; home folders are ~. Read it before you send it: each file is plain text.
"""


def collect(run: str, check: Sequence[str], config: Callable[[], str]) -> dict[str, str]:
    """File name → text, scrubbed. ``run`` may be empty; ``check`` are the arguments for check.py; ``config`` gives its YAML."""
    folder = Path("outputs") / run if run else None
    stamp = _json(folder / "backend.json") if folder else None
    parts: dict[str, Callable[[], str]] = {
        "check.json": lambda: run_check(check),
        "stamp.json": lambda: _stamp(stamp, run),
        "config.yaml": lambda: _config(folder, config),
        "log.txt": lambda: logs(folder),
        "metrics.jsonl": lambda: (
            lines_of(growing.tail(folder / "metrics.jsonl", METRIC_LINES)) if folder else "no run\n"
        ),
        "packages.txt": packages,
        "nvidia-smi.txt": nvidia_smi,
        "machine.json": machine,
    }
    made = {"README.txt": README.format(metrics=METRIC_LINES)}
    for name, part in parts.items():
        try:
            made[name] = part()
        except Exception as error:  # whatever is broken is what the bundle is made for
            made[name] = f"could not be made: {type(error).__name__}: {error}\n"
    hidden = [*scrubbing.known_secrets(), *written(stamp), *written(os.environ.get("SFT_STYLE"))]
    names = scrubbing.known_names()
    return {name: scrubbing.scrub(text, hidden, names) for name, text in made.items()}


def written(value: Any) -> list[str]:
    """The system messages in a stamp, or a text itself, and its lines: words of the user's, as secret as a row."""
    texts = [value.get("system"), (value.get("style") or {}).get("text")] if isinstance(value, dict) else [value]
    parts = {part.strip() for text in texts if isinstance(text, str) for part in (text, *text.splitlines())}
    return sorted((part for part in parts if len(part) >= 6), key=len, reverse=True)


def run_check(arguments: Sequence[str]) -> str:
    """The doctor's own words, from a process of its own: a crash in it leaves its last words here."""
    words = [sys.executable, str(REPO_ROOT / "scripts" / "check.py"), "--json", *arguments]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHECK_SECONDS)
    if done.stdout.lstrip().startswith("{"):
        return done.stdout
    return f"{done.stdout}{done.stderr}\nexit code {done.returncode}\n"


def _stamp(stamp: Any, run: str) -> str:
    if stamp is None:
        return f"there is no stamp of {run}\n" if run else "no run was named (RUN=)\n"
    return json.dumps(_without_words(stamp), indent=2, ensure_ascii=False) + "\n"


def _without_words(value: Any) -> Any:
    """The stamp without its system message; commits in short, as a wandb key looks like a whole one."""
    if isinstance(value, dict):
        value = {k: _without_words(v) for k, v in value.items()}
        if isinstance(value.get("style"), dict):
            value["style"] = {**value["style"], "text": "(left out)"}
        if isinstance(value.get("system"), str):
            value["system"] = "(left out)"
        return {k: v[:12] if k in _COMMITS and isinstance(v, str) else v for k, v in value.items()}
    return [_without_words(inner) for inner in value] if isinstance(value, list) else value


def _config(folder: Path | None, config: Callable[[], str]) -> str:
    """The config that the run had, else the one that it would have; without the system message."""
    saved = folder / "config.yaml" if folder else None
    text = saved.read_text(encoding="utf-8") if saved and saved.is_file() else config()
    return without_style(text)


def without_style(text: str) -> str:
    """YAML as ``config.to_yaml`` writes it, without style.text (and its further lines) and infer.stop."""
    lines, section, dropping = [], "", False
    for line in text.splitlines(keepends=True):
        if line[:1].strip():
            section = line.partition(":")[0].strip()
            dropping = False
        elif line.startswith("  ") and not line.startswith(("   ", "  -")) and ":" in line:
            key = line.partition(":")[0].strip()
            dropping = (section, key) in (("style", "text"), ("infer", "stop")) and line.partition(":")[
                2
            ].strip() != "null"
            if dropping:
                lines.append(f"  {key}: (left out)\n")
        if not dropping:
            lines.append(line)
    return "".join(lines)


def logs(folder: Path | None) -> str:
    """The last lines that steps said of themselves, of the run's logs and of quick_start's."""
    found = sorted(folder.glob("*.log")) if folder else []
    found += sorted(Path(".cache/quick_start").glob("*.log"))
    parts = []
    for path in found:
        told = [line for line in growing.tail(path, 20 * LOG_LINES) if _TOLD.match(line)][-LOG_LINES:]
        if told:
            parts.append(f"--- {path}\n{lines_of(told)}")
    return "\n".join(parts) or "no log here: a step's own words go to the terminal; please copy them into the report\n"


def lines_of(texts: Sequence[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


def packages() -> str:
    """Names and versions of what is installed; never where from, as an address may hold a password."""
    found = {str(item.metadata["Name"]): item.version for item in metadata.distributions() if item.metadata["Name"]}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items(), key=lambda pair: pair[0].lower()))


def nvidia_smi() -> str:
    """Cards and driver, without the table of who computes on them."""
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi here\n"
    done = subprocess.run(["nvidia-smi"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    cards = re.split(r"^\|?\s*Processes:", done.stdout, maxsplit=1, flags=re.MULTILINE)[0]
    return f"{cards}{done.stderr}" + (f"exit code {done.returncode}\n" if done.returncode else "")


def machine() -> str:
    """The system, and the variables that torch, transformers, CUDA and this project read; of secrets only that they are set."""
    shown = {
        name: "(set)" if scrubbing.SECRET_NAME.search(name) or name in _ROWS else value
        for name, value in sorted(os.environ.items())
        if _VARIABLES.search(name) and value
    }
    facts = {
        "system": platform.platform(),
        "machine": platform.machine(),
        "python": sys.version,
        "processors": os.cpu_count(),
    }
    return json.dumps({**facts, "variables": shown}, indent=2, ensure_ascii=False) + "\n"


def write(path: Path, parts: dict[str, str], open_file: Callable[[Path], Any]) -> dict[str, int]:
    """Zip the parts; returns the size of each in the archive, in bytes. ``open_file`` is files.atomic_writer."""
    import zipfile

    with open_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        return {info.filename: info.compress_size for info in archive.infolist()}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
