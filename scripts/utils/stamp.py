"""backend.json, the stamp of a run: what was asked for, what really ran, on which data, and how each start ended.

Written after the model has loaded, so that it names what ran and not what was wished for; updated at each start and
at the end. It holds no secret and no user name. After training, eval, infer and merge take the facts from here.
"""

import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.utils import files, scrubbing
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
    files.write_json(path_of(run), without_secrets(stamp))


def without_secrets(value: Any) -> Any:
    """The value with every secret of the environment taken out of its texts, and the home folder (a user's name) as ~."""
    secrets = [text for name, text in os.environ.items() if scrubbing.SECRET_NAME.search(name) and len(text) >= 8]
    home = str(Path.home())

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: clean(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [clean(inner) for inner in item]
        if not isinstance(item, str):
            return item
        for secret in secrets:
            item = item.replace(secret, "***")
        return scrubbing.TOKEN.sub("***", re.sub(rf"{re.escape(home)}(?=/|$)", "~", item) if len(home) > 1 else item)

    return clean(value)


def holds_secret(text: str) -> bool:
    """Whether a secret of the environment, or something that looks like a token, stands in ``text``."""
    return without_secrets(text).count("***") > text.count("***")


def library_versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the installed libraries that decide a result; ``more`` of them where a run uses them."""
    from importlib import metadata

    versions = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
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


def system_of(facts: Mapping[str, Any]) -> str | None:
    """The system message that a run was trained with: the one of all its rows, else the style's text."""
    return facts.get("system") or (facts.get("style") or {}).get("text")


def begin(run: str, facts: dict[str, Any], *, from_step: int) -> dict[str, Any]:
    """Write the stamp of a start: ``facts`` over what an earlier start left, and a new entry in the lineage."""
    starts = list((read(run) or {}).get("starts", []))
    if starts and starts[-1]["ended"] == "running":
        # the run's lock is ours, so the process that wrote this is gone and could not say how it ended
        starts[-1]["ended"] = "killed"
    starts.append({"at": now(), "from_step": from_step, "step": from_step, "ended": "running"})
    stamp = {"schema_version": SCHEMA_VERSION, "run": run, "status": "running", **facts, "starts": starts}
    write(run, stamp)
    return stamp


def reached(run: str, step: int) -> None:
    """Note in the newest start that ``step`` is safely saved."""
    stamp = require(run)
    stamp["starts"][-1]["step"] = step
    write(run, stamp)


def end(run: str, *, step: int, how: str, **more: Any) -> None:
    """Close the newest start: ``how`` is finished, interrupted, or failed: <reason>."""
    stamp = read(run)
    if stamp is None:
        return
    stamp["status"] = "finished" if how == "finished" else "unfinished"
    stamp["starts"][-1].update(step=step, ended=how, until=now())
    stamp.update(more)
    write(run, stamp)


def for_people(stamp: dict[str, Any]) -> list[tuple[str, str]]:
    """The stamp's facts as short lines."""
    backend, precision, hardware = stamp["backend"], stamp["precision"], stamp["hardware"]
    data, git, result = stamp["data"], stamp.get("git", {}), stamp.get("result", {})
    asked = f" (asked for: {backend['requested']}; {backend['fallback_reason']})" if backend["fallback_reason"] else ""
    lora = stamp["tuning"]["lora"]
    lines = [
        ("backend", backend["actual"] + asked),
        ("precision", f"{precision['actual']} (asked for: {precision['requested']}; {precision['why']})"),
        ("attention", str(stamp["attention"])),
        ("tuning", stamp["tuning"]["mode"] + (f", r {lora['r']}, alpha {lora['alpha']}" if lora else "")),
        ("base model", f"{stamp['model']['name']}, content {stamp['model']['path_hash'][:12]}…"),
        ("quantisation", stamp["quantisation"] or "none"),
        ("template", f"{stamp['render']['template']}, {stamp['render']['template_hash'][:12]}…"),
        ("length", f"{stamp['render']['max_length']:,} tokens a row, packing {'on' if stamp['packing'] else 'off'}"),
        ("data", f"{data['name']}, {data['splits']['train']:,} train rows, content {data['hash'][:12]}…"),
        ("seed", str(stamp["seed"])),
        ("machine", f"{hardware['name']}, {hardware['memory'] / 2**30:.1f} GiB, driver {hardware['driver'] or '–'}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())),
        ("git", f"{git['commit'][:12]}{', with changes' if git['dirty'] else ''}" if git else "–"),
    ]
    if parallel := stamp.get("parallel"):
        where = f" on {parallel['machines']} machines" if parallel["machines"] > 1 else ""
        lines.append(("processes", f"{parallel['processes']}{where}, {parallel['engine']}"))
    if result:
        loss = result["best_eval_loss"]
        lines.append(
            ("result", f"{result['steps']:,} steps" + (f", best val loss {loss:.4f}" if loss is not None else ""))
        )
        lines.append(("exported", f"{result['kept']}"))
    return lines
