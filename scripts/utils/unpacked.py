"""The bytes of a data file, unpacked on the way where it is gzip or zstd: its first bytes say so, not its name.

Unpacking streams and is limited, because a few hundred kilobytes can unpack to gigabytes. A file that ends before its
packed data does is a ``UserError``: the rows after the cut would be missing in silence.
"""

import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from scripts.utils.errors import MachineError, UserError

SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
MAX_RATIO = 100
MAX_BYTES = 4 * 2**30
FREE_BYTES = 64 * 2**20  # up to here no ratio is too high: small files of repeated rows pack very well
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_CHUNK = 2**16
_ZSTD_WINDOW = 2**27  # bytes, as the zstd program itself allows


def suffix(path: Path) -> str:
    """The ending that says what the rows are, in lower case: ``.jsonl`` for ``rows.JSONL.gz`` too."""
    return inner(path).suffix.lower()


def inner(path: Path) -> Path:
    """The path without the ending of its compression."""
    return path.with_suffix("") if path.suffix.lower() in SUFFIXES else path


def packing(path: Path) -> str:
    """``gzip``, ``zstd``, or nothing."""
    with path.open("rb") as file:
        start = file.read(4)
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacked; raises ``MachineError`` where the library for zstd is missing."""
    kind = packing(path)
    if not kind:
        return path.open("rb")
    return io.BufferedReader(_Unpacking(path, kind), 2**18)  # type: ignore[arg-type]


class _Unpacking(io.RawIOBase):
    """The unpacked bytes as a raw stream, which io.BufferedReader turns into lines."""

    def __init__(self, path: Path, kind: str) -> None:
        self._file = path.open("rb")
        new = _new_gzip if kind == "gzip" else _zstd_maker(path)
        self._chunks = _unpack(self._file, path, kind, new)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _unpack(file: IO[bytes], path: Path, kind: str, new: Callable[[], Any]) -> Iterator[bytes]:
    """Unpack one member (gzip) or frame (zstd) after the other. Raises ``UserError`` for damage and too much."""
    limit = min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * path.stat().st_size))
    unpacked, line = 0, 1
    part = None
    # a zstd chunk cannot be limited where it comes out (up to 32,768 times its size), so it is small where it goes in
    size = _CHUNK if kind == "gzip" else 2**12
    packed = file.read(size)
    while packed:
        if part is None:
            if not packed.strip(b"\0"):  # padding after the last member, as tape tools write it
                packed = file.read(size)
                continue
            part = new()
        try:
            chunk = part.decompress(packed, _CHUNK) if kind == "gzip" else part.decompress(packed)
        except Exception as error:  # zlib.error, zstandard.ZstdError, MemoryError
            place = f"after {unpacked:,} bytes of text, in line {line:,}"
            raise UserError(
                f"{path}: the {kind} file is damaged {place} ({error})", "fetch or pack it again"
            ) from error
        packed = part.unused_data if part.eof else getattr(part, "unconsumed_tail", b"")
        unpacked += len(chunk)
        line += chunk.count(b"\n")
        if unpacked > limit:
            why = (
                f"more than {MAX_RATIO} times its size"
                if limit < MAX_BYTES
                else f"more than {MAX_BYTES / 2**30:.0f} GiB"
            )
            tool = "gunzip" if kind == "gzip" else "unzstd"
            raise UserError(
                f"{path}: unpacks to {why}, which looks like a trap (stopped at line {line:,})",
                f"if you trust it, unpack it yourself and name the unpacked file: {tool} --keep --force {path.name}",
            )
        if chunk:
            yield chunk
        if part.eof:
            part = None
        packed = packed or file.read(size)
    if part is not None:
        raise UserError(
            f"{path}: the {kind} file is cut short: it ends after {unpacked:,} bytes of text, in line {line:,}",
            "fetch or pack it again; nothing was changed",
        )


def _new_gzip() -> Any:
    return zlib.decompressobj(wbits=31)


def _zstd_maker(path: Path) -> Callable[[], Any]:
    try:
        import zstandard
    except ImportError as error:
        hint = "run: make install EXTRAS=data, or unpack it (unzstd) and name the unpacked file"
        raise MachineError(f"{path}: zstd files need the package zstandard, which is not installed", hint) from error
    return lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
