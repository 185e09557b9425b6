"""Data sets of the hub: ``hub:owner/name`` becomes a folder of files in .cache/data, fetched once and used offline.

The files are read by the project's own readers like any others, so that the same checks hold for them; the library
``datasets`` would run no check, and turns NaN into null on the way.
"""

import os
import re
from pathlib import Path

from scripts.utils import console, model_folder, model_hub
from scripts.utils.errors import UserError
from scripts.utils.files import REPO_ROOT, file_lock
from scripts.utils.raw_files import READABLE
from scripts.utils.unpacked import suffix

PREFIX = "hub:"
_FORM = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<folder>[\w./-]+))?")
_NO_ROWS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}


def cache_folder() -> Path:
    """Where fetched data sets lie (``SFT_DATA_CACHE`` moves it)."""
    return Path(os.environ.get("SFT_DATA_CACHE") or REPO_ROOT / ".cache" / "data").absolute()


def local(raw: str) -> str:
    """``raw`` itself, or for ``hub:owner/name[@revision][/folder]`` the local folder with its files.

    Raises ``UserError`` for a wrong form, or where the data set holds several folders of rows and none is named.
    """
    if not raw.startswith(PREFIX):
        return raw
    found = _FORM.fullmatch(raw.removeprefix(PREFIX))
    if not found or ".." in raw:
        raise UserError(
            f"{raw!r} names no data set of the hub", "the form is hub:owner/name, hub:owner/name@revision or …/folder"
        )
    name, revision, wanted = found["name"], found["revision"], found["folder"]
    folder = cache_folder() / (name.replace("/", "--") + (f"@{revision}" if revision else ""))
    if not model_folder.is_whole(folder):
        with file_lock(folder.parent / ".locks" / f"{folder.name}.lock", wait_seconds=3600, what=f"data set {name}"):
            if not model_folder.is_whole(folder):
                model_hub.download_data(
                    name, revision, folder, wanted=_holds_rows, log=lambda text: console.note("data", text)
                )
    found_in = _one_folder(raw, folder, wanted)
    here = Path.cwd()
    return str(found_in.relative_to(here) if found_in.is_relative_to(here) else found_in)


def _holds_rows(path: str) -> bool:
    return suffix(Path(path)) in READABLE and suffix(Path(path)) != ".txt" and Path(path).name not in _NO_ROWS


def _one_folder(raw: str, folder: Path, wanted: str | None) -> Path:
    """The folder in ``folder`` that holds the rows."""
    paths = [
        path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != model_folder.MANIFEST
    ]
    there = sorted({path.parent.as_posix() for path in paths if _holds_rows(path.as_posix())})
    if wanted:
        if wanted.strip("/") in there:
            return folder / wanted
        raise UserError(f"{raw}: no rows in that folder; there are {', '.join(there)}", "name one of these")
    if len(there) == 1:
        return folder / there[0]
    base = raw.rstrip("/")
    named = ", ".join(f"{base}/{name}" for name in there if name != ".")
    raise UserError(f"{raw} holds rows in several folders: {', '.join(there)}", f"name one: {named}")
