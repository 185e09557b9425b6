"""process: which rows stay together. Questions, conversations and near duplicates never straddle; old rows never move."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import process
from scripts.utils import environment, grouping, near, splits, stages
from scripts.utils.reading import Read, Refused, Rows, gather

WORDS = [f"word{number}" for number in range(400)]
CHINESE = "".join(chr(0x4E00 + number) for number in range(90))  # a text without spaces
HALVES = "data.val_fraction=0.3 data.test_fraction=0.3 data.max_rejected=1"


@pytest.fixture
def run(tmp_path, monkeypatch):
    # other tests have imported torch into this process, which prepare() rightly refuses in a step of its own
    monkeypatch.setattr(environment, "prepare", lambda root: None)
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("data: {name: set, raw: raw}\n")
    Path("raw").mkdir()
    return lambda more="", *flags: process.main(
        ["--config", "run.yaml", "--force", "--set", f"{HALVES} {more}", *flags]
    )


def text(number: int, changed: int = -1) -> str:
    """60 words of its own for each number; with ``changed`` the word at that place is another."""
    words = [WORDS[(number * 61 + at * 7) % len(WORDS)] + str(number) for at in range(60)]
    if changed >= 0:
        words[changed] = "other"
    return " ".join(words)


def write(name: str, rows: list[dict]) -> None:
    Path("raw", name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"data/processed/set/{split}.jsonl").read_text().splitlines()]


def places() -> dict[str, str]:
    return {row["id"]: split for split in stages.SPLITS for row in rows(split)}


def counts() -> dict:
    found = stages.read_manifest(Path("data/processed/set"))
    assert found is not None
    assert found["rows_in"] == found["rows_out"] + found["rejected"] + found["duplicates"] + found["left_out"]
    assert {split: len(rows(split)) for split in stages.SPLITS} == found["splits"]
    assert len(rows("rejected")) == found["rejected"]
    assert not [path for path in Path("data/processed/set").iterdir() if path.name.startswith(".")]
    return found


def near_rows() -> list[dict]:
    """30 rows, and for each of them one that differs in a single word of the question."""
    return [
        {"question": text(number, changed), "answer": f"answer {number}"}
        for changed in (-1, 30)
        for number in range(30)
    ]


ROW = st.fixed_dictionaries(
    {
        "question": st.builds(text, st.integers(0, 6), st.sampled_from([-1, -1, 5, 30, 50])),
        "answer": st.sampled_from(["yes", "no", "perhaps"]),
    },
    optional={"conversation_id": st.sampled_from([None, "a", "b", "c", 4])},
)


@settings(max_examples=40)
@given(data=st.lists(ROW, min_size=1, max_size=25), mode=st.sampled_from(["report", "remove", "off"]))
def test_what_belongs_together_never_straddles_splits(run, data, mode):
    write("a.jsonl", data)
    assert run(f"data.near_duplicates={mode}") == 0
    counts()
    kept = [(split, row) for split in stages.SPLITS for row in rows(split)]
    for (one, first), (two, second) in itertools.combinations(kept, 2):
        if one == two:
            continue
        ids = [data[row["source"]["line"] - 1].get("conversation_id") for row in (first, second)]
        assert ids[0] is None or ids[0] != ids[1]
        assert first["messages"][:-1] != second["messages"][:-1]
        if mode != "off":
            assert not are_near(first, second)
    if mode == "remove":
        assert not any(are_near(first, second) for (_, first), (_, second) in itertools.combinations(kept, 2))


def are_near(first: dict, second: dict) -> bool:
    both = np.frombuffer(b"".join(near.signature(row["messages"]) for row in (first, second)), dtype=np.uint32)
    both = both.reshape(2, -1)
    in_one_bucket = bool((near.find_buckets(both)[0] >= 0).any())
    return in_one_bucket and float((both[0] == both[1]).mean()) >= 0.8


@settings(max_examples=25)
@given(data=st.lists(ROW, min_size=2, max_size=25), cut=st.integers(1, 24))
def test_appended_rows_move_no_old_row(run, data, cut):
    # a first row that is in train by itself, so that no split is filled up from another
    first = next(row for row in ({"question": f"q{n}", "answer": "a"} for n in range(99)) if in_train(row))
    write("a.jsonl", [first, *data[:cut]])
    assert run() == 0
    before = places()
    write("a.jsonl", [first, *data])
    assert run() == 0
    after = places()
    assert {row: after.get(row) for row in before} == before


def in_train(row: dict) -> bool:
    key = splits.question_hash({"messages": [{"role": "user", "content": row["question"]}, {}]}, 0)
    return splits.split_of(key, 0.3, 0.3) == "train"


@pytest.mark.parametrize(("mode", "kept", "duplicates", "near"), [("report", 61, 0, 30), ("remove", 31, 30, 30), ("off", 61, 0, 0)])  # fmt: skip
def test_near_duplicates_are_reported_removed_or_not_looked_for(run, capsys, mode, kept, duplicates, near):
    write("a.jsonl", [*near_rows(), {"question": "alone", "answer": "a"}])
    assert run(f"data.near_duplicates={mode}") == 0
    found = counts()
    assert (found["rows_out"], found["duplicates"], found["near_duplicates"]) == (kept, duplicates, near)
    assert ("near duplicates" in capsys.readouterr().out) == (near > 0)


def test_the_threshold_says_how_alike_near_duplicates_are(run):
    write("a.jsonl", near_rows())
    assert run("data.near_threshold=1") == 0
    assert counts()["near_duplicates"] == 0


def test_a_row_that_belongs_with_two_splits_is_written_to_neither(run):
    first = [{"question": text(n), "answer": "a", "session_id": f"s{n}"} for n in range(12)]
    write("a.jsonl", first)
    assert run() == 0
    at = {row["source"]["line"] - 1: split for split in stages.SPLITS for row in rows(split)}
    one, two = next(n for n in at if at[n] == "train"), next(n for n in at if at[n] == "test")
    bridges = [
        {"question": text(one, 30), "answer": "a", "session_id": f"s{two}"},
        {"question": text(one), "answer": "quite another", "session_id": f"s{two}"},
    ]
    write("a.jsonl", first + bridges)
    # they are no fault of the data, so they do not count towards max_rejected
    assert run("data.max_rejected=0") == 0
    assert counts()["rejected"] == 2
    near_row, exact = rows("rejected")
    assert near_row["reason"].startswith("nearly the same as rows of two splits (")
    assert (
        f"train: raw/a.jsonl:{one + 1}" in near_row["reason"] and f"test: raw/a.jsonl:{two + 1}" in near_row["reason"]
    )
    assert exact["reason"].startswith("shares its question or conversation with rows of two splits")
    assert exact["row"]["messages"][1]["content"] == "quite another"


@pytest.mark.parametrize("column", ["conversation_id", "Session_ID", "thread"])
def test_rows_of_one_conversation_share_a_split_and_its_id_is_no_column_left_out(run, capsys, column):
    write("a.jsonl", [{"question": text(n), "answer": "a", column: n % 10} for n in range(100)])
    assert run("data.columns={group: thread}" if column == "thread" else "") == 0
    by_id: dict[int, set[str]] = {}
    for split in stages.SPLITS:
        for row in rows(split):
            by_id.setdefault((row["source"]["line"] - 1) % 10, set()).add(split)
    assert len(by_id) == 10 and all(len(found) == 1 for found in by_id.values())
    assert len(set().union(*by_id.values())) > 1
    assert "left out" not in capsys.readouterr().err


def test_given_splits_keep_near_duplicates_and_say_so(run, capsys):
    pairs = near_rows()
    write("train.jsonl", [*pairs[:30], {"question": "alone", "answer": "a"}])
    write("test.jsonl", pairs[30:])
    assert run() == 0
    assert counts()["splits"] == {"train": 31, "val": 0, "test": 30}
    assert "30 rows are nearly the same as a row of another of the given splits" in capsys.readouterr().err
    assert run("data.near_duplicates=remove") == 0
    assert counts()["splits"] == {"train": 1, "val": 0, "test": 30}


def test_a_system_message_that_all_rows_share_makes_them_no_near_duplicates(run):
    write("a.jsonl", [{"system": text(1) * 5, "question": f"question {n} {text(n + 2, 3)}", "answer": "a"} for n in range(20)])  # fmt: skip
    assert run() == 0
    assert counts()["near_duplicates"] == 0


def test_rows_that_are_all_alike_are_placed_and_said(run, capsys):
    write("a.jsonl", [{"question": f"{text(1)} {n}", "answer": "a"} for n in range(200)])
    assert run() == 0
    assert counts()["rows_out"] == 200
    assert "data.near_duplicates=off" in capsys.readouterr().err


@pytest.mark.parametrize(("one", "two", "alike"), [
    (text(1), text(1, 30), True), (text(1), text(2), False), ("What is 3 + 4?", "What is 3 + 5?", False),
    ("How do I reset my password?", "how do I  reset my password?", True), (CHINESE + "今日は", CHINESE + "明日は", True),
])  # fmt: skip
def test_how_alike_two_texts_are(one, two, alike):
    both = [{"messages": [{"role": "user", "content": part}]} for part in (one, two)]
    assert are_near(*both) == alike


def test_overlaps_are_counted_from_the_result():
    found = Rows(names=["a"])
    for key in (1, 1, 2, 3):
        row = Read(1, b"", b"", b"", question=key, group=0, characters=1, turns=1, answer=1, marks=0)
        found.add(gather([row]), -1)
    assert grouping.overlaps(found, bytes([0, 2, 0, 1])) == {"train and val": 0, "train and test": 1, "val and test": 0}


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=30),
    st.floats(0, 0.5), st.floats(0, 0.49),
)  # fmt: skip
def test_all_rows_at_once_get_the_split_that_each_gets_alone(keys, val, test):
    found = Rows(names=["a"])
    read = [Read(1, b"", b"", b"", question=q, group=g, characters=1, turns=1, answer=1, marks=0) for q, g in keys]
    found.add(gather(read), -1)
    alone = [splits.split_of((g or q).to_bytes(8), val, test) for q, g in keys]
    assert [grouping.SPLITS[code] for code in grouping._codes_by_hash(found, val, test)] == alone


def test_a_chunk_keeps_the_rows_asked_for_and_no_byte_of_the_others():
    read = [
        Read(
            n,
            bytes([n]) * 12,
            b"x" * n + b"\n",
            bytes([n]) * 8,
            question=n,
            group=0,
            characters=n,
            turns=1,
            answer=n,
            marks=0,
        )
        for n in range(1, 6)
    ]
    whole = gather([read[0], Refused(9, "r", "", b"{}\n"), *read[1:]])
    assert whole.only([1, 3]) == gather([Refused(9, "r", "", b"{}\n"), read[1], read[3]])
    assert whole.only([]).json == b"" and len(whole.refused) == 1
