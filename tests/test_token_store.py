"""Tokens are made once a rendering, and are what render counted; a store of other rows or with a flipped bit is never used."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import process, render
from scripts.utils import chat, files, model_store, rendered, token_store
from scripts.utils.config import load_config
from scripts.utils.encoding import Encoded

pytestmark = pytest.mark.timeout(300)


def rendered_rows(overrides: str = "") -> tuple[Any, dict[str, Any], Any]:
    config = load_config("tiny.yaml", overrides)
    for module in (process, render):
        module.work(module.build_parser().parse_args(["--config", "tiny.yaml"]), config)
    want, manifest = rendered.require_current(config)
    return want, manifest, chat.load_tokenizer(model_store.resolve(config.model.name).path)


def plain(want: Any, tokenizer: Any, split: str = "train") -> list[Encoded]:
    return rendered.to_examples(tokenizer, list(rendered.read_rows(want.folder, split)))


def never(*_: Any) -> Any:
    raise AssertionError("a row was tokenised again")


def test_the_store_holds_each_row_as_render_counted_it(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    project(rows=700)  # more than one worker's share
    want, manifest, tokenizer = rendered_rows()
    made = token_store.examples(want, manifest, "train", tokenizer)
    expected = plain(want, tokenizer)
    assert list(made) == expected and len(made) == manifest["splits"]["train"] > 512
    assert made[-1] == expected[-1] and made[2:5] == expected[2:5] and sum(1 for _ in reversed(made)) == len(made)
    with pytest.raises(IndexError):
        made[len(made)]
    monkeypatch.setattr(token_store, "encode_row", never)
    again = token_store.examples(want, manifest, "train", tokenizer)
    assert isinstance(again, token_store.TokenStore) and list(again) == expected
    names = token_store.RowNames(want.folder, "train", len(made))
    assert names[3].startswith("data/raw/sums.jsonl:") and len(names) == len(made)


def test_two_runs_on_the_same_rows_make_the_store_once(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    project()
    want, manifest, tokenizer = rendered_rows()
    token_store.examples(want, manifest, "train", tokenizer)
    expected = plain(want, tokenizer)
    store, aside = want.folder / ".tokens", want.folder / ".aside"
    store.rename(aside)
    made: list[Any] = []
    monkeypatch.setattr(token_store, "encode_row", never)
    with files.file_lock(want.folder / ".tokens.lock", wait_seconds=0, what="test"):
        other = threading.Thread(
            target=lambda: made.append(token_store.examples(want, manifest, "train", tokenizer)), daemon=True
        )
        other.start()
        other.join(0.5)
        assert not made  # it waits for the one that is making it
        aside.rename(store)
    other.join(60)
    assert list(made[0]) == expected


@pytest.mark.parametrize("name", ["ids", "trained", "starts", token_store.META])
def test_a_damaged_store_is_made_anew(project: Callable[..., Path], name: str) -> None:
    project()
    want, manifest, tokenizer = rendered_rows()
    token_store.examples(want, manifest, "train", tokenizer)
    path = want.folder / ".tokens" / "train" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert list(token_store.examples(want, manifest, "train", tokenizer)) == plain(want, tokenizer)
    assert path.read_bytes() != bytes(data), "whole again"


def test_other_rows_or_another_tokenizer_take_no_old_store(project: Callable[..., Path]) -> None:
    folder = project()
    want, manifest, tokenizer = rendered_rows()
    before = list(token_store.examples(want, manifest, "train", tokenizer))
    key = files.read_json(want.folder / ".tokens" / "train" / token_store.META)["key"]
    with (folder / "data" / "raw" / "sums.jsonl").open("a") as file:
        file.writelines(json.dumps({"question": f"Say {n}", "answer": f"{n}"}) + "\n" for n in range(9))
    want, manifest, tokenizer = rendered_rows()
    after = list(token_store.examples(want, manifest, "train", tokenizer))
    assert len(after) > len(before) and after == plain(want, tokenizer)
    want.settings["tokenizer"] = "another"
    token_store.examples(want, manifest, "train", tokenizer)
    assert files.read_json(want.folder / ".tokens" / "train" / token_store.META)["key"] != key


def test_an_empty_split_has_no_examples(project: Callable[..., Path]) -> None:
    project()
    want, manifest, tokenizer = rendered_rows("data.val_fraction=0")
    assert len(token_store.examples(want, manifest, "val", tokenizer)) == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_costs_time_and_no_run(project: Callable[..., Path]) -> None:
    project()
    want, manifest, tokenizer = rendered_rows()
    want.folder.chmod(0o500)
    try:
        assert list(token_store.examples(want, manifest, "train", tokenizer)) == plain(want, tokenizer)
    finally:
        want.folder.chmod(0o700)


def test_a_full_disk_costs_time_and_no_run(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project()
    want, manifest, tokenizer = rendered_rows()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_store, "_write", full)
    assert list(token_store.examples(want, manifest, "train", tokenizer)) == plain(want, tokenizer)
    assert "cannot be kept" in capsys.readouterr().err
    assert not list(want.folder.glob(".tokens/.train*")), "nothing half is left"
