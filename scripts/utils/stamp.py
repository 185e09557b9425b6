"""backend.json, the stamp of a run: what was asked for, what really ran, on which data, and how each start ended.

Written after the model has loaded, so that it names what ran and not what was wished for; updated at each start and
at the end. It holds no secret and no user name. After training, eval, infer and merge take the facts from here.
"""

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from scripts.utils import files
from scripts.utils.errors import UserError

SCHEMA_VERSION = 1
_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "unsloth",
    "triton",
    "xformers",
)


def run_folder(run: str) -> Path:
    return Path("outputs") / files.check_name(run, "run name")


def adapter_folder(run: str) -> Path:
    return Path("adapters") / files.check_name(run, "run name")


def path_of(run: str) -> Path:
    return run_folder(run) / "backend.json"


def read(run: str) -> dict[str, Any] | None:
    """The stamp of ``run``, or None where the run never came so far as to load its model."""
    path = path_of(run)
    return files.read_json(path) if path.is_file() else None


def require(run: str) -> dict[str, Any]:
    """The stamp of ``run``; raises ``UserError`` that names the runs there are."""
    stamp = read(run)
    if stamp is None:
        there = sorted(path.parent.name for path in Path("outputs").glob("*/backend.json"))
        hint = f"runs here: {', '.join(there)}; choose one with RUN=…" if there else "train one first: make train"
        raise UserError(f"there is no run {run!r} (looked for {path_of(run).absolute()})", hint)
    return stamp


def write(run: str, stamp: dict[str, Any]) -> None:
    files.write_json(path_of(run), stamp)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that decide a result."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_state(root: Path) -> dict[str, Any]:
    """Commit and whether tracked files differ from it; empty outside a git checkout."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=root, env=environment, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"commit": commit, "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}


def now() -> str:
    """The time as UTC in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def begin(run: str, facts: dict[str, Any], *, from_step: int) -> dict[str, Any]:
    """Write the stamp of a start: ``facts`` over what an earlier start left, and a new entry in the lineage."""
    earlier = read(run) or {}
    starts = [*earlier.get("starts", []), {"at": now(), "from_step": from_step, "step": from_step, "ended": "running"}]
    stamp = {"schema_version": SCHEMA_VERSION, "run": run, "status": "running", **facts, "starts": starts}
    write(run, stamp)
    return stamp


def end(run: str, *, step: int, how: str, **more: Any) -> None:
    """Close the newest start: ``how`` is finished, interrupted, or failed: <reason>."""
    stamp = read(run)
    if stamp is None:
        return
    stamp["status"] = "finished" if how == "finished" else "unfinished"
    stamp["starts"][-1].update(step=step, ended=how, until=now())
    stamp.update(more)
    write(run, stamp)


def changed_identity(stamp: dict[str, Any], identity: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys that decide the loss curve and differ: (key, then, now)."""
    then = stamp.get("identity", {})
    keys = sorted({*then, *identity})
    return [(key, then.get(key), identity.get(key)) for key in keys if then.get(key) != identity.get(key)]
