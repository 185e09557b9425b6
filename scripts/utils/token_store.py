"""Rendered rows as token ids on disk: made once, on all cores, then read a row at a time by every later start.

Beside the rendered rows, in ``.tokens/<split>``, so that rendering anew takes it away. A store is used only under the key
of the rows and the tokenizer that made it, and only when its bytes have the hash that was written with them.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, overload

from scripts.utils import console, files, workers
from scripts.utils.encoding import Encoded
from scripts.utils.errors import MachineError, RefusedError
from scripts.utils.rendered import Wanted, encode_row, read_rows, to_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

META = "tokens.json"
_VERSION = 1  # raise it when the same row comes out as other tokens
_CHUNK = 256  # rows a worker takes at a time
_PARTS = {"ids": "int32", "trained": "bool", "starts": "int64"}
Chunk = tuple[int, list[bytes]]


class TokenStore(Sequence[Encoded]):
    """``ids``: int32 [tokens], ``trained``: bool [tokens], of all rows one after another; row r is starts[r] to starts[r + 1]."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids, self.trained, self.starts = (_mapped(folder / name, dtype) for name, dtype in _PARTS.items())

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start, end = int(self.starts[number]), int(self.starts[number + 1])
        return Encoded(self.ids[start:end].tolist(), self.trained[start:end].tolist())


class RowNames(Sequence[str]):
    """``file:line`` of each rendered row of a split, read when a message asks for one."""

    def __init__(self, folder: Path, split: str, count: int) -> None:
        self.folder, self.split, self._length = folder, split, count

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        for number, row in enumerate(read_rows(self.folder, self.split)):
            if number == index:
                return f"{row['source']['file']}:{row['source']['line']}"
        raise IndexError(index)


def examples(
    want: Wanted, manifest: dict[str, Any], split: str, tokenizer: "PreTrainedTokenizerBase"
) -> Sequence[Encoded]:
    """The rows of a split as training takes them; made now where no store has them. ``manifest``: that of ``want.folder``."""
    entry = manifest["outputs"].get(f"{split}.jsonl")
    if entry is None or not manifest["splits"].get(split):
        return []
    from importlib import metadata

    key = files.sha256_json(
        {
            "rows": entry["sha256"],
            "tokenizer": want.settings["tokenizer"],
            "libraries": [metadata.version(name) for name in ("tokenizers", "transformers")],
            "version": _VERSION,
        }
    )
    folder = want.folder / ".tokens" / split
    if _is_whole(folder, key):
        return TokenStore(folder)
    try:
        # another run on the same rows may be making it just now
        lock = files.file_lock(want.folder / ".tokens.lock", wait_seconds=3600, what=f"the tokens of {want.folder}")
        with lock:
            if not _is_whole(folder, key):
                _make(folder, key, want.folder / f"{split}.jsonl", tokenizer, manifest["splits"][split])
    except (
        MachineError,
        OSError,
    ) as problem:  # it only saves time: a folder that cannot be written must not stop a run
        console.warn(f"the tokens cannot be kept in {folder}: {str(problem).splitlines()[0]}")
        return to_examples(tokenizer, list(read_rows(want.folder, split)))
    return TokenStore(folder)


def _is_whole(folder: Path, key: str) -> bool:
    try:
        known = files.read_json(folder / META)
        return bool(
            known["key"] == key and all(files.sha256_file(folder / name) == known["sha256"][name] for name in _PARTS)
        )
    except (OSError, RefusedError, KeyError, TypeError):
        return False


def _make(folder: Path, key: str, rows: Path, tokenizer: "PreTrainedTokenizerBase", count: int) -> None:
    def encode(chunk: Chunk) -> list[Encoded]:
        first, lines = chunk
        hint = "run: make render FORCE=1"
        return [
            encode_row(tokenizer, files.parse_line(rows, number, line, hint))
            for number, line in enumerate(lines, first)
        ]

    progress = console.Progress("tokens", "rows", count)
    with files.replaced_folder(folder, META) as new:
        hashes = {name: hashlib.sha256() for name in _PARTS}
        with contextlib.ExitStack() as stack:
            lines = stack.enter_context(rows.open("rb"))
            writers = {name: stack.enter_context((new / name).open("wb")) for name in _PARTS}
            position = 0
            _write(writers, hashes, "starts", [0])
            for encoded in workers.in_order(encode, workers.numbered(lines, _CHUNK)):
                for example in encoded:
                    position += len(example.ids)
                    _write(writers, hashes, "ids", example.ids)
                    _write(writers, hashes, "trained", example.trained)
                    _write(writers, hashes, "starts", [position])
                progress.advance(len(encoded))
        files.write_json(new / META, {"key": key, "sha256": {name: h.hexdigest() for name, h in hashes.items()}})
    progress.close()


def _write(writers: Mapping[str, IO[bytes]], hashes: dict[str, Any], name: str, values: Sequence[Any]) -> None:
    import numpy as np

    data = np.asarray(values, _PARTS[name]).tobytes()
    writers[name].write(data)
    hashes[name].update(data)


def _mapped(path: Path, dtype: str) -> Any:
    import numpy as np

    # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
