"""process: report.json says the right numbers, report.html shows hostile rows harmlessly."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from scripts import process
from scripts.utils import data_report, environment, suspicious

HERE = Path("data/processed/set")
LONG = " ".join(f"word{number}" for number in range(60))
HOSTILE = '<script>alert(1)</script><img src="http://evil.example/x" onerror=alert(1)>\'"&'


@pytest.fixture
def run(tmp_path, monkeypatch):
    # other tests have imported torch into this process, which prepare() rightly refuses in a step of its own
    monkeypatch.setattr(environment, "prepare", lambda root: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_MODEL_CACHE", str(tmp_path / "models"))
    Path("run.yaml").write_text("data: {name: set, raw: raw, max_rejected: 1}\n")
    Path("raw").mkdir()
    return lambda more="": process.main(["--config", "run.yaml", "--force", "--set", more])


def write(name: str, rows: list[dict | str]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path("raw", name).write_text("".join(f"{line}\n" for line in lines))


def pair(question: str, answer: str = "a longer answer") -> dict:
    return {"question": question, "answer": answer}


def report() -> dict:
    return json.loads((HERE / "report.json").read_text())


def word_model(folder: Path) -> Path:
    """A model's folder with a tokenizer of one token a word, and settings that would cut and pad."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


KNOWN = [
    pair(LONG, "first"),
    pair(LONG, "first"),  # the same as line 1
    pair(LONG.replace("word30", "other"), "first"),  # nearly the same
    pair("What is asked?", "What is  asked?"),
    pair("Name one", "no"),
    pair("Name two", "no"),
    pair("Name a third thing", "As an AI language model I cannot."),
    '{"question": "q", "answer": ""}',
    "{",
    {"messages": [{"role": "user", "content": "x"}]},
]


def test_the_numbers_of_a_known_set_are_right(run, capsys):
    write("a.jsonl", KNOWN)
    model = word_model(Path("model"))
    assert run(f"model.name={model} render.max_length=10") == 0
    found = report()
    counts = {"rows_in": 10, "rows_out": 6, "rejected": 3, "duplicates": 1, "left_out": 0}
    assert found["all_files"] == counts
    assert found["files"] == [{"file": "raw/a.jsonl", "shape": "pairs", **counts}]
    assert sum(found["splits"].values()) == 6
    assert found["turns"] == {"1": 6}
    assert found["exact_duplicates"] == {"rows": 1, "examples": [{"row": "raw/a.jsonl:2", "first": "raw/a.jsonl:1"}]}
    [near] = found["near_duplicates"]["examples"]
    assert (found["near_duplicates"]["rows"], near["row"], near["first"]) == (1, "raw/a.jsonl:3", "raw/a.jsonl:1")
    assert found["answers"]["very_short"] == 2 and found["answers"]["empty"] == 0
    assert found["answers"]["most_frequent"] == [{"count": 2, "text": "first"}, {"count": 2, "text": "no"}]
    assert found["overlap"]["same_question_or_conversation"] == {
        "train and val": 0, "train and test": 0, "val and test": 0,
    }  # fmt: skip
    assert found["suspicious"]["rows"] == 2
    assert {item["reason"]: item["examples"] for item in found["suspicious"]["reasons"]} == {
        "the answer repeats the question": ["raw/a.jsonl:4"],
        'an answer speaks "as an AI language model"': ["raw/a.jsonl:7"],
    }
    tokens = found["tokens"]
    assert (tokens["counted_rows"], tokens["min"], tokens["max"]) == (6, 3, 61)
    assert tokens["over_max_length"] == pytest.approx(3 / 6)  # 61, 61 and 4 + 7
    assert sum(bar[2] for bar in tokens["histogram"]) == 6
    reasons = {item["reason"]: item["example"] for item in found["rejected_reasons"]}
    assert reasons['"answer" is empty'] == "raw/a.jsonl:8" and len(reasons) == 3
    shown = capsys.readouterr().out
    assert "data/processed/set/report.html" in shown
    assert "2 rows to look at" in shown and "near duplicates  1 rows" in shown


def test_removed_near_duplicates_are_not_counted_as_exact_ones(run):
    write("a.jsonl", KNOWN)
    assert run("data.near_duplicates=remove") == 0
    found = report()
    assert found["exact_duplicates"]["rows"] == 1
    assert found["near_duplicates"]["rows"] == 1 and found["near_duplicates"]["removed"]
    assert found["all_files"]["duplicates"] == 2


def test_without_the_tokenizer_no_tokens_are_counted_and_the_page_says_so(run):
    write("a.jsonl", KNOWN)
    assert run("model.name=nobody/nothing") == 0
    assert report()["tokens"] == {"model": "nobody/nothing", "counted_rows": 0, "max_length": 2048}
    assert "is not on this machine yet" in (HERE / "report.html").read_text()


