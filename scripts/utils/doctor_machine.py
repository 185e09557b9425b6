"""The doctor on the machine: system, disk, memory, limits, and whether the project's folders can be written.

Standard library only (psutil where it is there): this must work before anything is installed. Nothing is left behind.
"""

import contextlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from scripts.utils import console
from scripts.utils.files import REPO_ROOT
from scripts.utils.findings import Finding, fault, ok, warning

DISK_NEEDED, DISK_WANTED = 2 * 2**30, 5 * 2**30  # bytes
MEMORY_WANTED = 3 * 2**30
OPEN_FILES_WANTED = 1024  # what Linux gives; macOS gives 256, and a model in many parts opens as many files at once
_INODES_NEEDED = 1000
_WRITTEN = ("data", "outputs", "adapters")  # by the steps, in the current folder


def python() -> Finding:
    return ok("python", f"{platform.python_version()} ({sys.executable})")


def system() -> Finding:
    """Which system this is, and what is known of it."""
    name = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if sys.platform == "win32":
        text = f"{name}: written for, but never tried, and strangers' templates have no limit on their memory here"
        return warning("system", "windows", text, "WSL 2 is the safer way: wsl --install, then clone inside it")
    if "microsoft" in platform.release().lower():
        if str(Path.cwd()).startswith("/mnt/"):
            text = f"{name}: {Path.cwd()} lies on the Windows disk, which is many times slower from here"
            return warning("system", "windows-disk", text, "clone into the Linux file system: cd ~ && git clone …")
        return ok("system", f"{name} (WSL; not yet tried)")
    return ok("system", name + (" (not yet tried on a Mac)" if sys.platform == "darwin" else ""))


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    path = Path(os.path.abspath(path))
    return next((parent for parent in (path, *path.parents) if parent.exists()), Path("/"))


def cache() -> Path:
    return Path(os.environ.get("SFT_MODEL_CACHE") or REPO_ROOT / ".cache" / "models")


def disk() -> Iterator[Finding]:
    """A line for each file system that the project's folders lie on (outputs may be a link to another disk)."""
    where: dict[int, list[Path]] = {}
    for path in (*map(Path, _WRITTEN), cache()):
        with contextlib.suppress(OSError):
            where.setdefault(existing(path).stat().st_dev, []).append(path)
    for paths in where.values():
        place = existing(paths[0])
        try:
            free = shutil.disk_usage(place).free
        except OSError as error:
            yield warning("disk", "disk-unknown", f"{place}: {error.strerror}", f"df -h {place}")
            continue
        names = ", ".join(path.name if path.is_absolute() else str(path) for path in paths)
        text = f"{console.size(free)} free for {names} ({place})"
        clean = (
            "free some space: make clean, then du -sh outputs/* .cache/*; or make the folder a link to a larger disk"
        )
        if free < DISK_NEEDED:
            yield fault("disk", "disk-full", f"{text}; {console.size(DISK_NEEDED)} are needed", clean)
        elif free < DISK_WANTED:
            yield warning("disk", "disk-small", f"{text}; a model from the hub may need more", clean)
        else:
            yield ok("disk", text)
        if hasattr(os, "statvfs") and (status := os.statvfs(place)).f_files and status.f_favail < _INODES_NEEDED:
            text = f"{place}: room for only {status.f_favail:,} more files, however small (inodes)"
            yield fault("disk", "disk-full", text, "remove folders of many small files: make clean")


def memory() -> Iterator[Finding]:
    """Free memory, and a container's limit where that is less than the machine's."""
    if find_spec("psutil") is None:
        return
    import psutil

    now = psutil.virtual_memory()
    limit = container_memory()
    free, total = now.available, now.total
    words = f"{console.size(free)} of {console.size(total)} free"
    if limit and limit < total:
        free = min(free, limit)
        words += f"; this container may use {console.size(limit)}"
    if free < MEMORY_WANTED:
        hint = "close other programs, give the container more, or choose a small model: MODEL=embedded/smollm2-135m-instruct"
        yield warning("memory", "memory-small", words, hint)
    else:
        yield ok("memory", words)


def container_memory() -> int:
    """The limit of this container in bytes (cgroup 2, then 1); 0 where there is none."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = int(Path(name).read_text())
            return limit if limit < 2**60 else 0
    return 0


def limits() -> Iterator[Finding]:
    """The limits of this shell that a run meets in its middle."""
    if find_spec("resource") is None:  # Windows
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES_WANTED:
        text = f"at most {soft:,} open files in this shell; {OPEN_FILES_WANTED:,} are safe"
        most = OPEN_FILES_WANTED * 4 if hard < 0 else min(OPEN_FILES_WANTED * 4, hard)
        hint = f"ulimit -n {most}" if most > soft else "raise nofile in /etc/security/limits.conf, then log in anew"
        yield warning("limits", "few-open-files", text, hint)
    if hasattr(resource, "RLIMIT_AS") and 0 <= (space := resource.getrlimit(resource.RLIMIT_AS)[0]) < 32 * 2**30:
        text = f"at most {console.size(space)} of address space in this shell (ulimit -v); torch maps far more than it uses"
        yield warning("limits", "little-address-space", text, "ulimit -v unlimited")


def access() -> Iterator[Finding]:
    """Whether each folder that the steps write can be written, by writing into it."""
    refused = []
    for name in _WRITTEN:
        if found := why_not_writable(Path(name)):
            refused.append(name)
            yield fault("access", *found)
    if found := why_not_writable(cache()):
        text = f"{found[1]}; what is fetched or measured cannot be kept"
        yield warning("access", "cache-unwritable", text, found[2])
    elif not refused:
        yield ok("access", f"{', '.join(_WRITTEN)} and the cache can be written")


def why_not_writable(folder: Path) -> tuple[str, str, str] | None:
    """Name, text and mend of what keeps ``folder`` from being written; None where it can be."""
    place = existing(folder)
    if not place.is_dir():
        return "not-a-folder", f"{place} is a file where a folder must be", f"move it away: mv '{place}' '{place}.old'"
    try:
        with tempfile.TemporaryFile(dir=place, prefix=".sft-check."):
            return None
    except OSError as error:
        owner = f"sudo chown -R \"$(id -un)\" '{place}'"
        hint = (
            "remount the file system for writing, or make the folder a link to another disk"
            if _mounted_so(place)
            else owner
        )
        return "read-only", f"{place} cannot be written ({error.strerror})", hint


def _mounted_so(place: Path) -> bool:
    with contextlib.suppress(OSError, AttributeError):
        return bool(os.statvfs(place).f_flag & os.ST_RDONLY)
    return False


def readable_by_others(paths: list[Path]) -> list[Path]:
    """Those files of secrets that every user of this machine can read."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            if os.name == "posix" and path.stat().st_mode & 0o007:
                found.append(path)
    return found
