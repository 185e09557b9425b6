"""process: the count equation, the splits, what is refused and what stays untouched."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import process
from scripts.utils import environment, stages

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call process in an empty folder, as ``make process`` would; returns the exit code."""
    for name in ("SFT_CONFIG", "SFT_RAW", "SFT_SET", "SFT_FORCE"):
        monkeypatch.delenv(name, raising=False)
    # other tests have imported torch into this process, which prepare() rightly refuses in a step of its own
    monkeypatch.setattr(environment, "prepare", lambda root: None)
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("data: {name: set}\n")
    Path("data/raw").mkdir(parents=True)
    return lambda *flags: process.main(["--config", "run.yaml", *flags])


def pairs(*questions: str, answer: str = "a") -> str:
    return "".join(json.dumps({"question": question, "answer": answer}) + "\n" for question in questions)


def many(count: int) -> str:
    return pairs(*(f"question {number}" for number in range(count)))


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"data/processed/set/{split}.jsonl").read_text().splitlines()]


def manifest() -> dict:
    found = stages.read_manifest(Path("data/processed/set"))
    assert found is not None
    return found


def assert_counts_add_up() -> dict:
    found = manifest()
    assert found["rows_in"] == found["rows_out"] + found["rejected"] + found["duplicates"] + found["left_out"]
    assert {split: len(rows(split)) for split in stages.SPLITS} == found["splits"]
    assert sum(found["splits"].values()) == found["rows_out"]
    assert len(rows("rejected")) == found["rejected"]
    ids = [row["id"] for split in stages.SPLITS for row in rows(split)]
    assert len(ids) == len(set(ids))
    return found


def tree() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}


def test_rows_in_are_rows_out_rejected_and_duplicates(run, capsys):
    Path("data/raw/a.jsonl").write_text(many(40) + pairs("question 1") + '{"question": "q", "answer": ""}\n')
    Path("data/raw/b.csv").write_text("question,answer\nquestion 2,a\nnew,a\n")
    assert run() == 0
    found = assert_counts_add_up()
    assert (found["rows_in"], found["rows_out"], found["rejected"], found["duplicates"]) == (44, 41, 1, 2)
    [rejected] = rows("rejected")
    assert (rejected["file"], rejected["line"]) == ("data/raw/a.jsonl", 42)
    assert (rejected["reason"], rejected["row"]) == ('"answer" is empty', {"question": "q", "answer": ""})
    shown = capsys.readouterr()
    [total] = [line.split() for line in shown.out.splitlines() if line.strip().startswith("all files")]
    assert total == ["all", "files", "44", "41", "1", "2"]
    assert "data/processed/set" in shown.out
    assert "read as pairs (question → user, answer → assistant)" in shown.err


@settings(max_examples=25)
@given(lines=st.lists(st.sampled_from(["", "{", "3", "{}", '{"question": 1, "answer": null}', pairs("a"), pairs("b"), pairs("a", answer="b")])))  # fmt: skip
def test_counts_add_up_whatever_the_lines(run, lines):
    text = pairs("first") + "\n".join(line.strip() for line in lines)
    Path("data/raw/a.jsonl").write_text(text)
    assert run("--set", "data.max_rejected=1", "--force") == 0
    assert assert_counts_add_up()["rows_in"] == 1 + sum(bool(line) for line in lines)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not on this machine")
@pytest.mark.parametrize(
    ("name", "rows_in", "duplicates", "with_tools"),
    [
        ("alpaca_en_demo.json", 999, 14, 0),
        ("glaive_toolcall_en_demo.json", 300, 35, 172),
        ("gsm8k_test.jsonl", 1319, 0, 0),
    ],
)
def test_public_data_sets_go_through_with_nothing_rejected(run, name, rows_in, duplicates, with_tools):
    assert run("--raw", str(SHARED / name)) == 0
    found = assert_counts_add_up()
    assert (found["rows_in"], found["duplicates"], found["rejected"]) == (rows_in, duplicates, 0)
    kept = [row for split in stages.SPLITS for row in rows(split)]
    assert sum("tools" in row for row in kept) == with_tools
    assert all(row["messages"][-1]["role"] == "assistant" for row in kept)


def test_a_second_run_says_up_to_date_and_force_runs_again(run, capsys):
    Path("data/raw/a.jsonl").write_text(many(20))
    assert run() == 0
    before = Path("data/processed/set/manifest.json").stat().st_ino
    assert run() == 0
    assert "up to date" in capsys.readouterr().out
    assert Path("data/processed/set/manifest.json").stat().st_ino == before
    assert run("--force") == 0
    assert "up to date" not in capsys.readouterr().out