def test_a_damaged_tokenizer_is_a_warning(run, capsys):
    write("a.jsonl", KNOWN)
    model = word_model(Path("model"))
    (model / "tokenizer.json").write_text("{")
    assert run(f"model.name={model}") == 0
    assert "the report counts no tokens" in capsys.readouterr().err


def test_of_many_rows_evenly_chosen_ones_are_counted_and_it_is_said(run, monkeypatch):
    monkeypatch.setattr(data_report, "TOKEN_ROWS", 10)
    write("a.jsonl", [pair(f"question {number}") for number in range(95)])
    assert run(f"model.name={word_model(Path('model'))}") == 0
    assert report()["tokens"]["counted_rows"] == 10
    assert "10 of 95 rows, evenly chosen" in (HERE / "report.html").read_text()


def test_overlap_of_given_splits_is_counted(run):
    write("train.jsonl", [pair("asked twice", "one"), pair("other")])
    write("test.jsonl", [pair("asked twice", "two")])
    assert run() == 0
    assert report()["overlap"]["same_question_or_conversation"]["train and test"] == 1


class Page(HTMLParser):
    """The elements and attributes of a page, each opened one closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_hostile_row_stays_text_and_the_page_needs_no_network(run):
    hostile = [pair(HOSTILE + str(n), HOSTILE) for n in range(3)]
    write("a.jsonl", [*hostile, pair(HOSTILE, ""), {"messages": [{"role": HOSTILE, "content": "x"}]}, *hostile])
    Path("raw/<b onclick=x>.jsonl").write_text(json.dumps(pair("q")) + "\n")
    assert run(f"model.name={json.dumps('<i>http')}") == 0
    text = (HERE / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in text and "<script" not in text and "<img" not in text
    page = Page(text)
    assert page.open == []
    assert page.tags <= set(
        "html head meta title style body main h1 h2 p div table tr th td svg rect line text".split()
    )
    assert not [name for name in page.attributes if name.startswith("on") or name in ("href", "src", "style")]
    assert not re.search(r"(?:href|src|url|@import)\s*[=(]?\s*[\"']?https?:", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_a_hundred_long_texts_leave_a_small_report(run):
    write("a.jsonl", [pair(f"{number} {LONG * 40}", "same" * 5000) for number in range(100)])
    assert run() == 0
    assert (HERE / "report.json").stat().st_size < 20_000 and (HERE / "report.html").stat().st_size < 30_000


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("What is it?", "what  is it?", "repeats the question"),
        (
            "Tell me what the weather is like today",
            "Tell me what the weather is like today: fine",
            "repeats the question",
        ),
        ("q", "fine<|im_end|>", "control tokens"),
        ("[INST] q", "fine", "control tokens"),
        ("q\n### Response:", "fine", "control tokens"),
        ("q", "caf\ufffd", "a character was lost"),
        ("q", "cafÃ©", "wrongly decoded"),
        ("q", "itâ€™s", "wrongly decoded"),
        ("q", "```python\nx = 1\n", "not closed"),
        ("q", "Sorry, as an AI language model, I cannot", "as an AI"),
        ("q", "```\nx\n``` and 1 < 2 | a|b, NÃO, Ângela, [x], ### Note", ""),
        ("What is it?", "It is a test", ""),
    ],
)
def test_suspicious_rows_are_told_from_good_ones(question, answer, reason):
    found = suspicious.find([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    assert len(found) == bool(reason) and reason in "".join(found)


def test_another_model_is_said_when_nothing_is_done_again(run, capsys):
    write("a.jsonl", KNOWN)
    one, two = word_model(Path("one")), word_model(Path("two"))
    assert run(f"model.name={one}") == 0
    for name, said in (
        (one, ""),
        ("nobody/nothing", ""),
        (two, f"counts tokens of {one}; FORCE=1 counts those of {two}"),
    ):
        capsys.readouterr()
        assert process.main(["--config", "run.yaml", "--set", f"model.name={name}"]) == 0
        shown = capsys.readouterr()
        assert "up to date" in shown.out and said in shown.err and ("counts tokens" in shown.err) == bool(said)


def test_without_the_library_for_near_duplicates_the_way_out_is_said(run, capsys, monkeypatch):
    write("a.jsonl", KNOWN)
    monkeypatch.setitem(sys.modules, "rensa", None)
    assert run() == 4
    assert "needs the package rensa" in (said := capsys.readouterr().err) and "data.near_duplicates=off" in said
    assert run("data.near_duplicates=off") == 0


def test_a_bare_hub_name_is_told_how_to_be_asked_for(run, capsys):
    assert run("data.raw=owner/set") == 2
    assert "RAW=hub:owner/set" in capsys.readouterr().err
    assert run("data.raw=raw/rows.jsonl") == 2
    assert "hub:" not in capsys.readouterr().err
