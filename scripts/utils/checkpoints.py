"""Checkpoints that are whole or not there: sealed with a hash of every file, verified before they are trusted.

A checkpoint is written beside its place, sealed with a manifest, synced and renamed. Resume takes the newest one
that verifies and names each that it passes over; nothing is deleted but what the run itself rotates out.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.utils import files
from scripts.utils.errors import RefusedError

SEAL = "sft-checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def listed(run_folder: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    found = [path for path in run_folder.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of, reverse=True)


def seal(folder: Path) -> None:
    """Sync every file and write the manifest of their sizes and hashes last."""
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": files.sha256_file(path)}
    files.write_json(folder / SEAL, {"step": step_of(folder), "files": entries})


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file is as it was sealed."""
    manifest = folder / SEAL
    if not manifest.is_file():
        return f"{SEAL} is missing (the save did not finish)"
    try:
        entries = files.read_json(manifest)["files"]
    except (RefusedError, KeyError, TypeError):
        return f"{SEAL} is damaged"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {entry['size']:,}"
        if files.sha256_file(path) != entry["sha256"]:
            return f"{name} differs from what was saved"
    return None


def newest_whole(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that was passed over."""
    passed_over: list[str] = []
    for folder in listed(run_folder):
        reason = damage(folder)
        if reason is None:
            return folder, passed_over
        passed_over.append(f"{folder}: {reason}")
    return None, passed_over


@contextlib.contextmanager
def landing(run_folder: Path, step: int) -> Iterator[Path]:
    """Yield a staging folder in which the trainer writes ``checkpoint-<step>``; seal and move it when that ends well."""
    name = f"checkpoint-{step}"
    with files.disk_errors(run_folder / name):
        staging = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=run_folder))
    try:
        with files.disk_errors(run_folder / name):  # looks at the free space, so before the cleaning up
            yield staging
            seal(staging / name)
            files.sync_folder(staging / name)
            final = run_folder / name
            if final.exists():  # an unfinished save of the same step: kept aside, never deleted
                os.rename(final, Path(tempfile.mkdtemp(prefix=f".{name}.damaged.", dir=run_folder)) / name)
            os.rename(staging / name, final)
            files.sync_folder(run_folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def rotate(run_folder: Path, *, keep: int, best: Path | None) -> None:
    """Delete the oldest checkpoints beyond ``keep``, never ``best``, and only when the newest verifies."""
    folders = listed(run_folder)
    if not folders or damage(folders[0]) is not None:
        return
    spared = {folders[0].name, best.name if best else ""}
    for folder in reversed(folders):
        if len(folders) <= keep:
            break
        if folder.name not in spared:
            shutil.rmtree(folder, ignore_errors=True)
            folders.remove(folder)