def test_changed_rows_settings_or_a_cut_output_are_processed_again(run, capsys):
    Path("data/raw/a.jsonl").write_text(many(20))
    assert run() == 0
    Path("data/processed/set/train.jsonl").write_text("")
    for flags in ((), ("--set", "data.val_fraction=0.5"), ("--set", "data.split_seed=7")):
        capsys.readouterr()
        assert run(*flags) == 0
        assert "up to date" not in capsys.readouterr().out
    Path("data/raw/a.jsonl").write_text(many(21))
    assert run() == 0
    assert manifest()["rows_in"] == 21
    Path("data/processed/set/manifest.json").write_text("{")
    assert run() == 0
    assert_counts_add_up()


def test_adding_rows_moves_no_old_row_and_a_question_stays_in_one_split(run):
    def places() -> dict[str, str]:
        return {row["messages"][0]["content"]: split for split in stages.SPLITS for row in rows(split)}

    Path("data/raw/a.jsonl").write_text(many(100))
    assert run() == 0
    before = places()
    Path("data/raw/a.jsonl").write_text(pairs("earlier") + many(200) + pairs(*before, answer="another"))
    assert run() == 0
    after = places()
    assert {question: after[question] for question in before} == before
    by_question: dict[str, set[str]] = {}
    for split in stages.SPLITS:
        for row in rows(split):
            by_question.setdefault(row["messages"][0]["content"], set()).add(split)
    assert all(len(found) == 1 for found in by_question.values())


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_rows_always_leave_some_to_train_on_and_an_empty_split_is_said(run, capsys, count):
    Path("data/raw/a.jsonl").write_text(many(count))
    assert run("--set", "data.val_fraction=0.5 data.test_fraction=0.49") == 0
    splits = assert_counts_add_up()["splits"]
    assert splits["train"] > 0
    shown = capsys.readouterr().err
    assert ("no val rows: no evaluation during training, no best checkpoint" in shown) == (splits["val"] == 0)
    assert ("no test rows" in shown) == (splits["test"] == 0)


def test_files_named_after_splits_are_kept_and_what_is_held_out_leaves_train(run, capsys):
    Path("data/raw/train.jsonl").write_text(many(20) + pairs("held out") + pairs("question x", answer="b"))
    Path("data/raw/validation.jsonl").write_text(pairs("v"))
    Path("data/raw/test.jsonl").write_text(pairs("held out", "question x", "v"))
    assert run() == 0
    found = assert_counts_add_up()
    assert found["splits"] == {"train": 21, "val": 0, "test": 3}
    assert found["duplicates"] == 2
    shown = capsys.readouterr().err
    assert "1 rows share their question with another of the given splits" in shown
    assert "no val rows" in shown


def test_rows_beside_a_test_file_never_join_it_unless_it_asks_the_same(run):
    Path("data/raw/more.jsonl").write_text(many(100) + pairs("asked twice", answer="b"))
    Path("data/raw/test.jsonl").write_text(pairs("asked twice"))
    assert run() == 0
    assert [row["messages"][0]["content"] for row in rows("test")] == ["asked twice", "asked twice"]
    assert manifest()["splits"]["val"] > 0


def test_when_every_train_row_is_held_out_it_is_an_error(run, capsys):
    Path("data/raw/train.jsonl").write_text(pairs("a"))
    Path("data/raw/test.jsonl").write_text(pairs("a"))
    assert run() == 2
    assert "no row is left to train on" in capsys.readouterr().err


def test_a_folder_is_read_in_order_and_names_what_it_passes_over(run, capsys):
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl"):
        Path("data/raw", name).write_text(pairs(name))
    Path("data/raw/.gitkeep").touch()
    Path("data/raw/notes.txt").write_text("x")
    Path("data/raw/more").mkdir()
    assert run() == 0
    assert list(manifest()["inputs"]) == ["data/raw/a.jsonl", "data/raw/b.jsonl"]
    shown = capsys.readouterr().err
    assert "data/raw/notes.txt is not read" in shown and "RAW=data/raw/more reads it" in shown
    assert "hidden" not in shown and "gitkeep" not in shown


def test_a_list_of_files_in_the_config_is_read(run):
    Path("one.jsonl").write_text(many(5))
    Path("two.csv").write_text("question,answer\nq,a\n")
    Path("run.yaml").write_text("data: {name: set, raw: [one.jsonl, two.csv]}\n")
    assert run() == 0
    assert manifest()["rows_in"] == 6


