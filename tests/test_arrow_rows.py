"""Parquet and Arrow: the same rows as from JSON, whatever the columns; damage is one clear error."""

import datetime
import decimal
import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from scripts.utils import records
from scripts.utils.errors import MachineError, UserError
from scripts.utils.raw_files import find_files, read_rows
from tests.commands import ROOT

pytestmark = pytest.mark.skipif(find_spec("pyarrow") is None, reason="make install EXTRAS=data")
KINDS = ["parquet", "file.arrow", "stream.arrow"]


def write(path: Path, table: Any) -> Path:
    import pyarrow
    from pyarrow import parquet

    if not isinstance(table, pyarrow.Table):
        table = pyarrow.Table.from_pylist(table) if isinstance(table, list) else pyarrow.table(table)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=400)
        return path
    new = pyarrow.ipc.new_file if "file" in path.name else pyarrow.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    return path


def contents(path: Path) -> list[Any]:
    return [record.content or record.reason for record in records.open_file(path).records]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_their_numbers_are_those_of_the_file(tmp_path, kind):
    rows = [{"question": f"q\u2028{n}", "answer": "a" * (n % 7 + 1)} for n in range(1500)]
    path = write(tmp_path / f"a.{kind}", rows)
    assert find_files(str(tmp_path)) == ([path], [])
    found = list(read_rows(path))
    assert [row.value for row in found] == rows
    assert [row.line for row in found] == list(range(1, 1501))


@pytest.mark.parametrize("kind", KINDS)
def test_nested_turns_and_tools_come_out_as_from_json(tmp_path, kind):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"id": "2", "type": "function", "function": {"name": "g", "arguments": {"y": [1.5], "z": "t"}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [one]},
                {"role": "tool", "content": "r", "tool_call_id": one["id"]},
                {"role": "assistant", "content": "a", "reasoning_content": "think"},
            ],
            "tools": [{"type": "function", "function": {"name": one["function"]["name"], "parameters": {}}}],
        }
        for one in (call, other)
    ]
    rows[0]["tools"][0]["function"]["description"] = "d"
    for row in rows:  # Parquet has no struct without a field
        row["tools"][0]["function"]["parameters"] = {"type": "object"}
    plain = tmp_path / "a.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert contents(write(tmp_path / f"a.{kind}", rows)) == contents(plain)


def test_cells_that_json_cannot_hold_are_text_or_reject_the_row_that_needs_them(tmp_path):
    import pyarrow

    answers = {
        "text": (["a"], "a"),
        "large": (pyarrow.array(["a"], pyarrow.large_string()), "a"),
        "dictionary": (pyarrow.array(["a"]).dictionary_encode(), "a"),
        "bytes": ([b"caf\xc3\xa9"], "café"),
        "raw bytes": ([b"\xff\xd8"], '"answer" is an object'),
        "nan": ([float("nan")], '"answer" is an object'),
        "null": (pyarrow.array([None], pyarrow.string()), '"answer" is missing or null'),
        "int": ([3], "3"),
        "bool": ([True], "true"),
        "decimal": ([decimal.Decimal("1.50")], "1.50"),
        "day": ([datetime.date(2026, 1, 2)], "2026-01-02"),
        "nanoseconds": (pyarrow.array([1], pyarrow.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
        "map": (pyarrow.array([[("k", "v")]], pyarrow.map_(pyarrow.string(), pyarrow.string())), '"answer" is an object'),
    }  # fmt: skip
    for name, (cells, expected) in answers.items():
        path = write(tmp_path / "a.parquet", {"question": ["q"], "answer": cells, "embedding": [[float("nan")]]})
        [found] = contents(path)
        found = found if isinstance(found, str) else found["messages"][1]["content"]
        assert found == expected, name


def test_columns_that_stand_twice_and_files_without_rows_are_refused(tmp_path):
    import pyarrow

    table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 3, names=["question", "Answer", "answer"])
    with pytest.raises(UserError, match="column 'answer' stands twice"):
        list(read_rows(write(tmp_path / "a.parquet", table)))
    with pytest.raises(UserError, match="holds no rows"):
        list(read_rows(write(tmp_path / "b.parquet", {"question": pyarrow.array([], pyarrow.string())})))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b'{"question": "q"}', "is no Parquet file, its first bytes are"),
        ("a.arrow", b"PAR1....", "is no Arrow file"),
        ("a.parquet", b"", "the file is empty"),
        ("a.parquet.gz", b"PAR1....", ".parquet files are not read packed"),
        ("a.jsonl", b"PAR1....", "is Parquet, not UTF-8 text"),
        ("a.csv", b"ARROW1..", "is Arrow, not UTF-8 text"),
    ],
)
def test_names_and_bytes_that_do_not_fit_are_refused_before_reading(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        find_files(str(tmp_path / name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_a_clear_error_and_never_kills_the_process(tmp_path, kind):
    rows = [{"question": f"q{n}", "answer": "a" * (n % 50 + 1), "turns": [{"x": n}]} for n in range(900)]
    whole = write(tmp_path / f"a.{kind}", rows).read_bytes()
    random.seed(kind)
    for number in range(60):
        broken = bytearray(whole)
        if number % 3 == 0:
            del broken[random.randrange(len(broken)) :]
        for _ in range(1 + number % 4):
            if len(broken) > 8:
                broken[random.randrange(8, len(broken))] = random.randrange(256)
        (tmp_path / f"{number:02}.{kind}").write_bytes(broken)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from scripts.utils import raw_files\nfrom scripts.utils.errors import UserError\n"
        "for path in sorted(Path(sys.argv[1]).glob('[0-9]*')):\n"
        "    try:\n        raw_files.find_files(str(path))\n        list(raw_files.read_rows(path))\n"
        "    except UserError as problem:\n        assert str(path) in problem.message, problem.message\n"
        "    print(path.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, (done.stdout[-20:], done.stderr[-2000:])
    assert len(done.stdout.split()) == 60


def test_a_stream_cut_between_two_batches_is_cut_short(tmp_path):
    path = write(tmp_path / "a.stream.arrow", [{"question": "q", "answer": "a"}] * 1500)
    whole = path.read_bytes()
    cuts = [place for place in range(8, len(whole) - 8, 8) if whole[place : place + 4] == b"\xff\xff\xff\xff"]
    assert len(cuts) >= 2
    for place in [*cuts, len(whole) - 8]:
        path.write_bytes(whole[:place])
        with pytest.raises(UserError, match="cut short"):
            list(read_rows(path))


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"question": ["q"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MachineError) as caught:
        find_files(str(path))
    assert str(path) in caught.value.message and "make install EXTRAS=data" in caught.value.hint
