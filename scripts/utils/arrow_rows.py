"""Rows of Parquet and Arrow files, read in batches; a row's line is its number, from 1.

Cells become what JSON could hold: a struct without its null fields (Arrow gives every struct all fields that any row
has), dates and decimals as text. What has no such form becomes an object that says so, so that a row which needs it
is rejected, and one which does not is kept.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from scripts.utils.errors import MachineError, UserError
from scripts.utils.json_rows import RawRow

SUFFIXES = (".parquet", ".arrow")
_BATCH = 256  # rows; small, because dictionary encoding can make long texts cheap in the file
_END = b"\xff\xff\xff\xff\0\0\0\0"
_MEND = "write the file again, or give JSON lines; nothing was changed"


def check_kind(path: Path) -> None:
    """Raise ``UserError`` unless the first bytes are of the kind that the name says, and is readable here."""
    with path.open("rb") as file:
        start = file.read(8)
    starts = (b"PAR1",) if path.suffix.lower() == ".parquet" else (b"ARROW1", b"\xff\xff\xff\xff")
    if not start.startswith(starts):
        name = path.suffix.lower().removeprefix(".").capitalize()
        raise UserError(f"{path.absolute()}: is no {name} file, its first bytes are {start!r}", _MEND)
    _library(path)


def read_rows(path: Path) -> Iterator[RawRow]:
    """The rows of the file in order. Raises ``UserError`` where it is damaged, naming the rows that could be read."""
    arrow = _library(path)
    done = 0
    try:
        with contextlib.closing(_batches(path, arrow)) as batches:
            for batch in batches:
                names = [str(name) for name in batch.schema.names]
                lower = Counter(name.strip().lower() for name in names)
                if twice := [name for name, count in lower.items() if count > 1]:
                    raise UserError(f"{path}: the column {twice[0]!r} stands twice", "rename one")
                columns = [_cells(column, arrow) for column in batch.columns]
                for cells in zip(*columns, strict=True):
                    done += 1
                    yield RawRow(str(path), done, dict(zip(names, cells, strict=True)))
    # pyarrow raises its own errors (ArrowException), OSError, and Python's where a cell has no Python form
    except (arrow.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"{path}: cannot be read after row {done:,}: {first[0][:200]}", _MEND) from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply to be training rows", _MEND) from error


def _library(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        message = f"{path}: Parquet and Arrow files need the package pyarrow, which is not installed"
        raise MachineError(message, "run: make install EXTRAS=data, or give JSON lines") from error
    return pyarrow


def _batches(path: Path, arrow: Any) -> Generator[Any, None, None]:
    """The record batches of a Parquet file, or of an Arrow file or stream (as ``datasets`` writes it)."""
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_BATCH, use_threads=False):
                batch.validate(full=True)
                yield batch
        return
    with path.open("rb") as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(-8, 2)
        if not is_file and raw.read() != _END:  # pyarrow takes a stream cut between two batches for a whole one
            raise UserError(f"{path}: is cut short: the mark at the end of an Arrow stream is missing", _MEND)
    with arrow.OSFile(str(path)) as source:
        if is_file:
            with arrow.ipc.open_file(source) as reader:
                whole = (reader.get_batch(number) for number in range(reader.num_record_batches))
                yield from _slices(whole)
        else:
            with arrow.ipc.open_stream(source) as reader:
                yield from _slices(reader)


def _slices(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        batch.validate(full=True)  # offsets that point elsewhere would end the process
        for start in range(0, batch.num_rows, _BATCH):
            yield batch.slice(start, _BATCH)


def _cells(column: Any, arrow: Any) -> list[Any]:
    if arrow.types.is_temporal(column.type):  # nanoseconds have no Python form
        with contextlib.suppress(arrow.ArrowException):
            column = column.cast(arrow.string())
    return [_plain(cell) for cell in column.to_pylist(maps_as_pydicts="strict")]


def _plain(cell: Any) -> Any:
    """A cell as JSON could hold it."""
    if cell is None or isinstance(cell, str | bool | int):
        return cell
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else {"not a number": repr(cell)}
    if isinstance(cell, dict):
        return {str(name): _plain(value) for name, value in cell.items() if value is not None}
    if isinstance(cell, list | tuple):
        return [_plain(value) for value in cell]
    if isinstance(cell, bytes):
        try:
            return cell.decode("utf-8")
        except UnicodeDecodeError:
            return {"bytes that are not text": len(cell)}
    return str(cell)