def test_a_pattern_names_files_in_order_and_what_it_passes_over(run, capsys):
    for name in ("b-2.jsonl", "b-1.jsonl", "a-1.jsonl", "b-3.txt", ".b-4.jsonl"):
        Path("data/raw", name).write_text(pairs(name))
    Path("data/raw/b-deep/b").mkdir(parents=True)
    Path("data/raw/b-deep/b/b-5.csv").write_text("question,answer\nq,a\n")
    Path("run.yaml").write_text("data: {name: set, raw: ['data/raw/b*', data/raw/a-1.jsonl, data/raw/b-1.jsonl]}\n")
    assert run() == 0
    assert list(manifest()["inputs"]) == [f"data/raw/{name}" for name in ("b-1.jsonl", "b-2.jsonl", "a-1.jsonl")]
    shown = capsys.readouterr().err
    assert "data/raw/b-3.txt is not read" in shown and "RAW=data/raw/b-deep reads it" in shown
    assert run("--raw", "data/**/b-?.[cj]s*") == 0
    names = ["data/raw/b-1.jsonl", "data/raw/b-2.jsonl", "data/raw/b-deep/b/b-5.csv"]
    assert list(manifest()["inputs"]) == names
    assert run("--raw", "data/raw/c*") == 2
    assert f"nothing has a name like {Path('data/raw/c*').absolute()}" in capsys.readouterr().err
    Path("data/raw/c[1].jsonl").write_text(many(3))  # a file of that name is no pattern
    assert run("--raw", "data/raw/c[1].jsonl") == 0
    assert manifest()["rows_in"] == 3


def test_own_column_names_are_used_and_a_change_of_them_counts(run, capsys):
    Path("data/raw/a.csv").write_text("Frage,Antwort,Kontext\n" + "".join(f"q{n},a,b\n" for n in range(9)))
    assert run() == 2
    assert 'SET="data.columns={user: your_question, assistant: your_answer}"' in capsys.readouterr().err
    assert run("--set", "data.columns={user: Frage, assistant: Antwort}") == 0
    assert "columns left out: kontext (9 rows)" in capsys.readouterr().err
    assert run("--set", "data.columns={user: Frage, assistant: Antwort, system: Kontext}") == 0
    assert [m["role"] for m in rows("train")[0]["messages"]] == ["system", "user", "assistant"]


def kept_questions() -> set[str]:
    return {row["messages"][0]["content"] for split in stages.SPLITS for row in rows(split)}


def test_a_mixture_takes_a_share_or_a_number_of_each_source_and_counts_the_rest(run, capsys):
    Path("a.jsonl").write_text(many(400) + pairs("question 1", "question 2") + "{\n")
    Path("b.csv").write_text("Frage,Antwort\n" + "".join(f"b{n},a\n" for n in range(300)) + "question 3,a\n")
    Path("c.jsonl").write_text(pairs(*(f"c{n}" for n in range(5))))
    mixture = [
        {"raw": "a.jsonl", "weight": 0.25},
        {"raw": ["b.csv"], "limit": 40, "columns": {"user": "Frage", "assistant": "Antwort"}},
        {"raw": "c.jsonl", "limit": 100},
    ]
    Path("run.yaml").write_text(json.dumps({"data": {"name": "set", "sources": mixture}}))
    assert run() == 0
    found = assert_counts_add_up()
    kept = kept_questions()
    from_a, from_b = {q for q in kept if q.startswith("question")}, {q for q in kept if q.startswith("b")}
    assert 70 <= len(from_a) <= 130 and 39 <= len(from_b) <= 40 and len(kept - from_a - from_b) == 5
    assert found["rows_in"] == 403 + 301 + 5 and found["rejected"] == 1
    [total] = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("all files")]
    assert total[2:] == [str(found[name]) for name in ("rows_in", "rows_out", "rejected", "duplicates", "left_out")]
    assert run() == 0
    assert "up to date" in capsys.readouterr().out
    # more rows move few
    Path("a.jsonl").write_text(many(800))
    Path("b.csv").write_text("Frage,Antwort\n" + "".join(f"b{n},a\n" for n in range(330)))
    assert run() == 0
    assert from_a - {"question 3"} <= kept_questions()
    moved = from_b - kept_questions()
    assert len(moved) <= 15 and len({q for q in kept_questions() if q.startswith("b")}) == 40


@pytest.mark.parametrize("limit", [1, 7, 19, 20, 21, 1000])
def test_a_limit_takes_exactly_that_many_different_rows(run, limit):
    Path("a.jsonl").write_text(many(20) + many(20) + "{\n")
    Path("run.yaml").write_text(json.dumps({"data": {"name": "set", "sources": [{"raw": "a.jsonl", "limit": limit}]}}))
    assert run() == 0
    assert assert_counts_add_up()["rows_out"] == min(limit, 20)


