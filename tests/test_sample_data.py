"""The shipped sample: made by the generator, byte for byte, and honest about what the test rows hold out."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import sample_data
from scripts.utils.files import REPO_ROOT, read_jsonl

SHIPPED = REPO_ROOT / "data" / "sample"
SPLITS = ("train", "val", "test")
SCRIPT = [sys.executable, str(REPO_ROOT / "scripts" / "sample_data.py")]


def messages(split: str) -> list[tuple[str, dict]]:
    """(the customer's message, the answer) of each shipped row."""
    rows = [row["messages"] for row in read_jsonl(SHIPPED / f"{split}.jsonl")]
    return [(user["content"], json.loads(answer["content"])) for _, user, answer in rows]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def test_generator_makes_the_shipped_files_byte_for_byte(tmp_path: Path) -> None:
    assert sample_data.main(["--out", str(tmp_path)]) == 0
    assert set(files(tmp_path)) == {f"{split}.jsonl" for split in SPLITS}
    assert files(tmp_path) == files(SHIPPED)


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_supported_python_makes_the_same_bytes(version: str, tmp_path: Path) -> None:
    python = shutil.which(f"python{version}")
    if not python or subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip(f"no python{version} here")
    code = (
        "import sys; from pathlib import Path; from scripts.sample_data import write_sample as w; w(Path(sys.argv[1]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "random", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([python, "-c", code, str(tmp_path)], cwd=REPO_ROOT, env=environment, check=True)
    assert files(tmp_path) == files(SHIPPED)


def test_generator_uses_only_the_random_numbers_that_python_keeps_stable() -> None:
    tree = ast.parse((REPO_ROOT / "scripts" / "sample_data.py").read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random"
    }
    assert used == {"random"}


def test_there_are_at_least_600_rows_and_every_message_is_distinct() -> None:
    everything = [text.lower() for split in SPLITS for text, _ in messages(split)]
    assert len(everything) >= 600
    assert len(set(everything)) == len(everything)


def test_splits_share_no_item_no_name_and_no_wording() -> None:
    for table in (sample_data.ITEMS, sample_data.NAMES):
        groups = [set(table[split].split(" | ")) for split in SPLITS]
        assert sum(map(len, groups)) == len(set.union(*groups))
    wordings = [set(" | ".join(sample_data.WORDINGS[split].values()).split(" | ")) for split in SPLITS]
    assert sum(map(len, wordings)) == len(set.union(*wordings))
    items = {split: {answer["item"] for _, answer in messages(split)} for split in SPLITS}
    assert not items["train"] & items["test"] and not items["train"] & items["val"] and not items["val"] & items["test"]


def test_answers_have_fixed_keys_and_are_supported_by_the_message() -> None:
    numbers = {word: number for number, word in sample_data.NUMBER_WORDS.items()}
    for split in SPLITS:
        for text, answer in messages(split):
            assert list(answer) == ["intent", "item", "quantity", "order", "urgent"]
            assert answer["intent"] in sample_data.WORDINGS["train"]
            assert answer["item"] in text.lower()
            assert re.findall(r"\d{4}", text) == ([answer["order"]] if answer["order"] else [])
            before = re.search(rf"(\w+) {answer['item']}", text.lower())
            assert before is not None
            said = numbers.get(before[1], int(before[1]) if before[1].isdigit() else 1)
            assert answer["quantity"] == said
            pressing = [phrase for phrase in sample_data.URGENT.split(" | ") if phrase.lower() in text.lower()]
            assert answer["urgent"] == bool(pressing)


def test_no_part_of_an_answer_can_be_guessed_from_its_frequency() -> None:
    for split in SPLITS:
        answers = [answer for _, answer in messages(split)]
        for key, most in {"intent": 0.25, "item": 0.25, "quantity": 0.7, "order": 0.4, "urgent": 0.8}.items():
            values = [answer[key] for answer in answers]
            assert max(values.count(value) for value in values) <= most * len(values), (split, key)


def test_sample_data_does_not_overwrite_edits_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample_data.main(["--out", str(tmp_path)]) == 0
    edited = tmp_path / "val.jsonl"
    edited.write_bytes(b"mine\n")
    assert sample_data.main(["--out", str(tmp_path)]) == 3
    assert edited.read_bytes() == b"mine\n"
    assert str(edited) in capsys.readouterr().err
    assert sample_data.main(["--out", str(tmp_path), "--force"]) == 0
    assert files(tmp_path) == files(SHIPPED)


def test_help_shows_an_example_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    shown = subprocess.run([*SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    assert "example:" in shown and "--force" in shown
    first = subprocess.run([*SCRIPT, "--out", str(tmp_path)], capture_output=True, text=True, check=True).stdout
    was = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert first.startswith("sample-data: ") and "train" in first
    subprocess.run([*SCRIPT, "--out", str(tmp_path)], capture_output=True, check=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == was
