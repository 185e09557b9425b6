"""hub:owner/name: fetched once, verified, read by our own readers, used offline afterwards; each refusal one message."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.utils import data_hub, splits
from scripts.utils.errors import UserError
from scripts.utils.files import REPO_ROOT
from tests.test_model_store import HUB, Hub, environment, hub

__all__ = ["hub"]  # the fixture


def lines(count: int, first: int = 0) -> bytes:
    return b"".join(
        json.dumps({"question": f"{n}?", "answer": str(n)}).encode() + b"\n" for n in range(first, first + count)
    )


SETS = {
    "org/rows": {
        "README.md": b"# rows",
        "rows.py": b"raise SystemExit('code from the hub must never come')",
        "dataset_infos.json": b"{}",
        "data/train-00000-of-00002.jsonl": lines(20),
        "data/train-00001-of-00002.jsonl": lines(20, 20),
        "data/test-00000-of-00001.jsonl": lines(5, 40),
    },
    "org/two": {"main/train.jsonl": lines(9), "other/train.jsonl": lines(9, 9)},
    "org/none": {"README.md": b"# nothing", "image.png": b"x"},
}


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in SETS.items():
        monkeypatch.setitem(HUB, name, content)


def process(folder: Path, raw: str, **more: str) -> tuple[int, str]:
    (folder / "run.yaml").write_text("data: {max_rejected: 0}\n")
    words = [sys.executable, str(REPO_ROOT / "scripts/process.py"), "--config", "run.yaml", "--raw", raw]
    variables = environment(folder / "models", SFT_DATA_CACHE=str(folder / "cache"), **more)
    done = subprocess.run(words, env=variables, cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_a_data_set_is_fetched_once_keeps_its_splits_and_is_used_offline(tmp_path: Path, hub: str) -> None:
    code, shown = process(tmp_path, "hub:org/rows", HF_ENDPOINT=hub)
    assert code == 0, shown
    made = tmp_path / "data/processed/rows"
    counts = {s: len((made / f"{s}.jsonl").read_text().splitlines()) for s in ("train", "val", "test")}
    assert counts["test"] == 5 and counts["train"] + counts["val"] == 40
    assert json.loads((made / "test.jsonl").read_text().splitlines()[0])["source"]["file"].startswith("cache/org--rows")
    fetched = {p.name for p in (tmp_path / "cache/org--rows").rglob("*") if p.is_file()}
    assert "rows.py" not in fetched and "dataset_infos.json" not in fetched
    Hub.requests.clear()
    assert process(tmp_path, "hub:org/rows", HF_ENDPOINT=hub)[0] == 0
    assert process(tmp_path, "hub:org/rows", HF_HUB_OFFLINE="1")[0] == 0
    assert Hub.requests == []


def test_of_several_folders_one_is_named(tmp_path: Path, hub: str) -> None:
    code, shown = process(tmp_path, "hub:org/two", HF_ENDPOINT=hub)
    assert code == 2 and "name one: hub:org/two/main, hub:org/two/other" in shown
    code, shown = process(tmp_path, "hub:org/two/other", HF_ENDPOINT=hub)
    assert code == 0, shown
    assert process(tmp_path, "hub:org/two/third", HF_ENDPOINT=hub)[0] == 2


@pytest.mark.parametrize(
    ("raw", "code", "words"),
    [
        ("hub:org/none", 2, "holds no file of rows on the hub; it holds README.md, image.png"),
        ("hub:org/nowhere", 4, "the hub has no such data set"),
        ("hub:org/gated", 4, "it is gated"),
        ("hub:rows", 2, "names no data set of the hub"),
        ("hub:org/../x", 2, "names no data set of the hub"),
    ],
)
def test_a_refusal_is_one_message_and_leaves_nothing(tmp_path: Path, hub: str, raw: str, code: int, words: str) -> None:
    got, shown = process(tmp_path, raw, HF_ENDPOINT=hub)
    assert got == code and words in shown and "Traceback" not in shown, shown
    assert "hint: " in shown and not (tmp_path / "data").exists()


def test_offline_says_what_to_do(tmp_path: Path) -> None:
    code, shown = process(tmp_path, "hub:org/rows", HF_HUB_OFFLINE="1")
    assert code == 4 and "make process RAW=hub:org/rows" in shown


def test_other_names_are_what_they_are() -> None:
    assert data_hub.local("data/raw") == "data/raw"
    with pytest.raises(UserError):
        data_hub.local("hub:")


def test_the_parts_of_a_split_are_that_split() -> None:
    paths = [Path("train-00000-of-00002.parquet"), Path("validation-00000-of-00001.parquet"), Path("a-1-of-2.jsonl")]
    assert splits.given_splits(paths) == {paths[0]: "train", paths[1]: "val"}