def test_mixtures_that_cannot_be_meant_are_refused(run, capsys):
    Path("a.jsonl").write_text(many(20))
    for sources, flags, message in [
        ([{"raw": "a.jsonl"}, {"raw": "./a.jsonl"}], [], "stands in data.sources twice, in the sources 1 and 2"),
        ([{"raw": "a.jsonl", "weight": 2}], [], "data.sources.0.weight is '2', expected less than or equal to 1"),
        ([{"raw": "a.jsonl", "weight": 0.5, "limit": 3}], [], "item 1: weight and limit are two ways"),
        ([{"raw": "a.jsonl", "wieght": 0.5}], [], "unknown key 'wieght' in data.sources"),
        ([{"raw": "a.jsonl", "format": "messages", "columns": {"user": "q"}}], [], "item 1: columns names user"),
        ([{"raw": "a.jsonl"}], ["--raw", "a.jsonl"], "data.raw (RAW) and data.sources both"),
        ([{"raw": "a.jsonl", "weight": 1e-12}], [], "no row is left: data.sources takes none"),
        ([{"raw": "b.jsonl"}], [], "b.jsonl does not exist"),
    ]:
        Path("run.yaml").write_text(json.dumps({"data": {"name": "set", "sources": sources}}))
        assert run(*flags) == 2
        assert message in capsys.readouterr().err


BAD = [
    ("broken line", "a.jsonl", pairs("q") + "{oops\n", ["1 of 2 rows cannot be used", "not valid JSON, first at data/raw/a.jsonl:2"]),
    ("empty file", "a.jsonl", "", ["data/raw/a.jsonl: the file is empty"]),
    ("blank file", "a.jsonl", "\n\n", ["holds no rows"]),
    ("no usable columns", "a.csv", "Frage,Antwort\n1,2\n", ["'Frage', 'Antwort'", "question", "completion"]),
    ("headerless CSV", "a.csv", "What is this?,A test\nAnd this?,Too\n", ["found: 'What is this?', 'A test'"]),
    ("latin-1", "a.csv", b"question,answer\nq,caf\xe9\n", ["a.csv:2: not UTF-8: byte 0xe9 at offset 21"]),
    ("UTF-16", "a.csv", "question,answer\nq,a\n".encode("utf-16"), ["is UTF-16, not UTF-8 text"]),
    ("gzip", "a.jsonl", b"\x1f\x8b\x08\x00abc", ["a.jsonl: the gzip file is cut short: it ends after 0 bytes"]),
    ("broken array", "a.json", '[{"question": "q"', ["a.json:1:18: not valid JSON"]),
    ("only answers that are empty", "a.jsonl", pairs("q", answer=""), ["1 of 1 rows cannot be used, so none is left"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "messages"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_data_is_one_clear_error_and_changes_nothing(run, capsys, name, content, messages):
    Path("data/raw/good.jsonl").write_text(many(10))
    assert run() == 0
    Path("data/raw/good.jsonl").unlink()
    Path("data/raw", name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = tree()
    capsys.readouterr()
    assert run() == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown and "hint: " in shown
    assert all(message in shown for message in messages), shown
    assert tree() == before


def test_too_many_rejected_rows_name_the_three_most_frequent_reasons(run, capsys):
    bad = ['{"question": "q", "answer": ""}', "{", '{"question": "q"}', "3"]
    lines = [line for count, line in zip((4, 3, 2, 1), bad, strict=True) for _ in range(count)]
    Path("data/raw/a.jsonl").write_text(many(10) + "\n".join(lines))
    assert run() == 2
    shown = capsys.readouterr().err
    assert "10 of 20 rows cannot be used, more than data.max_rejected allows (5%)" in shown
    assert '4 × "answer" is empty, first at data/raw/a.jsonl:11' in shown
    assert "3 × not valid JSON, first at data/raw/a.jsonl:15" in shown
    assert '2 × "answer" is missing or null, first at data/raw/a.jsonl:18' in shown
    assert "not an object" not in shown
    assert 'SET="data.max_rejected=0.5"' in shown
    assert run("--set", "data.max_rejected=0.5") == 0
    assert rows("rejected")[4]["row"] == "{"


@pytest.mark.parametrize("raw", ["data/raw", "nowhere", "notes.doc"])
def test_no_data_names_the_absolute_path_and_says_what_to_do(run, capsys, raw):
    Path("notes.doc").write_text("x")
    assert run("--raw", raw) == 2
    shown = capsys.readouterr().err
    assert str(Path(raw).absolute()) in shown
    assert raw == "notes.doc" or "RAW=data/sample" in shown


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(run):
    Path("data/raw/a.jsonl").write_bytes(b"\xef\xbb\xbf" + many(20).replace("\n", "\r\n").encode())
    assert run() == 0
    windows = {row["id"] for split in stages.SPLITS for row in rows(split)}
    Path("data/raw/a.jsonl").write_text(many(20))
    assert run() == 0
    assert windows == {row["id"] for split in stages.SPLITS for row in rows(split)}
