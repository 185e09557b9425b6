"""Files that are either whole or not there: atomic writes, JSON lines, hashes, folder swaps.

Everything the project writes goes through here, so that a kill, a full disk or a second process
never leaves half a file. A full disk is a ``MachineError`` that names the path.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from scripts.utils.errors import MachineError, RefusedError, UserError

REPO_ROOT = Path(__file__).resolve().parents[2]


def _safetensors_error() -> type[Exception]:
    """safetensors' own exception, without importing it where nothing has yet (it is looked up only on an error)."""
    module = sys.modules.get("safetensors")
    return module.SafetensorError if module else OSError


def _existing(path: Path) -> Path:
    return next((parent for parent in (path, *path.parents) if parent.is_dir()), Path("/"))


def _is_full(path: Path, message: str) -> bool:
    if "No space left" in message:
        return True
    # PyTorch twice, and numpy's tofile
    wrote = any(words in message for words in ("PytorchStreamWriter", "unexpected pos", " requested and "))
    return wrote and shutil.disk_usage(_existing(path)).free < 2**20


@contextlib.contextmanager
def disk_errors(path: Path, need_bytes: int | None = None) -> Iterator[None]:
    """Turn the operating system's refusals to write into a message for the user."""
    where = Path(path).absolute()
    try:
        yield
    except (OSError, RuntimeError, _safetensors_error()) as error:
        code = getattr(error, "errno", None)
        # torch and safetensors write through their own code, which says it in their own words
        if code in (errno.ENOSPC, errno.EDQUOT) or (code is None and _is_full(where, str(error))):
            free = shutil.disk_usage(_existing(where)).free
            need = f" ({need_bytes:,} bytes needed, {free:,} free)" if need_bytes else f" ({free:,} bytes free)"
            raise MachineError(
                f"{where}: the disk is full{need}",
                "free some space (make clean shows what it would remove), then run the same command again",
            ) from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise MachineError(f"{where}: no permission to write here", "check the folder's owner and mode") from error
        raise


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that takes ``path``'s place, synced, only when the block ends well."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            usual_mode(Path(temporary))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def usual_mode(path: Path) -> None:
    """Give a file that was made for its owner alone (temporary files, safetensors) the mode that a new file has."""
    os.chmod(path, 0o666 & ~_umask())


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power loss (POSIX only; elsewhere nothing to do)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file and folder in ``folder`` survive a power loss."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def write_text(path: Path, text: str) -> None:
    with atomic_writer(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """Write one JSON value a line and return how many."""
    count = 0
    with atomic_writer(path) as file:
        for row in rows:
            file.write(json_line(row))
            count += 1
    return count


def json_line(row: Any) -> bytes:
    """One row as UTF-8; a lone surrogate, which UTF-8 cannot hold, stays escaped."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:
        return (json.dumps(row, ensure_ascii=True) + "\n").encode("ascii")


def read_json(path: Path) -> Any:
    """Read a JSON file that the project wrote; damage is a ``RefusedError``."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise RefusedError(f"{Path(path).absolute()}: not valid JSON ({error})", "the file is damaged") from error


def read_jsonl(path: Path) -> Iterator[Any]:
    """Read JSON lines that the project wrote, one value at a time; blank lines are passed over."""
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            yield parse_line(path, number, line)


def parse_line(path: Path | str, number: int, line: str | bytes, hint: str = "mend or delete the line") -> Any:
    """The JSON value in a line of ``path``; raises ``UserError`` with its place."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: not valid JSON ({error})", hint) from error


def sha256_file(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share_read(paths: Sequence[Path], at: int) -> float:
    """What part of the bytes of ``paths`` this process has read, when it is reading the one with the number ``at``.

    0 where the system does not say how far an open file was read.
    """
    import psutil

    here = paths[at].resolve()
    opened = [file for file in psutil.Process().open_files() if Path(file.path) == here]
    sizes = [path.stat().st_size for path in paths]
    if not opened or not hasattr(opened[0], "position"):
        return 0.0
    return (sum(sizes[:at]) + max(file.position for file in opened)) / max(sum(sizes), 1)


def sha256_json(value: Any) -> str:
    """Hash of a JSON value that does not depend on the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def replaced_folder(folder: Path, marker: str = "") -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` that takes its place when the block ends well.

    What stands there is deleted, so it must hold the file ``marker`` that shows it to be ours, else ``RefusedError``.
    """
    folder = Path(folder)
    if marker and folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise RefusedError(
            f"{folder.absolute()} holds files and no {marker}, so no step wrote it, and it is not replaced",
            "move it away, then type the same command again",
        )
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".new", dir=folder.parent))
        os.chmod(new, 0o777 & ~_umask())
    try:
        with disk_errors(folder):  # looks at the free space, so before the cleaning up
            yield new
            sync_tree(new)  # else a power loss after the rename could leave empty files
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
            if folder.exists():
                os.rename(folder, old / "was")
            os.rename(new, folder)
            sync_folder(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


@contextlib.contextmanager
def file_lock(path: Path, *, wait_seconds: float, what: str) -> Iterator[int]:
    """Hold an exclusive lock that the system frees when the process dies, however it dies.

    Yields its descriptor: a child that inherits it holds the lock too. Waits up to ``wait_seconds`` for another holder, then raises ``RefusedError``.
    """
    import fcntl

    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RefusedError(
                        f"{what} is in use by another process (lock {path.absolute()})",
                        "wait until it ends, or choose another name with RUN=…",
                    ) from None
                time.sleep(0.2)
        yield file.fileno()


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it is safe as a folder name inside the project, else raise ``UserError``."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"{what} {name!r} is not a usable name",
            "use letters, digits, '.', '_', '+' and '-', beginning with a letter or digit, at most 100 characters",
        )
    return name
