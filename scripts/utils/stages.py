"""The folders between the steps and their manifests: what was read, with which settings, how many rows.

A manifest answers two questions: is this output still true to its inputs (then the step says "up to date"), and
which data exactly did a run train on (its hash goes into the stamp).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.utils import files
from scripts.utils.errors import UserError

SPLITS = ("train", "val", "test")
MANIFEST = "manifest.json"
_FOLDERS = {"process": "data/processed", "style": "data/processed_with_style", "render": "data/rendered"}


def folder(step: str, name: str) -> Path:
    """Output folder of a step for the data set ``name``, relative to the current folder."""
    return Path(_FOLDERS[step]) / name


def read_manifest(where: Path) -> dict[str, Any] | None:
    """The manifest in ``where``, or None when there is none."""
    path = where / MANIFEST
    if not path.is_file():
        return None
    value = files.read_json(path)
    return value if isinstance(value, dict) else None


def fingerprint(paths: Iterable[Path], known: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Size, time and sha256 of each file, keyed by path.

    ``known`` is an earlier fingerprint: a file with the same size and time is not read again.
    """
    found = {}
    for path in paths:
        status = path.stat()
        old = (known or {}).get(str(path), {})
        same = old.get("size") == status.st_size and old.get("mtime_ns") == status.st_mtime_ns
        digest = old["sha256"] if same else files.sha256_file(path)
        found[str(path)] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}
    return found


def identity(inputs: dict[str, dict[str, Any]], settings: dict[str, Any]) -> str:
    """Hash of the inputs' contents and the settings: two equal identities make equal outputs."""
    return files.sha256_json(
        {"inputs": {name: entry["sha256"] for name, entry in inputs.items()}, "settings": settings}
    )


def outputs_whole(where: Path, manifest: dict[str, Any]) -> bool:
    """True when every output file named in the manifest is there with its size."""
    outputs = manifest.get("outputs", {})
    return all(
        (where / name).is_file() and (where / name).stat().st_size == entry["size"] for name, entry in outputs.items()
    )


def write_manifest(
    where: Path, step: str, inputs: dict[str, Any], settings: dict[str, Any], **counts: Any
) -> dict[str, Any]:
    """Write the manifest last, over the finished output files in ``where``, and return it."""
    outputs = {
        path.name: {"size": path.stat().st_size, "sha256": files.sha256_file(path)}
        for path in sorted(where.iterdir())
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    }
    manifest = {
        "step": step,
        "identity": identity(inputs, settings),
        "inputs": inputs,
        "settings": settings,
        **counts,
        "outputs": outputs,
    }
    files.write_json(where / MANIFEST, manifest)
    return manifest


def up_to_date(where: Path, identity_now: str) -> dict[str, Any] | None:
    """The manifest in ``where`` if it was made from the same inputs and settings and its files are whole."""
    manifest = read_manifest(where)
    if manifest and manifest.get("identity") == identity_now and outputs_whole(where, manifest):
        return manifest
    return None


def data_hash(manifest: dict[str, Any]) -> str:
    """Hash of the rows themselves (all output splits), whatever the files' times or paths."""
    outputs = manifest["outputs"]
    return files.sha256_json({f"{s}.jsonl": outputs[f"{s}.jsonl"]["sha256"] for s in SPLITS if f"{s}.jsonl" in outputs})


@dataclass(frozen=True)
class Source:
    """The newest stage before render: the folder to read, its manifest, and one line that says why this one."""

    path: Path
    manifest: dict[str, Any]
    why: str


def newest_source(name: str) -> Source:
    """Styled rows if they were made from the processed rows that lie here now, else the processed rows.

    Raises ``UserError`` when there are no processed rows, or when the styled rows are older than them.
    """
    processed = folder("process", name)
    base = read_manifest(processed)
    if base is None:
        raise UserError(f"no processed rows in {processed.absolute()}", "run: make process (same CONFIG and RAW)")
    styled = folder("style", name)
    manifest = read_manifest(styled)
    if manifest is None:
        return Source(processed, base, f"{processed} (no style was asked for)")
    if manifest["settings"].get("processed") != base["identity"] or not outputs_whole(styled, manifest):
        raise UserError(f"{styled} was made from other rows than lie in {processed} now", "run: make style")
    return Source(styled, manifest, f"{styled} (the newest stage: style {manifest['settings']['mode']})")
