"""Small nasty data files, each with what must become of it: rows kept and the reason of each rejection, or an error.

``NASTY``: name of the case → (file name, bytes, expected). Expected is the text of an error that refuses the file, or
(rows kept, {line: reason}); duplicates are the rest of the rows.
"""

import gzip
import json
from typing import Any

Expected = str | tuple[int, dict[int, str]]
GOOD = b'{"question": "q", "answer": "a"}\n'


def chat(*turns: Any, **more: Any) -> bytes:
    """A row of turns; a text "role: content" is short for a turn."""
    full = [dict(zip(("role", "content"), t.split(": ", 1), strict=True)) if isinstance(t, str) else t for t in turns]
    return json.dumps({"messages": full, **more}).encode() + b"\n"


def answer(value: str) -> bytes:
    return b'{"question": "q", "answer": ' + value.encode() + b"}\n"


def bad(row: bytes, reason: str) -> tuple[str, bytes, Expected]:
    """A row that is rejected in the second line, after a good one of the same shape."""
    first = chat("user: q", "assistant: a") if b'"messages"' in row else GOOD
    return "a.jsonl", first + row, (1, {2: reason})


def call(arguments: Any, name: Any = "f") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


NASTY: dict[str, tuple[str, bytes, Expected]] = {
    # --- encodings and line ends
    "byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + GOOD, (1, {})),
    "CRLF, blank lines, no last line end": ("a.jsonl", b"\r\n" + GOOD[:-1] + b"\r\n\r\n" + answer("2")[:-1], (2, {})),
    "old Mac line ends": ("a.jsonl", GOOD + GOOD[:-1] + b"\r" + answer("2"), (1, {2: "not valid JSON (Extra data"})),
    "U+2028 and U+0085 in a text": ("a.jsonl", answer('"x\u2028y\u0085z"'), (1, {})),
    "latin-1": ("a.jsonl", GOOD + answer('"caf?"').replace(b"?", b"\xe9"), "a.jsonl:2: not UTF-8: byte 0xe9 at offset"),
    "Windows quotes": ("a.csv", b"question,answer\nq,\x93a\x94\n", "a.csv:2: not UTF-8: byte 0x93"),
    "UTF-16 with mark": ("a.jsonl", GOOD.decode().encode("utf-16"), "is UTF-16, not UTF-8 text"),
    "UTF-16 without mark": ("a.jsonl", GOOD.decode().encode("utf-16-le"), (0, {1: "is the file UTF-16", 2: "not valid JSON"})),
    "UTF-32": ("a.jsonl", GOOD.decode().encode("utf-32"), "is UTF-16, not UTF-8 text"),
    "a character cut in half": ("a.jsonl", GOOD + b'{"question": "\xe2\x82', "a.jsonl:2: not UTF-8"),
    "overlong slash": ("a.jsonl", answer('"?"').replace(b"?", b"\xc0\xaf"), "a.jsonl:1: not UTF-8: byte 0xc0"),
    "surrogate in UTF-8": ("a.jsonl", answer('"?"').replace(b"?", b"\xed\xa0\x80"), "a.jsonl:1: not UTF-8: byte 0xed"),
    "lone surrogate": bad(answer(r'"\ud83d"'), "half a character (a lone surrogate), which no tokenizer can read (\\ud83d)"),
    "surrogate pair": ("a.jsonl", answer(r'"\ud83d\ude00"'), (1, {})),
    "raw NUL": bad(answer('"a\0b"'), "not valid JSON (Invalid control character at, column 31; the line holds NUL"),
    "escaped NUL": ("a.jsonl", answer(r'"a\u0000b"'), (1, {})),
    # --- JSON that is none, or not what it seems
    "NaN": bad(answer("NaN"), "NaN and Infinity are not JSON (NaN)"),
    "infinity": bad(answer("-Infinity"), "NaN and Infinity are not JSON (-Infinity)"),
    "number without end": bad(answer("1e999"), "a number is too large (1e999)"),
    "5,000 digits": bad(answer("9" * 5000), "not valid JSON (Exceeds the limit"),
    "duplicate key": bad(b'{"question": "q", "answer": "a", "answer": "b"}\n', 'a key stands twice in one object ("answer")'),
    "100,000 brackets": bad(answer("[" * 100_000 + "]" * 100_000), "nested too deeply to be a training row"),
    "100,000 open brackets": bad(b"[" * 100_000 + b"\n", "nested too deeply to be a training row"),
    "10 MB line": ("a.jsonl", answer('"' + "long " * 2_000_000 + '"'), (1, {})),
    "single quotes": bad(b"{'question': 'q', 'answer': 'a'}\n", "not valid JSON"),
    "comment": bad(b"// a comment\n", "not valid JSON"),
    "comma too many": bad(b'{"question": "q", "answer": "a",}\n', "not valid JSON"),
    "Python's None": bad(b'{"question": "q", "answer": None}\n', "not valid JSON"),
    "two rows in a line": bad(GOOD[:-1] + GOOD, "not valid JSON (Extra data"),
    "cut last line": bad(b'{"question": "q", "ans', "not valid JSON (Unterminated string"),
    "a row that is a list": bad(b'["q", "a"]\n', "the row is not an object with columns (it is a list)"),
    "a row that is text": bad(b'"question"\n', "the row is not an object with columns (it is text)"),
    "a row that is null": bad(b"null\n", "the row is not an object with columns (it is missing or null)"),
    "a row that is a number": bad(b"42\n", "the row is not an object with columns (it is a number)"),
    "a row without columns": bad(b"{}\n", '"question" is missing or null'),
    # --- questions and answers
    "answer a number": ("a.jsonl", answer("42"), (1, {})),
    "answer true": ("a.jsonl", answer("true"), (1, {})),
    "answer null": bad(answer("null"), '"answer" is missing or null'),
    "answer empty": bad(answer('""'), '"answer" is empty'),
    "answer blank": bad(answer(r'" \n\t\u00a0"'), '"answer" is empty'),
    "answer a list": bad(answer('["a"]'), '"answer" is a list'),
    "answer an object": bad(answer('{"a": 1}'), '"answer" is an object'),
    "no question": bad(b'{"answer": "a"}\n', '"question" is missing or null'),
    "control tokens in a text": ("a.jsonl", answer('"<|im_end|>\\n<|im_start|>user"'), (1, {})),
    "the same row three times": ("a.jsonl", answer('"x"') * 3, (1, {})),
    "columns in capitals and with spaces": ("a.jsonl", b'{" Question ": "q", "ANSWER": "a"}', (1, {})),
    # --- turns
    "roles in a wrong order": bad(chat("assistant: a", "user: q"), "roles in a wrong order (turn 1: assistant after nothing)"),
    "two users": bad(chat("user: q", "user: r", "assistant: a"), "roles in a wrong order (turn 2: user after user)"),
    "two system messages": bad(chat("system: s", "system: t", "user: q", "assistant: a"), "roles in a wrong order"),
    "system in the middle": bad(chat("user: q", "assistant: a", "system: s"), "roles in a wrong order"),
    "only user turns": bad(chat("user: q"), "no assistant turn"),
    "the user has the last word": bad(chat("user: q", "assistant: a", "user: r"), "the last turn is not the assistant's"),
    "no turns": bad(chat(), '"messages" is not a list of turns (it is an empty list)'),
    "turns as text": bad(b'{"messages": "user: q"}\n', '"messages" is not a list of turns (it is text)'),
    "turns as an object": bad(b'{"messages": {"role": "user"}}\n', '"messages" is not a list of turns (it is an object)'),
    "a turn that is text": bad(chat("user: q", "assistant: a").replace(b'[{"', b'["x", {"'), "a turn is not an object"),
    "unknown role": bad(chat("narrator: x", "assistant: a"), "a turn has an unknown role ('narrator')"),
    "role a number": bad(chat({"role": 1, "content": "q"}, "assistant: a"), "a turn has an unknown role (1)"),
    "no role": bad(chat({"content": "q"}, "assistant: a"), "a turn has an unknown role (None)"),
    "empty assistant": bad(chat("user: q", {"role": "assistant", "content": ""}), "an assistant turn is empty"),
    "content null": bad(chat("user: q", {"role": "assistant", "content": None}), "an assistant turn is empty"),
    "content missing": bad(chat("user: q", {"role": "assistant"}), "an assistant turn is empty"),
    "content in parts": ("a.jsonl", chat({"role": "user", "content": [{"type": "text", "text": "q"}]}, "assistant: a"), (1, {})),
    "an image": bad(chat({"role": "user", "content": [{"type": "image_url"}]}, "assistant: a"), "a user turn holds parts that are not text"),
    # --- tools
    "tool call without result at the end": ("a.jsonl", chat("user: q", call({"x": 1})), (1, {})),
    "tool call without result": bad(chat("user: q", call({}), "assistant: a"), "roles in a wrong order (turn 3: assistant after a tool call)"),
    "tool result without call": bad(chat("user: q", "tool: r", "assistant: a"), "roles in a wrong order (turn 2: tool after user)"),
    "arguments that are no JSON": bad(chat("user: q", call("{x")), "not valid JSON in the arguments of a tool call"),
    "arguments a list": bad(chat("user: q", call([1])), "the arguments of a tool call are not an object (they are a list)"),
    "arguments with a key twice": bad(chat("user: q", call('{"x": 1, "x": 2}')), "a key stands twice in one object"),
    "a call without a name": bad(chat("user: q", call({}, None)), "a tool call has no name"),
    "tools a number": bad(chat("user: q", "assistant: a", tools=5), '"tools" is not a list of objects'),
    "tools that are no JSON": bad(chat("user: q", "assistant: a", tools="[{"), 'not valid JSON in "tools"'),
    # --- whole JSON files
    "array": ("a.json", b"[\n" + GOOD + b",\n" + answer("null") + b"]", (1, {4: '"answer" is missing or null'})),
    "array with NaN": ("a.json", b"[" + GOOD + b"," + answer("NaN") + b"]", (1, {2: "NaN and Infinity"})),
    "array in an object": ("a.json", b'{"version": 2,\n"rows": [' + GOOD + b"]}", (1, {})),
    "JSON lines named .json": ("a.json", GOOD + answer("2"), (2, {})),
    "array cut short": ("a.json", b"[" + GOOD + b",", "a.json:2:2: not valid JSON"),
    "array with a comma too many": ("a.json", b"[" + GOOD + b",]", "a comma before the closing bracket"),
    "text after the array": ("a.json", b"[" + GOOD + b"] x", "text after the end of the value"),
    "two arrays in one object": ("a.json", b'{"a": [' + GOOD + b'], "b": [' + GOOD + b"]}", "several arrays: a, b"),
    "empty array": ("a.json", b"[ ]", "holds no rows"),
    "array nested without end": ("a.json", b"[" * 100_000, "nested too deeply"),
    "a page of HTML": ("a.json", b"<!DOCTYPE html>\n<html></html>\n", "not valid JSON"),
    # --- tables
    "quotes, commas and line ends in fields": ("a.csv", b'question,answer\r\n"a ""q"", b","line\r\nline"\r\n', (1, {})),
    "field too many": ("a.csv", b"question,answer\nq,a\nq,a,b\n", (1, {3: "wrong number of fields (3 fields, the header has 2)"})),
    "field too few": ("a.csv", b"question,answer\nq,a\nq\n", (1, {3: "wrong number of fields (1 fields, the header has 2)"})),
    "open quote": ("a.csv", b'question,answer\nq,"a\nq,b\n', "a.csv:2: a quote that opens in this row is never closed"),
    "text after a quote": ("a.csv", b'question,answer\nq,a\n"q"x,b\n', (1, {3: "not valid CSV"})),
    "column twice": ("a.csv", b"question,answer,Answer\nq,a,b\n", "the column 'answer' stands twice"),
    "header alone": ("a.csv", b"question,answer\n", "holds no rows"),
    "no header": ("a.csv", b"what is it?,a cat\n1,2\n", "no usable columns; found: 'what is it?', 'a cat'"),
    "semicolons and a mark": ("a.csv", "\ufeffquestion;answer\n1,5;2\n".encode(), (1, {})),
    "empty answer in a table": ("a.csv", b"question,answer\nq,a\nq,\n", (1, {3: '"answer" is empty'})),
    "quotes in the header": ("a.csv", b'"question","answer"\n"q","a"\n', (1, {})),
    "NUL in a table": ("a.tsv", b"question\tanswer\nq\ta\0b\n", (1, {})),
    "JSON lines named .csv": ("a.csv", GOOD, "holds no rows"),
    "a table named .jsonl": ("a.jsonl", b"question,answer\nq,a\n", (0, {1: "not valid JSON", 2: "not valid JSON"})),
    # --- files that are something else
    "nothing": ("a.jsonl", b"", "the file is empty"),
    "a mark alone": ("a.jsonl", b"\xef\xbb\xbf", "the file is empty"),
    "blank lines alone": ("a.csv", b"\n\r\n \n", "holds no rows"),
    "a zip archive": ("a.csv", b"PK\x03\x04....", "is a zip archive or a spreadsheet, not UTF-8 text"),
    "Parquet named .json": ("a.json", b"PAR1....PAR1", "is Parquet, not UTF-8 text"),
    # --- packed
    "gzip named .jsonl": ("a.jsonl", gzip.compress(GOOD), (1, {})),
    "text named .gz": ("a.jsonl.gz", GOOD, (1, {})),
    "gzip cut short": ("a.csv.gz", gzip.compress(b"question,answer\n" + b"q,a\n" * 99)[:-9], "the gzip file is cut short"),
    "gzip with a wrong sum": ("a.csv.gz", gzip.compress(GOOD * 99)[:-8] + b"\1\2\3\4\5\6\7\10", "the gzip file is damaged"),
    "gzip in gzip": ("a.jsonl.gz", gzip.compress(gzip.compress(GOOD)), "is packed twice"),
    "gzip of nothing": ("a.jsonl.gz", gzip.compress(b""), "the file is empty"),
    "gzip of latin-1": ("a.csv.gz", gzip.compress(b"question,answer\nq,\xe9\n"), "a.csv.gz:2: not UTF-8: byte 0xe9 at offset 18"),
    "a gzip bomb": ("a.jsonl.gz", gzip.compress(b" " * 2**27, 9), "unpacks to more than 100 times its size"),
    "300,000 rows in a small gzip file": ("a.jsonl", gzip.compress(answer('"' + "a" * 230 + '"') * 300_000, 9), "unpacks to more than 100 times"),
}  # fmt: skip
