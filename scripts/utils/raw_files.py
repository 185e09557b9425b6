"""Raw data files as rows: which files there are, and the rows of each (JSON, JSON lines, CSV, TSV and text,
each also packed; Parquet and Arrow) with their lines.

Nothing is judged here but whether a row can be read at all. A row that cannot (a broken JSON line, a CSV line with a
field too many) comes out with a reason; a file that cannot (not UTF-8, a broken JSON array) is a ``UserError``.
"""

import csv
import glob
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.utils import arrow_rows, unpacked
from scripts.utils.errors import UserError
from scripts.utils.json_rows import BOM, RawRow, lines, parse, read_json

TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")  # each also with .gz or .zst behind it
READABLE = (*TEXT, *arrow_rows.SUFFIXES)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w-]*")  # owner/name; with a dot in the name it is a file
# files whose name says JSON or CSV and whose bytes say otherwise; first bytes → what to call it
_OTHER_KINDS = {
    b"\x1f\x8b": "packed twice",
    b"\x28\xb5\x2f\xfd": "packed twice",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def find_files(raw: str | Sequence[str]) -> tuple[list[Path], list[str]]:
    """The data files that ``data.raw`` names, and a warning for each thing in a folder that is passed over.

    Raises ``UserError`` when a path is missing, a named file has an unknown extension, or nothing is left to read.
    """
    found: list[Path] = []
    warnings: list[str] = []
    paths = [Path(name).expanduser() for name in ([raw] if isinstance(raw, str) else raw)]
    hint = (
        "put a .jsonl, .json, .csv or .parquet file there, name one with RAW=path, or try the sample: RAW=data/sample"
    )
    for path in paths:
        if path.is_dir():
            entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
            found += _readable(entries, f"inside {path}", warnings, texts=False)
        elif not path.exists() and set("*?[") & set(str(path)):
            entries = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
            if not entries:
                raise UserError(f"no data: nothing has a name like {path.absolute()}", hint)
            found += _readable(entries, f"that {path} names", warnings, texts=".txt" in path.suffixes)
        elif not path.exists():
            on_hub = f"; a data set of the hub is RAW=hub:{path}" if _HUB_NAME.fullmatch(str(path)) else ""
            raise UserError(f"no data: {path.absolute()} does not exist", hint + on_hub)
        elif unpacked.suffix(path) not in READABLE:
            raise UserError(
                f"{path.absolute()}: unknown kind of file", f"known are {', '.join(READABLE)}, also packed (.gz, .zst)"
            )
        else:
            found.append(path)
    if not found:
        places = ", ".join(str(path.absolute()) for path in paths) or "data.raw names no path"
        raise UserError("\n       ".join([f"no data: no file to read in {places}", *warnings]), hint)
    found = list(dict.fromkeys(found))
    for path in found:
        warnings += _check_kind(path)
    return found, warnings


def _readable(entries: Sequence[Path], where: str, warnings: list[str], *, texts: bool) -> list[Path]:
    """The data files among what a folder or a pattern holds, and a warning for each other thing.

    Without ``texts`` a .txt file is passed over: notes beside the data must not be trained on by accident.
    """
    kinds = [kind for kind in READABLE if texts or kind != ".txt"]
    found = [entry for entry in entries if entry.is_file() and unpacked.suffix(entry) in kinds]
    for entry in entries:
        if entry in found or entry.stem.lower() in ("readme", "license"):
            continue
        if entry.is_dir():
            warnings.append(f"{entry} is a folder {where} and is not read; RAW={entry} reads it")
        elif unpacked.suffix(entry) == ".txt":
            warnings.append(f'{entry} is not read: it is text {where}; a pattern reads it: RAW="{entry.parent}/*.txt"')
        else:
            warnings.append(
                f"{entry} is not read: its name does not end in {', '.join(READABLE)} (or .gz, .zst after it)"
            )
    return found


def unread_rows(path: Path) -> Iterator[RawRow]:
    """The rows of one file in order, JSON lines still to be parsed; blank lines are passed over.

    A file without rows is a ``UserError``.
    """
    kind = unpacked.suffix(path)
    rows = (
        arrow_rows.read_rows(path)
        if kind in arrow_rows.SUFFIXES
        else _read_table(path)
        if kind in (".csv", ".tsv")
        else _read_text(path)
        if kind == ".txt"
        else read_json(path)
    )
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise UserError(f"{path.absolute()}: holds no rows", "put rows in, or take the file away")


def read_rows(path: Path) -> Iterator[RawRow]:
    """The rows of one file, as ``unread_rows``, parsed."""
    return map(parse, unread_rows(path))


def _check_kind(path: Path) -> list[str]:
    """Refuse, before anything is read or written, what cannot be a file of rows; warn of a name that says otherwise."""
    try:
        str(path).encode("utf-8")
        packing = unpacked.packing(path)
        with unpacked.open_bytes(path) as file:
            start = file.read(6)
    except UnicodeEncodeError as error:
        raise UserError(f"{str(path)!a}: the name of the file is not UTF-8", "rename it") from error
    except OSError as error:
        raise UserError(f"{path.absolute()}: cannot be read ({error.strerror})", "check its mode") from error
    if not start.removeprefix(BOM):
        raise UserError(f"{path.absolute()}: the file is empty", "put rows in, or take the file away")
    if unpacked.suffix(path) in arrow_rows.SUFFIXES:
        if packing or unpacked.inner(path) != path:
            kind = unpacked.suffix(path)
            raise UserError(f"{path.absolute()}: {kind} files are not read packed", "unpack it; it is packed within")
        arrow_rows.check_kind(path)
        return []
    for magic, kind in _OTHER_KINDS.items():
        if start.startswith(magic):
            raise UserError(f"{path.absolute()}: is {kind}, not UTF-8 text", f"save it as plain UTF-8 {path.suffix}")
    named = unpacked.SUFFIXES.get(path.suffix.lower(), "")
    if packing == named:
        return []
    return [f"{path}: its name says {named or 'plain text'}, its bytes say {packing or 'plain text'}; read as that"]


def _read_text(path: Path) -> Iterator[RawRow]:
    """A text file is one row: its text, to be continued as it stands."""
    text = "".join(line for _, line in lines(path))
    if text.strip():
        yield RawRow(str(path), 1, {"text": text})


def _read_table(path: Path) -> Iterator[RawRow]:
    """CSV or TSV with a header; a ``;`` or a tab in place of the comma is seen from the header."""
    csv.field_size_limit(2**31 - 1)
    header_line = next((line for _, line in lines(path) if line.strip()), "")
    delimiter = "\t" if unpacked.suffix(path) == ".tsv" else max(",;\t|", key=header_line.count)
    # strict: an open quote would otherwise swallow the rest of the file in silence
    reader = csv.reader((line for _, line in lines(path)), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    while True:
        problem, fields = "", []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = str(error)
            if "unexpected end" in problem:
                message = f"{path}:{line}: a quote that opens in this row is never closed"
                raise UserError(message, "close it, or double it if it is part of the text") from error
        if header and problem:
            yield RawRow(str(path), line, None, "", "not valid CSV", problem)
        elif problem:
            raise UserError(f"{path}:{line}: the header is not valid CSV: {problem}", "mend the first line")
        elif any(field.strip() for field in fields):
            if header:
                yield _table_row(path, line, header, fields)
            else:
                header = [name.strip() for name in fields]
                twice = [name for name, count in Counter(name.lower() for name in header if name).items() if count > 1]
                if twice:
                    raise UserError(f"{path}:{line}: the column {twice[0]!r} stands twice in the header", "rename one")
        line = reader.line_num + 1


def _table_row(path: Path, line: int, header: list[str], fields: list[str]) -> RawRow:
    if len(fields) != len(header):
        detail = f"{len(fields)} fields, the header has {len(header)}"
        return RawRow(str(path), line, None, json.dumps(fields, ensure_ascii=False), "wrong number of fields", detail)
    return RawRow(str(path), line, {name: field for name, field in zip(header, fields, strict=True) if name})
