"""docs/data.md: each example goes through process as it stands there."""

import re
from pathlib import Path

import pytest

from scripts.utils import records
from scripts.utils.files import REPO_ROOT

TEXT = (REPO_ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```(json|csv)\n(.*?)```", TEXT, flags=re.S)


def test_there_is_an_example_of_each_shape() -> None:
    assert len(EXAMPLES) >= 7


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_each_example_in_the_docs_is_read_whole(number: int, tmp_path: Path) -> None:
    kind, content = EXAMPLES[number]
    path = tmp_path / ("rows.jsonl" if kind == "json" else "rows.csv")
    path.write_text(content, encoding="utf-8")
    columns = {"user": "Frage", "assistant": "Antwort"} if "Frage" in content else None
    found = records.open_file(path, columns=columns)
    rows = list(found.records)
    assert [row.reason for row in rows] == [""] * (2 if kind == "json" else 1)
    assert not found.left_out and found.shape
