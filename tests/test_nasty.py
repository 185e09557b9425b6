"""Nasty files through the whole step: never a traceback, every row counted, each reason right; then random damage."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest

from scripts import process
from scripts.utils import environment, stages
from tests.nasty_files import NASTY

FUZZED_FILES = int(os.environ.get("FUZZED_FILES", "300"))  # 10,000 take a minute
HERE = Path("data/processed/set")


@pytest.fixture
def run(tmp_path, monkeypatch):
    # other tests have imported torch into this process, which prepare() rightly refuses in a step of its own
    monkeypatch.setattr(environment, "prepare", lambda root: None)
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("data: {name: set, max_rejected: 1, raw: [nasty, good.jsonl]}\n")
    rows = [{"question": f"good {n}", "answer": "g"} for n in range(10)]
    Path("good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("nasty").mkdir()
    return lambda: process.main(["--config", "run.yaml"])


def rows(name: str) -> list[dict]:
    with (HERE / f"{name}.jsonl").open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def accounted() -> tuple[list[dict], list[dict], int]:
    """Rows kept, rows rejected and the number of duplicates, after a look at the equation and the files."""
    found = stages.read_manifest(HERE)
    assert found is not None
    kept = [row for split in stages.SPLITS for row in rows(split)]
    rejected = rows("rejected")
    assert (len(kept), len(rejected)) == (found["rows_out"], found["rejected"])
    assert found["rows_in"] == len(kept) + len(rejected) + found["duplicates"]
    assert len({row["id"] for row in kept}) == len(kept)
    return kept, rejected, found["duplicates"]


def test_there_are_enough_of_them():
    assert len(NASTY) >= 100


@pytest.mark.parametrize("case", NASTY)
def test_nasty_file(run, capsys, case):
    name, content, expected = NASTY[case]
    Path("nasty", name).write_bytes(content)
    code = run()
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    if isinstance(expected, str):
        assert code == 2 and expected in shown, shown
        assert "hint: " in shown and not HERE.exists()
        return
    assert code == 0, shown
    kept, rejected, duplicates = accounted()
    assert sum(row["source"]["file"] != "good.jsonl" for row in kept) == expected[0]
    assert {row["line"]: row["reason"] for row in rejected}.keys() == expected[1].keys(), rejected
    for row in rejected:
        assert row["file"] == f"nasty/{name}" and expected[1][row["line"]] in row["reason"], row["reason"]
    assert duplicates == (2 if case == "the same row three times" else 0)


def test_all_that_can_be_read_goes_through_together(run):
    readable = {case: entry for case, entry in NASTY.items() if not isinstance(entry[2], str)}
    for number, (name, content, _) in enumerate(readable.values()):
        if len(content) < 10**6:
            Path("nasty", f"{number:03}-{name}").write_bytes(content)
    assert run() == 0
    _, rejected, _ = accounted()
    assert len(rejected) == sum(len(entry[2][1]) for entry in readable.values())


def damaged(chance: random.Random) -> tuple[str, bytes]:
    """A nasty file of any kind with random bytes changed, moved, doubled or cut away, sometimes packed afterwards."""
    name, content, _ = chance.choice([entry for entry in NASTY.values() if len(entry[1]) < 10**5])
    broken = bytearray(content * chance.choice((1, 1, 2, 5)))
    pieces = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u", b"\n", b"\r", b"\0", b"\xff", b"null", b"1e9999", b"\x1f\x8b", b"-", b"user", b'{"role":"assistant","content":""}']  # fmt: skip
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(broken) + 1)
        end = min(len(broken), place + chance.randint(0, 12))
        kind = chance.randrange(5)
        if kind == 0:
            broken[place:place] = chance.choice(pieces)
        elif kind == 1:
            del broken[place:end]
        elif kind == 2:
            broken[place:place] = broken[place:end] * chance.randint(1, 3)
        elif kind == 3 and place < len(broken):
            broken[place] = chance.randrange(256)
        else:
            broken[place:end] = chance.choice(pieces)
    if chance.random() < 0.1:
        del broken[chance.randrange(len(broken) + 1) :]
    packed = gzip.compress(bytes(broken)) if chance.random() < 0.15 else bytes(broken)
    return chance.choice((name, name, "b.json", "b.jsonl", "b.csv", "b.tsv")), packed


def test_randomly_damaged_files_never_crash_and_lose_no_row(run, capsys):
    for number in range(FUZZED_FILES):
        name, content = damaged(random.Random(number))
        path = Path("nasty", name)
        path.write_bytes(content)
        code = run()
        shown = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in shown, (number, shown)
        if code == 0:
            kept, rejected, duplicates = accounted()
            text = content.removeprefix(b"\xef\xbb\xbf")
            if name.endswith(".jsonl") and text.lstrip()[:1] != b"[" and not text.startswith(b"\x1f\x8b"):
                lines = sum(bool(line.strip(b" \t\r")) for line in text.split(b"\n"))
                assert lines + 10 == len(kept) + len(rejected) + duplicates, number
        else:
            assert str(path) in shown or "cannot be used" in shown, (number, shown)
        path.unlink()
