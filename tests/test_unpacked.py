"""Packed files: the same rows as unpacked, known by their bytes, limited, and never cut in silence."""

import gzip
import json
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts.utils import unpacked
from scripts.utils.errors import MachineError, UserError
from scripts.utils.raw_files import find_files, read_rows
from scripts.utils.splits import given_splits

needs_zstd = pytest.mark.skipif(find_spec("zstandard") is None, reason="make install EXTRAS=data")
KINDS = ["gzip", pytest.param("zstd", marks=needs_zstd)]
ROWS = [{"question": f"q{n}\u2028", "answer": "a" * n} for n in range(300)]
TEXTS = {
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "a.jsonl": b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "a.csv": b"question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in ROWS).encode(),
    "a.tsv": b"question\tanswer\n" + "".join(f"{r['question']}\t{r['answer']}\n" for r in ROWS).encode(),
}


def pack(content: bytes, kind: str) -> bytes:
    if kind == "gzip":
        return gzip.compress(content)
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def ending(kind: str) -> str:
    return ".gz" if kind == "gzip" else ".zst"


def rows_of(path: Path) -> list:
    return [(row.line, row.value, row.reason) for row in read_rows(path)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXTS)
def test_packed_rows_are_the_rows_of_the_file_with_the_same_lines(tmp_path, name, kind):
    plain, packed = tmp_path / name, tmp_path / (name.upper() + ending(kind))
    plain.write_bytes(TEXTS[name])
    packed.write_bytes(pack(TEXTS[name], kind))
    assert find_files(str(packed)) == ([packed], [])
    assert rows_of(packed) == rows_of(plain)
    assert [value for _, value, _ in rows_of(plain)] == ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_several_members_in_one_file_and_padding_are_read_to_the_end(tmp_path, kind):
    path = tmp_path / f"a.jsonl{ending(kind)}"
    lines = TEXTS["a.jsonl"].splitlines(keepends=True)
    content = b"".join(pack(part, kind) for part in (b"".join(lines[:100]), b"", b"".join(lines[100:])))
    path.write_bytes(content + b"\0" * 100_000)
    assert [value for _, value, _ in rows_of(path)] == ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_decide_and_a_name_that_says_otherwise_is_warned_of(tmp_path, kind):
    hidden, plain = tmp_path / "a.jsonl", tmp_path / f"b.jsonl{ending(kind)}"
    hidden.write_bytes(pack(TEXTS["a.jsonl"], kind))
    plain.write_bytes(TEXTS["a.jsonl"])
    paths, warnings = find_files(str(tmp_path))
    assert paths == [hidden, plain]
    assert warnings == [
        f"{hidden}: its name says plain text, its bytes say {kind}; read as that",
        f"{plain}: its name says {kind}, its bytes say plain text; read as that",
    ]
    assert rows_of(hidden) == rows_of(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_an_error_wherever_it_is_cut(tmp_path, kind):
    path = tmp_path / "a.jsonl.gz"
    whole = pack(b"".join(b'{"question": "%d", "answer": "a"}\n' % (n * 7919) for n in range(3000)), kind)
    for size in [4, 5, 9, 12, 20, *range(30, len(whole), len(whole) // 40), len(whole) - 8, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"a\.jsonl\.gz: the {kind} file is cut short: it ends after [\d,]+ bytes"):
            list(read_rows(path))
    path.write_bytes(whole)
    assert len(list(read_rows(path))) == 3000


@pytest.mark.parametrize("kind", KINDS)
def test_damage_names_the_place(tmp_path, kind):
    path = tmp_path / "a.jsonl"
    whole = bytearray(pack(b"".join(b'{"question": "%d", "answer": "a"}\n' % (n * 7919) for n in range(3000)), kind))
    for place in (len(whole) // 2, len(whole) - 3):
        broken = whole.copy()
        broken[place] ^= 0xFF
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"is damaged after [\d,]+ bytes of text, in line [\d,]+"):
            list(read_rows(path))


def test_bytes_after_the_end_and_packing_twice_are_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(TEXTS["a.jsonl"]) + b"more")
    with pytest.raises(UserError, match="damaged"):
        list(read_rows(path))
    path.write_bytes(gzip.compress(gzip.compress(TEXTS["a.jsonl"])))
    with pytest.raises(UserError, match="is packed twice"):
        find_files(str(path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("line", [b'{"question": "q", "answer": "a"}\n', b"x" * 32])
def test_expansion_is_limited_and_says_how_to_unpack(tmp_path, monkeypatch, kind, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(pack(line * 300_000, kind))
    assert path.stat().st_size * 100 < 300_000 * len(line)
    # all of it is below the size that is always allowed
    assert sum(1 for _ in unpacked.open_bytes(path)) in (1, 300_000)
    monkeypatch.setattr(unpacked, "FREE_BYTES", 2**20)
    with pytest.raises(UserError, match="more than 100 times its size") as caught:
        list(read_rows(path))
    assert "unpack it yourself" in caught.value.hint and "a.jsonl" in caught.value.hint
    monkeypatch.setattr(unpacked, "MAX_RATIO", 10**6)
    monkeypatch.setattr(unpacked, "MAX_BYTES", 2**20)
    with pytest.raises(UserError, match="unpacks to more than 0 GiB"):
        list(read_rows(path))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_a_bomb_is_stopped_within_little_memory(tmp_path):
    packer = zlib.compressobj(9, wbits=31)
    block = b" " * 2**20
    with (tmp_path / "bomb.csv").open("wb") as file:
        for _ in range(600):
            file.write(packer.compress(block))
        file.write(packer.flush())
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from scripts.utils.raw_files import read_rows\n"
        "from scripts.utils.errors import UserError\n"
        "try:\n    list(read_rows(Path(sys.argv[1])))\nexcept UserError as problem:\n    print(problem.message)\n"
        # not ru_maxrss, which a child inherits from its parent
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "bomb.csv")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)
    message, kib = done.stdout.splitlines()
    assert "more than 100 times its size" in message
    assert int(kib) < 400 * 1024


def test_without_the_library_zstd_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd\0\0")
    with pytest.raises(MachineError) as caught:
        find_files(str(path))
    assert str(path) in caught.value.message and "make install EXTRAS=data" in caught.value.hint


def test_packed_files_are_named_after_splits_too():
    named = given_splits([Path("train.jsonl.gz"), Path("val.csv.zst"), Path("test.json")])
    assert [*named.values()] == ["train", "val", "test"]
