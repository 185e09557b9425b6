"""Shapes of raw rows: what is read as what, kept letter by letter, and each rejection's reason."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.utils import records
from scripts.utils.errors import MachineError, UserError
from scripts.utils.raw_files import read_rows
from scripts.utils.splits import given_splits, question_hash, split_of

ANSWER = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def read_one(tmp_path: Path, row: object, wanted: str = "auto") -> records.Record:
    path = tmp_path / "rows.jsonl"
    path.write_text(row if isinstance(row, str) else json.dumps(row), encoding="utf-8")
    [record] = records.open_file(path, wanted).records
    return record


def said(record: records.Record) -> list[tuple[str, str]]:
    assert record.content is not None, record.reason
    return [(message["role"], message["content"]) for message in record.content["messages"]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"Question": "q", "ANSWER": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"query": "q", "response": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"input": "q", "output": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"system": "s", "user": "q", "assistant": "a"}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
        ({"system": "", "user": "q", "assistant": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "i", "input": "", "output": "a"}, [("user", "i"), ("assistant", "a")]),
        ({"instruction": "i", "input": "more", "output": "a"}, [("user", "i\n\nmore"), ("assistant", "a")]),
        ({"instruction": "", "input": "only", "output": "a"}, [("user", "only"), ("assistant", "a")]),
        ({"instruction": "i", "context": "c", "response": "a"}, [("user", "i\n\nc"), ("assistant", "a")]),
        (
            {"instruction": "i", "output": "a", "history": [["h", "g"]], "system": "s"},
            [("system", "s"), ("user", "h"), ("assistant", "g"), ("user", "i"), ("assistant", "a")],
        ),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "completion": [ANSWER]},
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"prompt": "q", "completion": [ANSWER]}, [("user", "q"), ("assistant", "a")]),
        ({"question": "q", "answer": 3}, [("user", "q"), ("assistant", "3")]),
        ({"question": 1.5, "answer": False}, [("user", "1.5"), ("assistant", "false")]),
        ({"messages": [{"role": "user", "content": "q"}, ANSWER]}, [("user", "q"), ("assistant", "a")]),
        (
            {"messages": [{"role": "developer", "content": ""}, {"role": "user", "content": "q"}, ANSWER]},
            [("system", ""), ("user", "q"), ("assistant", "a")],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]},
                    ANSWER,
                ]
            },
            [("user", "qr"), ("assistant", "a")],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
    ],
)
def test_common_shapes_become_messages(tmp_path, row, expected):
    assert said(read_one(tmp_path, row)) == expected


def test_openai_and_sharegpt_tool_calls_come_out_in_one_form(tmp_path):
    tool = {"name": "f", "parameters": {}}
    openai = {
        "messages": [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "content": "r"},
            ANSWER,
        ],
        "tools": [{"type": "function", "function": tool}],
    }
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps([tool]),
    }
    first, second = read_one(tmp_path, openai).content, read_one(tmp_path, sharegpt).content
    assert first == second
    assert first["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert first["tools"] == openai["tools"]


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "answer": ""}, '"answer" is empty'),
        ({"question": "q", "answer": " \n\t"}, '"answer" is empty'),
        ({"question": "q", "answer": None}, '"answer" is missing or null'),
        ({"question": "q", "answer": ["a", "b"]}, '"answer" is a list'),
        ({"question": "q", "answer": {"a": 1}}, '"answer" is an object'),
        ({"question": " ", "answer": "a"}, '"question" is empty'),
        (turns("user"), "no assistant turn"),
        (turns("user", "assistant", "user"), "the last turn is not the assistant's"),
        (turns("system"), "no assistant turn"),
        (turns("assistant", "user"), "roles in a wrong order"),
        (turns("user", "user", "assistant"), "roles in a wrong order"),
        (turns("user", "system", "assistant"), "roles in a wrong order"),
        (turns("user", "tool", "assistant"), "roles in a wrong order"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALL]}, ANSWER]}, "roles in a wrong order"),
        (turns("user", "critic"), "a turn has an unknown role"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}, "an assistant turn is empty"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]}, "an assistant turn is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "a user turn holds parts that are not text"),
        ({"messages": [{"role": "user", "content": "q"}, {**ANSWER, "weight": 0}]}, '"weight" on a single turn is not supported ("train": false keeps it out of the loss)'),
        ({"messages": [{"role": "user", "content": "q"}, {**ANSWER, "train": "no"}]}, '"train" on a turn is not true or false'),
        ({"messages": [{"role": "user", "content": "q"}, {**ANSWER, "train": False}]}, 'no turn to learn from: every assistant turn says "train": false'),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALL]}, {"role": "user", "content": "q"}, ANSWER]}, "roles in a wrong order"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "not valid JSON in the arguments of a tool call"),
        ({"prompt": "q", "completion": "a", "tools": "[{"}, 'not valid JSON in "tools"'),
        ('{"question": "q", "answer": "a", "answer": "b"}', "a key stands twice in one object"),
        ('{"question": "q", "answer": NaN}', "NaN and Infinity are not JSON"),
        ('{"question": "q", "answer": 1e999}', "a number is too large"),
        ('{"question": "q", "answer": "\\ud800"}', "half a character (a lone surrogate), which no tokenizer can read"),
        ('{"question": "q", "answer": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"question": "q", "answer": ' + "[" * 100_000, "nested too deeply to be a training row"),
        ('{"question": "q", "answer": "a" ', "not valid JSON"),
        ('{"question": "q", "answer": "a\0"}', "not valid JSON"),
        ("3", "the row is not an object with columns"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_rejected_with_its_reason(tmp_path, row, reason):
    record = read_one(tmp_path, row)
    assert (record.content, record.reason) == (None, reason)


def test_train_false_stays_on_its_message_and_true_is_what_is_meant_without_it(tmp_path):
    question = {"role": "user", "content": "q"}
    row = {"messages": [question, {**ANSWER, "train": False}, {**question, "train": None}, {**ANSWER, "train": True}]}
    content = read_one(tmp_path, row).content
    assert content is not None
    assert content["messages"] == [question, {**ANSWER, "train": False}, question, ANSWER]


def test_nothing_is_repaired_in_a_mixed_file_and_the_place_is_named(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n\n{"prompt": "q", "completion": "a"}\n')
    first, second = records.open_file(path).records
    assert first.content
    assert (second.raw.line, second.reason) == (3, '"question" is missing or null')


def test_unknown_columns_are_an_error_that_names_those_found(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("Frage,Antwort\n1,2\n")
    with pytest.raises(UserError, match="no usable columns; found: 'Frage', 'Antwort'"):
        records.open_file(path)


def test_a_wanted_format_that_the_file_has_not_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no usable columns for data\.format messages"):
        read_one(tmp_path, {"question": "q", "answer": "a"}, "messages")
    assert said(read_one(tmp_path, {"instruction": "i", "output": "a", "input": "x"}, "pairs"))[0] == ("user", "x")


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"Frage": "q", "Antwort": "a"}, {"user": "Frage", "assistant": "antwort"}, [("user", "q"), ("assistant", "a")]),
        ({"q.": "q", "answer": "a", "question": "x"}, {"user": "q."}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "i", "input": "n", "out": "a"}, {"assistant": "out"}, [("user", "i\n\nn"), ("assistant", "a")]),
        ({"instruction": "i", "input": "n", "output": "a"}, {"user": "input"}, [("user", "n"), ("assistant", "a")]),
        ({"input": "s", "query": "q", "output": "a"}, {"system": "input"}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "input": "s", "output": "a"}, {"system": "input"}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
        ({"output": "q", "reply": "a"}, {"user": "output"}, [("user", "q"), ("assistant", "a")]),
        ({"output": "q", "input": "a"}, {"user": "output", "assistant": "input"}, [("user", "q"), ("assistant", "a")]),
        ({"messages": [ANSWER], "user": "q", "assistant": "a"}, {"user": "user"}, [("user", "q"), ("assistant", "a")]),
        ({"Chat": [{"role": "user", "content": "q"}, ANSWER], "conversations": []}, {"messages": "Chat"}, [("user", "q"), ("assistant", "a")]),
        ({"Chat": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "Regel": "s"}, {"messages": "Chat", "system": "Regel"}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
    ],
)  # fmt: skip
def test_own_column_names_come_before_the_known_ones(tmp_path, row, columns, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    [record] = records.open_file(path, "auto", columns).records
    assert said(record) == expected


def test_own_name_for_tools(tmp_path):
    path = tmp_path / "rows.jsonl"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, ANSWER], "Werkzeuge": [tool]}))
    [record] = records.open_file(path, "messages", {"tools": "Werkzeuge"}).records
    assert record.content is not None and record.content["tools"] == [tool]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": "Frag", "assistant": "Antwort"}, r"rows.csv:2: no column 'Frag' \(user\); found: 'Frage', 'Antwort'"),
        ({"user": "A", "assistant": "B"}, r"no column 'A' \(user\) and no 'B' \(assistant\); found"),
        ({"user": "Frage"}, "no usable columns; found: 'Frage', 'Antwort'"),
        ({"messages": "Frage"}, "no usable columns"),
    ],
)
def test_missing_columns_name_those_that_are_there(tmp_path, columns, message):
    path = tmp_path / "rows.csv"
    path.write_text("Frage,Antwort\nq,a\n")
    with pytest.raises(UserError, match=message) as caught:
        records.open_file(path, "auto", columns)
    assert "data.columns" in caught.value.hint


def test_a_later_row_without_the_named_column_is_rejected_by_its_own_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"Frage": "q", "Antwort": "a"}\n{"Frage": "q"}\n')
    _, second = records.open_file(path, "auto", {"user": "Frage", "assistant": "Antwort"}).records
    assert second.reason == '"antwort" is missing or null'


def test_columns_without_a_use_are_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "q", "answer": "a", "weight": 2}\n{"question": "q", "answer": "b", "weight": null}\n')
    found = records.open_file(path)
    list(found.records)
    assert found.left_out == {"weight": 1}


def rows_of(tmp_path: Path, name: str, content: bytes) -> list:
    path = tmp_path / name
    path.write_bytes(content)
    return [(row.line, row.value, row.reason) for row in read_rows(path)]


def test_json_layouts_are_told_apart_by_what_stands_in_them(tmp_path):
    one, two = {"a": "x\u2028y"}, {"a": "z"}
    lines = f"{json.dumps(one, ensure_ascii=False)}\r\n\r\n{json.dumps(two)}".encode()
    expected = [one, two]
    for name in ("a.json", "a.jsonl"):
        assert [value for _, value, _ in rows_of(tmp_path, name, b"\xef\xbb\xbf" + lines)] == expected
        assert [value for _, value, _ in rows_of(tmp_path, name, json.dumps(expected, indent=2).encode())] == expected
    holder = json.dumps({"version": 1, "data": expected, "list": ["x"]}, indent=1).encode()
    assert [(line, value) for line, value, _ in rows_of(tmp_path, "a.json", holder)] == [(4, one), (7, two)]
    single = {"messages": [{"role": "user", "content": "q"}, ANSWER]}
    assert [value for _, value, _ in rows_of(tmp_path, "a.json", json.dumps(single, indent=1).encode())] == [single]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1},\n {"a" 2}]', r"a.json:2:7: not valid JSON"),
        ("a.json", b'[{"a": 1},\n]', r"a.json:1:10: not valid JSON: a comma before"),
        ("a.json", b'[{"a": 1}] x', r"a.json:1:12: not valid JSON: text after"),
        ("a.json", b'[{"a": 1}', r"a.json:1:10: not valid JSON"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'{"train": [{"a": 1}], "test": [{"a": 2}]}', "several arrays: train, test"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b'{"data": []}', "holds no rows"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"a.jsonl:2: not UTF-8: byte 0xe9 at offset 16"),
        ("a.csv", b"q,a\n1,caf\xe9\n", r"a.csv:2: not UTF-8: byte 0xe9 at offset 9"),
        ("a.csv", b"q,a\n", "holds no rows"),
        ("a.csv", b"q,a,Q\n1,2,3\n", "column 'q' stands twice"),
        ("a.csv", b'q,a\n1,2\n3,"4\n5,6\n', r"a.csv:3: a quote that opens in this row is never closed"),
    ],
)
def test_a_broken_file_is_an_error_that_names_the_place(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path, name, content)


def test_csv_keeps_quotes_newlines_and_long_fields(tmp_path):
    long = "x" * 300_000
    content = f'q,a\r\n"say ""hi""\r\nthere, you",{long}\r\n\r\nn\0ul, b \n1,2,3\n"a"b,c\n'.encode()
    rows = rows_of(tmp_path, "a.csv", content)
    assert rows[:2] == [(2, {"q": 'say "hi"\r\nthere, you', "a": long}, ""), (5, {"q": "n\0ul", "a": " b "}, "")]
    assert [(line, reason) for line, _, reason in rows[2:]] == [(6, "wrong number of fields"), (7, "not valid CSV")]
    assert rows_of(tmp_path, "b.csv", b"q;a\n1,5;2\n")[0][1] == {"q": "1,5", "a": "2"}
    assert rows_of(tmp_path, "c.tsv", b"q\ta\n1,5\t2\n")[0][1] == {"q": "1,5", "a": "2"}


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(question=text, answer=text)
def test_any_text_survives_letter_by_letter(tmp_path_factory, question, answer):
    tmp_path = tmp_path_factory.mktemp("text")
    for escaped in (True, False):
        record = read_one(tmp_path, json.dumps({"question": question, "answer": answer}, ensure_ascii=escaped))
        assert said(record) == [("user", question), ("assistant", answer)]
        assert json.loads(record.encoded) == record.content


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "from", "content", "value", "name", "function", "tool_calls", "arguments", "type", "text"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(row=st.dictionaries(st.sampled_from(["messages", "conversations", "instruction", "input", "output", "history", "tools", "system", "weight"]), anything, min_size=1))  # fmt: skip
def test_any_json_row_is_kept_or_rejected_but_never_a_crash(tmp_path_factory, row):
    try:
        record = read_one(tmp_path_factory.mktemp("any"), row)
    except UserError as problem:
        assert "no usable columns" in problem.message
    else:
        assert bool(record.content) != bool(record.reason)


@given(content=st.binary(max_size=200), name=st.sampled_from(["a.json", "a.jsonl", "a.csv", "a.tsv"]))
def test_any_bytes_are_rows_or_a_clear_error(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(content)
    try:
        list(records.open_file(path).records)
    except (UserError, MachineError) as problem:  # the second for zstd without its library
        assert str(path) in problem.message


def test_split_depends_on_the_question_alone():
    one = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "1"}]}
    two = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "2"}], "tools": [{}]}
    assert question_hash(one, 0) == question_hash(two, 0) != question_hash(one, 1)


@given(question=st.binary(min_size=16, max_size=16), val=st.floats(0, 0.4), test=st.floats(0, 0.5))
def test_changing_the_val_share_moves_no_test_row(question, val, test):
    assert (split_of(question, val, test) == "test") == (split_of(question, 0, test) == "test")
    assert split_of(question, 0, 0) == "train"


def test_file_names_give_splits_only_where_something_is_held_out():
    def names(*files: str) -> dict[str, str]:
        return {path.name: split for path, split in given_splits([Path(file) for file in files]).items()}

    assert names("train.jsonl", "dev.csv", "Test.json") == {
        "train.jsonl": "train",
        "dev.csv": "val",
        "Test.json": "test",
    }
    assert names("more.jsonl", "test.jsonl") == {"test.jsonl": "test"}
    assert names("train.jsonl") == names("test.jsonl") == names("train.jsonl", "more.jsonl") == {}
    assert names("train_1.jsonl", "testing.jsonl") == {}


def test_of_a_prompt_in_turns_only_the_completion_is_learnt(tmp_path):
    prompt = [{"role": "user", "content": "q"}, ANSWER, {"role": "user", "content": "r"}]
    record = read_one(tmp_path, {"prompt": prompt, "completion": [{"role": "assistant", "content": "b"}]})
    assert record.content is not None
    assert [m.get("train") for m in record.content["messages"] if m["role"] == "assistant"] == [False, None]


@pytest.mark.parametrize("completion", [[{"role": "user", "content": "a"}], [], ["a"], [{"content": "a"}]])
def test_a_completion_in_turns_that_answers_nothing_is_rejected(tmp_path, completion):
    record = read_one(tmp_path, {"prompt": [{"role": "user", "content": "q"}], "completion": completion})
    assert record.content is None and record.reason
