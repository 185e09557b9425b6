"""Checkpoints that are whole or not there: sealed with a hash of every file, verified before they are trusted.

A checkpoint is written beside its place, sealed with a manifest, synced and renamed. Resume takes the newest one
that verifies and names each that it passes over; nothing is deleted but what the run itself rotates out.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.utils import files
from scripts.utils.errors import RefusedError

SEAL = "sft-checkpoint.json"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def listed(run_folder: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    found = [path for path in run_folder.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of, reverse=True)


def hashes(folder: Path, *, but: str = "") -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file in ``folder``, each synced to the disk; ``but`` names one to leave out."""
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != but):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": files.sha256_file(path)}
    return entries


def seal(folder: Path, identity: dict[str, Any] | None = None) -> None:
    """Sync every file and write the manifest of their sizes and hashes last, with what decides the loss curve."""
    entries = hashes(folder, but=SEAL)
    content = {"step": step_of(folder), "identity": identity or {}, "files": entries}
    files.write_json(folder / SEAL, {**content, "sha256": files.sha256_json(content)})


def identity_in(folder: Path) -> dict[str, Any]:
    """The settings that a whole checkpoint was trained with."""
    return dict(files.read_json(folder / SEAL).get("identity", {}))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file is as it was sealed."""
    manifest = folder / SEAL
    if not manifest.is_file():
        return f"{SEAL} is missing (the save did not finish)"
    try:
        sealed = files.read_json(manifest)
        entries, step = sealed["files"], sealed["step"]
        if sealed.pop("sha256") != files.sha256_json(sealed):
            return f"{SEAL} is damaged"
        wrong = difference(folder, entries)
    except (RefusedError, KeyError, TypeError, AttributeError):
        return f"{SEAL} is damaged"
    if not entries or step != step_of(folder):
        return f"{SEAL} is of another checkpoint (step {step})"
    pickles = sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLES)
    return wrong or (f"it holds a pickle ({pickles[0]}), which could run any code when loaded" if pickles else None)


def difference(folder: Path, entries: dict[str, dict[str, Any]]) -> str | None:
    """The first file of ``entries`` that is not in ``folder`` as its size and hash say."""
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
def landing(run_folder: Path, step: int, identity: dict[str, Any] | None = None, need_bytes: int = 0) -> Iterator[Path]:
    """Yield a staging folder in which the trainer writes ``checkpoint-<step>``; seal and move it when that ends well."""
    name = f"checkpoint-{step}"
    with files.disk_errors(run_folder / name, need_bytes):
        staging = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".saving", dir=run_folder))
    try:
        with files.disk_errors(run_folder / name, need_bytes):  # looks at the free space, so before the cleaning up
            yield staging
            seal(staging / name, identity)
            files.sync_folder(staging / name)
            final = run_folder / name
            if final.exists():  # an unfinished save of the same step: kept aside, never deleted
                os.rename(final, Path(tempfile.mkdtemp(prefix=f".{name}.damaged.", dir=run_folder)) / name)
            os.rename(staging / name, final)
            files.sync_folder(run_folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_leftovers(run_folder: Path) -> None:
    """Remove what a killed process left half saved (hidden, and named by ``landing``); hold the run's lock."""
    for path in [*run_folder.glob(".checkpoint-*.saving"), *run_folder.glob(".link.*.saving")]:
        shutil.rmtree(path, ignore_errors=True)


def point(run_folder: Path, name: str, checkpoint: Path) -> None:
    """Make ``<run>/<name>`` (best, last) a link to a checkpoint beside it, in one rename."""
    link = run_folder / name
    if link.is_symlink() and os.readlink(link) == checkpoint.name:
        return
    if link.is_dir() and not link.is_symlink():
        return  # somebody's own folder: not ours to replace
    with files.disk_errors(link):
        beside = Path(tempfile.mkdtemp(prefix=".link.", suffix=".saving", dir=run_folder))
        try:
            os.symlink(checkpoint.name, beside / name)
            os.replace(beside / name, link)
        except OSError:
            if os.name == "posix":
                raise  # Windows allows links to few users; nothing here reads these two
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        files.sync_folder(run_folder)


def rotate(
    run_folder: Path, *, keep: int, best: Path | None, in_between: Callable[[int], bool] = lambda step: False
) -> None:
    """Delete the oldest checkpoints beyond ``keep``, never ``best``, and only when the newest verifies.

    Of those at steps ``in_between`` the ones that were planned, only the newest checkpoint stays. Only what carries our
    seal is deleted.
    """
    folders = listed(run_folder)
    if not folders or damage(folders[0]) is not None:
        return
    spared = {folders[0].name, best.name if best else ""}
    for folder in sorted(folders, key=lambda folder: (not in_between(step_of(folder)), step_of(folder))):
        if len(folders) <= keep and not in_between(step_of(folder)):
            break
        if folder.name not in spared and (folder / SEAL).is_file():
            aside = run_folder / f".{folder.name}.old.saving"  # a kill in the middle leaves no half checkpoint
            with contextlib.suppress(OSError):
                os.rename(folder, aside)
                shutil.rmtree(aside, ignore_errors=True)
            folders.remove(folder)
