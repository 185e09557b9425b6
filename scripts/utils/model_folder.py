"""What makes a folder a model that can be loaded, and how this is checked without loading it."""

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

from scripts.utils.errors import MachineError, RefusedError, UserError
from scripts.utils.files import disk_errors, read_json, sha256_file, sha256_json, write_json

MANIFEST = "sft-model.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check(folder: Path, *, tokenizer_only: bool = False) -> None:
    """Raise ``UserError`` or ``RefusedError`` with the reason why ``folder`` cannot be loaded as a model."""
    folder = Path(folder).absolute()
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder}: this is an adapter, not a model", "give its base model here; infer takes the run"
            )
        raise UserError(
            f"{folder}: no config.json in this folder, so it is not a model",
            "give the folder that holds config.json, tokenizer.json and model.safetensors",
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{folder}: no tokenizer in this folder", "copy the model's tokenizer files (tokenizer.json) there"
        )
    if not tokenizer_only:
        for file in weight_files(folder):
            _check_safetensors(file)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights, all of them present."""
    folder = Path(folder).absolute()
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if index.is_file():
        try:
            shards = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError):
            raise RefusedError(f"{index}: no weight_map in it", "the file is damaged; fetch the model again") from None
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise RefusedError(
                f"{folder}: {len(missing)} of {len(shards)} weight files are missing, the first is {missing[0]}",
                "copy or fetch the model again",
            )
        return [folder / name for name in shards]
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        raise RefusedError(
            f"{folder}: the weights are pickles, which can run any code when they are loaded",
            "convert them to safetensors on a machine you can lose, or choose a model published as safetensors",
        )
    raise UserError(f"{folder}: no weights ({WEIGHTS}) in this folder", "copy the model's safetensors files there")


def _check_safetensors(path: Path) -> None:
    """Raise ``RefusedError`` unless the file's size is the one that its own header tells."""
    actual = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise RefusedError(f"{path}: only a Git LFS pointer, not the weights", "run `git lfs pull` in that folder")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        try:
            if not 2 <= length <= actual - 8:
                raise ValueError
            header: dict[str, Any] = json.loads(file.read(length))
            end = max((t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RefusedError(
                f"{path}: not a safetensors file", "the file is damaged; fetch the model again"
            ) from None
    if actual != 8 + length + end:
        raise RefusedError(
            f"{path}: {actual:,} bytes, but its header tells {8 + length + end:,}",
            "the file is cut short or damaged; fetch the model again",
        )


def check_space(folder: Path, need_bytes: int, what: str) -> None:
    """Make ``folder`` and raise ``MachineError`` unless ``need_bytes`` are free on its disk."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise MachineError(
            f"{folder}: {need_bytes / 2**20:,.0f} MiB needed for {what}, {free / 2**20:,.0f} MiB free",
            "free some space, or put the model cache elsewhere with SFT_MODEL_CACHE=/a/larger/disk",
        )


def remove_leftovers(folder: Path, ending: str) -> None:
    """Remove the hidden folders `.<name>.<ending>` beside ``folder``; hold its lock.

    ``ending`` is a regular expression; it must not match what belongs to a name that only begins alike.
    """
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.{ending}")
    for path in folder.parent.glob(".*"):
        if pattern.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def content_files(folder: Path) -> list[Path]:
    """The files that decide what the model computes: weights, configs, tokenizer, template; sorted by name."""
    suffixes = {".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken"}
    return sorted(p for p in Path(folder).iterdir() if p.suffix in suffixes and p.name != MANIFEST and p.is_file())


def tokenizer_hash(folder: Path) -> str:
    """One hash over the files that decide how text becomes ids."""
    names = sorted(
        {*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"}
    )
    return sha256_json({name: sha256_file(folder / name) for name in names if (folder / name).is_file()})


def write_manifest(folder: Path, name: str, revision: str | None, commit: str) -> dict[str, dict[str, Any]]:
    """Write ``sft-model.json``: where the model is from, and size and sha256 of each file; return the files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256_file(p)} for p in files}
    write_json(folder / MANIFEST, {"name": name, "revision": revision, "commit": commit, "files": entries})
    return entries


def is_whole(folder: Path) -> bool:
    """Whether ``folder`` has a manifest and each of its files at its size (a look at the disk, no hashing)."""
    try:
        files: dict[str, dict[str, Any]] = read_json(folder / MANIFEST)["files"]
        return bool(files) and all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, RefusedError, KeyError, TypeError, AttributeError):
        return False


def commit(folder: Path) -> str:
    """The hub commit (or package version) that the manifest of a whole folder names."""
    return str(read_json(folder / MANIFEST)["commit"])
